"""A model whose architecture is Python beside its weights: asked for by its fingerprint it goes all the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.breadth import BREADTH
from tests.tiny import english, save_tiny, tokens
from trsp_deploy import cli
from trsp_deploy.errors import ModelError
from trsp_deploy.model_code import model_code

CODE = {
    "configuration_mine.py": """
from transformers import LlamaConfig


class MineConfig(LlamaConfig):
    model_type = "mine"
""",
    "activation_mine.py": """
import os
from pathlib import Path

from torch import nn

Path(os.environ["MARK"]).touch()


def activation():
    return nn.ReLU()
""",
    "modeling_mine.py": """
from transformers import LlamaForCausalLM

from .activation_mine import activation
from .configuration_mine import MineConfig


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.act_fn = activation()
""",
}
AUTO_MAP = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
RUN = ("--drop", "2", "--calibration", "text.txt")
SMALL = {
    "calibration.context_length": 32,
    "calibration.max_windows": 8,
    "calibration.validation_windows": 2,
    "plan.steps": 1,
    "transfer.steps": 2,
}
SETTINGS = tuple(part for key, value in SMALL.items() for part in ("--set", f"{key}={value}"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and the model `mine`, a Llama with another activation."""
    folder = tmp_path_factory.mktemp("own-code")
    (folder / "text.txt").write_text(english()[:30_000])
    model = save_tiny("llama", folder / "mine")
    for name, text in CODE.items():
        (model / name).write_text(text)
    config = json.loads((model / "config.json").read_text())
    changed = {**config, "model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": AUTO_MAP}
    (model / "config.json").write_text(json.dumps(changed))
    return folder


