"""What a stranger installs: the wheel alone, from another folder, finds its recipes and specs, and does the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import trsp_deploy
from tests.tiny import english, save_tiny

CHECKOUT = Path(trsp_deploy.__file__).parent.parent
MINUTES = 60
SHORT = [
    "calibration.context_length=32",
    "plan.steps=2",
    "transfer.steps=4",
    "evaluate.context_length=64",
    "bench.budget_s=4",
    "bench.replicates=2",
]


def names(kind: str) -> list[str]:
    return sorted(path.stem for path in (CHECKOUT / kind).glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built out of the sdist, so that both carry what they need."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    subprocess.run([*build, "sdist"], cwd=CHECKOUT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_carries_recipes_engine_specs_and_its_licence(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (licence,) = tmp_path.glob("site/*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()
    assert (tmp_path / "site/trsp_deploy/py.typed").is_file()  # type checkers take the annotations for it (PEP 561)
    for kind in ("recipes", "engines"):
        script = f"from trsp_deploy.cli import main; import sys; sys.argv[1:] = ['{kind}', 'ls', '--json']; main()"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        assert [row[kind.removesuffix("s")] for row in json.loads(done.stdout)] == names(kind)


@pytest.mark.network
def test_the_wheel_does_the_job_in_an_empty_environment(wheel, tmp_path):
    """No checkout, no developer's tools: what pip takes for the extras of the README is enough, with this Python."""
    empty, elsewhere = tmp_path / "empty", tmp_path / "elsewhere"
    venv.create(empty, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(empty / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", f"{wheel}[optimum,cpu]"], check=True, timeout=30 * MINUTES)
    subprocess.run([*pip, "check"], check=True)

    save_tiny("llama", elsewhere / "tiny")
    (elsewhere / "train.txt").write_text(english()[:60_000])
    (elsewhere / "test.txt").write_text(english()[60_000:90_000])

    def call(*arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [empty / "bin" / "trsp-deploy", *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=10 * MINUTES,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for kind in ("recipes", "engines"):
        assert [row[kind.removesuffix("s")] for row in json.loads(call(kind, "ls", "--json"))] == names(kind)
    assert "ort-cpu-fp32" in call("doctor")

    texts = ["--calibration", "train.txt", "--eval", "manual=test.txt"]
    sets = [option for pair in SHORT for option in ("--set", pair)]
    job = ["prune-and-build", "--model", "tiny", "--drop", "2", *texts, *sets, "--out", "run", "--json"]
    report = json.loads(call(*job).splitlines()[-1])
    assert (report["model"]["num_layers_dense"], report["model"]["num_layers_pruned"]) == (6, 4)
    assert {engine["name"]: engine["status"] for engine in report["engines"]}["ort-cpu-fp32"] == "ran"
    call("verify", "run")
