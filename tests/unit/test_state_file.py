"""What a training keeps comes back to the bit from a file that safetensors' own readers take, or not at all."""

from __future__ import annotations

import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from trsp_deploy.tools.training.state_file import DTYPES, TREE, read_state, write_state

STATE = {
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0)}, 7: {}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
    },
    "picks": [{"layer": 2, "gates": ((0.5, 1.0),), "removal_loss": {2: float("inf")}}],
    "text": ["é\n", ""],
    "none": None,
    "yes": True,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


def test_what_is_written_is_read_again(path):
    write_state(path, "key", STATE)
    found = read_state(path, "key")
    assert found["optimizer"]["state"][0]["step"] == 3.0 and found["optimizer"]["state"][7] == {}
    assert {name: found[name] for name in ("picks", "text", "none", "yes")} == {
        name: STATE[name] for name in ("picks", "text", "none", "yes")
    }
    assert found["optimizer"]["param_groups"] == STATE["optimizer"]["param_groups"]
    assert isinstance(found["optimizer"]["param_groups"][0]["betas"], tuple)


def test_tensors_of_every_kind_come_back_to_the_bit(path):
    whole = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}  # 15 numbers: odd offsets
    odd = {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "a view": torch.arange(12).view(3, 4).T}
    write_state(path, "key", {**whole, **odd})
    found = read_state(path, "key")
    for name, tensor in {**whole, **odd}.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_safetensors_reads_the_file(path):
    write_state(path, "key", {"weights": {"w": torch.arange(6.0).view(2, 3)}})
    assert torch.equal(load_file(path)["0"], torch.arange(6.0).view(2, 3))


def test_an_old_state_outlives_the_file_it_was_read_from(path):
    write_state(path, "key", {"w": torch.ones(100_000)})
    old = read_state(path, "key")["w"]
    new = path.with_name("new")
    write_state(new, "key", {"w": torch.zeros(100_000)})
    new.replace(path)
    assert old.sum() == 100_000


def test_another_key_is_another_training(path):
    write_state(path, "these settings", STATE)
    assert read_state(path, "other settings") is None


def test_no_file_is_no_state(path, tmp_path):
    assert read_state(path, "key") is None
    assert read_state(tmp_path, "key") is None  # a folder
    path.write_bytes(b"")
    assert read_state(path, "key") is None


def test_a_file_that_cannot_be_opened_now_is_not_taken_for_none(path):
    """A training that began anew would overwrite it."""
    write_state(path, "key", STATE)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
        with pytest.raises(OSError, match="Too many open files"):
            read_state(path, "key")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert read_state(path, "key") is not None


def test_a_file_of_another_program_is_no_state(path):
    save_file({TREE: torch.zeros(1)}, path, {"key": "key"})
    assert read_state(path, "key") is None


def test_what_no_reader_would_get_back_is_not_written(path):
    with pytest.raises(TypeError):
        write_state(path, "key", {"model": torch.nn.Linear(1, 1)})