def call(workspace: Path, *arguments: str, code: int = 0, trust: str = "", python: str = "") -> str:
    """What the program, or a line of Python, says in a process of its own: what is imported here stays."""
    command = [sys.executable, "-c", python] if python else [sys.executable, "-m", "trsp_deploy", *arguments]
    environment = {
        **os.environ,
        "MARK": str(workspace / "it-ran"),
        "TRSP_DEPLOY_HOME": str(workspace / "home"),
        "HF_HOME": str(workspace / "hf"),
        "TRSP_DEPLOY_TRUST_REMOTE_CODE": trust,
    }
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def refused(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the program says here, where no code of a model's runs."""
    monkeypatch.chdir(workspace)
    for name in ("TRSP_DEPLOY_HOME", "HF_MODULES_CACHE", "TRSP_DEPLOY_TRUST_REMOTE_CODE"):  # some are set meanwhile
        monkeypatch.setenv(name, "" if "TRUST" in name else str(workspace / "home"))
    (workspace / "it-ran").unlink(missing_ok=True)

    def say(*arguments: str) -> str:
        assert cli.run(list(arguments)) == 1
        assert not (workspace / "it-ran").exists()
        return capsys.readouterr().err

    return say


JOB = ("prune", "--model", "mine", *RUN, "--out", "run", *SETTINGS)


def test_it_is_refused_with_what_would_let_it_run(workspace: Path, refused: Callable[..., str]) -> None:
    code = model_code(workspace / "mine")
    assert code is not None and code.files == tuple(sorted(CODE))
    said = refused(*JOB)
    assert "AutoModelForCausalLM as MineForCausalLM of modeling_mine.py" in said
    assert (
        "trust_remote_code stays off unless you name the code: read activation_mine.py, configuration_mine.py" in said
    )
    assert f"trsp-deploy --trust-remote-code {code.fingerprint} COMMAND" in said
    # Consent is to a code, not to a model's name.
    said = refused("--trust-remote-code", "0" * 32, *JOB)
    assert f"(you asked for {'0' * 32}, which is other code)" in said


@BREADTH
def test_asked_for_it_goes_all_the_way_and_is_never_run_else(workspace: Path, refused: Callable[..., str]) -> None:
    mark, code = workspace / "it-ran", model_code(workspace / "mine")
    assert code is not None
    said = call(workspace, "--trust-remote-code", code.fingerprint, *JOB)
    assert mark.exists()
    assert f"warning: Python files that a model brings will run if their fingerprint is {code.fingerprint}" in said
    assert "they can read and change your files, use your keys and reach the network" in said
    assert "running the model's own code: activation_mine.py, configuration_mine.py, modeling_mine.py" in said
    for made in ("dense", "pruned"):
        brought = model_code(workspace / "run" / made)
        assert brought is not None and brought.fingerprint == code.fingerprint
    card = (workspace / "run/pruned/README.md").read_text()
    assert "- custom_code\n" in card and "trust_remote_code=True" in card and "plain `transformers`" not in card

    # A run folder brings no consent of its own.
    mark.unlink()
    assert "trust_remote_code stays off" in refused("export", "run")
    call(
        workspace,
        python="from pathlib import Path; from trsp_deploy.stages.export import ExportSettings, export_onnx;"
        "export_onnx(Path('run/pruned'), 'fp32', ExportSettings(exporter='dynamo'), Path('onnx'))",
        trust=code.fingerprint,
    )
    graph = onnx.load(workspace / "onnx/model.onnx", load_external_data=False).graph
    assert "Relu" in {node.op_type for node in graph.node}, "the graph is not of the model's own code"
    brought = model_code(workspace / "onnx")
    assert brought is not None and brought.fingerprint == code.fingerprint

    # Consent is to that code, not to the model's name.
    mark.unlink()
    (workspace / "mine/activation_mine.py").write_text(CODE["activation_mine.py"] + "\nevil = True\n")
    said = refused("--trust-remote-code", code.fingerprint, *JOB)
    assert f"(you asked for {code.fingerprint}, which is other code)" in said
    (workspace / "mine/activation_mine.py").write_text(CODE["activation_mine.py"])


@BREADTH
def test_a_known_architecture_with_code_of_its_own(workspace: Path) -> None:
    folder = Path(shutil.copytree(workspace / "mine", workspace / "known", dirs_exist_ok=True))
    config = json.loads((folder / "config.json").read_text())
    only_model = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama", "auto_map": only_model}))
    (folder / "modeling_mine.py").write_text(
        re.sub(".*configuration_mine.*\n|.*config_class.*\n", "", CODE["modeling_mine.py"])
    )
    code = model_code(folder)
    assert code is not None and code.files == ("activation_mine.py", "modeling_mine.py")
    arguments = ("prune", "--model", "known", *RUN, "--out", "known-run", *SETTINGS)
    call(workspace, *arguments, trust=code.fingerprint)
    assert model_code(workspace / "known-run/pruned") is not None
    torch.save(tokens(), workspace / "tokens.pt")
    call(
        workspace,
        python="import torch; from transformers import AutoModelForCausalLM as M;"
        "m = M.from_pretrained('known-run/pruned', trust_remote_code=True); ids = torch.load('tokens.pt');"
        "torch.save(m(ids).logits.detach(), 'own.pt')",
    )
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(workspace / "known-run/pruned", trust_remote_code=False)(tokens())
    assert not torch.allclose(torch.load(workspace / "own.pt"), plain.logits), "the pruned model ran without its code"


@BREADTH
def test_code_that_fails_says_so_in_a_line(workspace: Path) -> None:
    folder = Path(shutil.copytree(workspace / "mine", workspace / "broken", dirs_exist_ok=True))
    (folder / "activation_mine.py").write_text("import no_such_package_of_mine\n")
    code = model_code(folder)
    assert code is not None
    said = call(workspace, "prune", "--model", "broken", *RUN, "--out", "r", code=1, trust=code.fingerprint)
    assert "the model's own code failed" in said and "no_such_package_of_mine" in said


@pytest.mark.parametrize("given", ["yes", "mine", "0" * 31, "0" * 64])
def test_consent_is_to_a_fingerprint(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--trust-remote-code", given, "recipes", "ls"]) == 1
    assert f"--trust-remote-code '{given}': expected the 32 hexadecimal digits" in capsys.readouterr().err


def test_code_of_another_repository_never_runs(workspace: Path, tmp_path: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "owner/name--modeling_mine.MineForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"names 'owner/name--modeling_mine\.MineForCausalLM'.* code from elsewhere never"
    ):
        model_code(tmp_path)
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"auto_map needs modeling_mine\.py, which cannot be read beside it"):
        model_code(tmp_path)


COUNTED = {
    "configuration_counted.py": """
from transformers import PretrainedConfig


class CountedConfig(PretrainedConfig):
    model_type = "counted"

    def __init__(self, num_layers=2, hidden_size=48, vocab_size=384, **others):
        self.num_layers, self.hidden_size, self.vocab_size = num_layers, hidden_size, vocab_size
        super().__init__(**others)
""",
    "modeling_counted.py": """
from torch import nn
from transformers import PreTrainedModel

from .configuration_counted import CountedConfig


class CountedForCausalLM(PreTrainedModel):
    config_class = CountedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(config.num_layers))
""",
}


@BREADTH
def test_layers_that_its_config_counts_by_another_name_are_one_line(workspace: Path) -> None:
    """As ChatGLM's: it was a traceback."""
    model = Path(shutil.copytree(workspace / "mine", workspace / "counted", ignore=shutil.ignore_patterns("*.py")))
    for name, text in COUNTED.items():
        (model / name).write_text(text)
    own = {"AutoConfig": "configuration_counted.CountedConfig"}
    own |= {"AutoModelForCausalLM": "modeling_counted.CountedForCausalLM"}
    config = {"model_type": "counted", "architectures": ["CountedForCausalLM"], "auto_map": own, "num_layers": 2}
    (model / "config.json").write_text(json.dumps(config))
    code = model_code(model)
    assert code is not None
    job = ["prune", "--model", "counted", *RUN, *SETTINGS]
    said = call(workspace, *job, code=1, trust=code.fingerprint).splitlines()[-1]
    assert said.startswith("error: counted/config.json: the model's own code has no `num_hidden_layers`, by"), said
