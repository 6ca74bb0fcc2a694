"""A plan is a file that people edit: each mistake gets its line."""

from __future__ import annotations

import json

import pytest

from trsp_deploy.artifacts import write_json
from trsp_deploy.errors import PlanError
from trsp_deploy.tools.plan import Pick, PruningPlan, complement, read_plan

PLAN = PruningPlan(
    model="tiny",
    num_layers=6,
    dropped=(1, 4),
    kept=(0, 2, 3, 5),
    method="trsp, branch gates",
    seed=0,
    settings={},
    calibration="text",
    picks=(Pick(layer=4, lm_loss=(3.0,), gates=((1.0,) * 6,), removal_loss={4: 3.1, 2: 3.2}),),
)


def test_plan_survives_its_file(tmp_path):
    write_json(tmp_path / "plan.json", PLAN)
    assert read_plan(tmp_path / "plan.json", 6) == PLAN


def test_complement():
    assert complement([4, 1], 6) == (0, 2, 3, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dropped": [1, 4, 5]}, "layer 5 is under both `dropped` and `kept`; take it out of one"),
        ({"dropped": [1]}, "layer 4 is under neither `dropped` nor `kept`; add it to one"),
        ({"dropped": [1, 9]}, "layer 9 does not exist; valid: 0 to 5"),
        ({"dropped": [4, 1]}, "`dropped` must be sorted and without repeats"),
        ({"dropped": [], "kept": [0, 1, 2, 3, 4, 5]}, "at least one layer must be dropped and one kept"),
        ({"dropped": [0, 1, 2, 3, 4, 5], "kept": []}, "at least one layer must be dropped and one kept"),
        ({"num_layers": 12}, "made for a model of 12 layers, this one has 6"),
        ({"dropped": [-1, 4]}, "key 'dropped.0': should be greater than or equal to 0, got -1"),
        ({"droped": [1]}, "unknown key 'droped'; did you mean 'dropped'?"),
        ({"dropped": "1,4"}, "key 'dropped': should be a valid array, got '1,4'"),
    ],
)
def test_each_mistake_has_its_line(tmp_path, changes, words):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLAN.model_dump(mode="json"), **changes}))
    with pytest.raises(PlanError) as caught:
        read_plan(path, 6)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_and_garbled_files(tmp_path):
    with pytest.raises(PlanError, match="no such file"):
        read_plan(tmp_path / "none.json", 6)
    for content, words in (("{", "is not valid JSON"), ("[]", "holds a list, expected an object")):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(PlanError, match=words):
            read_plan(tmp_path / "plan.json", 6)
