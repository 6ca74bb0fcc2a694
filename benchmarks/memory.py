"""What an export costs in memory, against plain Optimum, and what engines do: `make bench-memory`.

    python -m benchmarks.memory             # an OPT of 1.3B: 40 minutes on 2 cores, 20 GB of disk
    python -m benchmarks.memory --quick     # one of 125M, whose libraries weigh more than its weights; keeps nothing
    python -m benchmarks.memory --report    # the table and docs/memory.md from what is there

A random OPT-1.3B, stored in fp16 in several shards as the hub has it, made once. Every row is a fresh process: our
export alone, our export with the parity check after it, our export by torch's own exporter, builds of engines from our
export, and `optimum.exporters.onnx.main_export` with its defaults. A row's peak is its process's high-water mark, or
what it and its children hold together where that is more. Pages of mapped files count, although the system can take
them back; what is left without them stands beside it. A row that would not fit the machine is stopped and says so: its
peak is a lower bound, so it has no figure and meets nothing. Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import psutil

from benchmarks import targets
from benchmarks.code import code_digest
from benchmarks.kept import every_machine, judged, keep, results_path
from benchmarks.pages import markdown, put_between_markers
from benchmarks.targets import at_most
from trsp_deploy.artifacts import Provenance, provenance, writing
from trsp_deploy.errors import RunError, TrspError
from trsp_deploy.recipe import FLOAT_BYTES, ExportSettings, Float, Strict
from trsp_deploy.tools.host_memory import peak_resident_bytes, resident_bytes
from trsp_deploy.tools.prctl import end_with_parent
from trsp_deploy.tools.quiet import quiet_libraries

HOME = Path("runs/bench-memory")
PAGE = Path("docs/memory.md")
OURS = ("export", "export and parity", "export by torch")
JOBS = (*OURS, "optimum")
# Where the code of the rows begins, below trsp_deploy/; what it imports belongs to it.
CODE = ("stages/export.py", "stages/parity.py", "stages/build.py")
# By the precision of the graph that they are built from.
ENGINES: dict[Float, tuple[str, ...]] = {
    "fp32": ("ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int4"),
    "fp16": ("tensorrt-rtx-fp16",),
}
BUILD = "build "  # and the engine's name: a job
POLL_S = 0.02
MOST = 1.6  # times the weights in the export's precision
TARGETS = {f"{precision}_{job.replace(' ', '_')}": at_most(MOST) for job in OURS for precision in FLOAT_BYTES}
OPT_1B3 = {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
OPT_125M = {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
PROMPTS = (40, 23)  # tokens, as the pipeline's parity check has them


class Row(Strict):
    """One process's peak, in bytes."""

    job: str
    precision: Float
    peak_bytes: int
    anonymous_bytes: int  # its highest, without pages of files
    libraries_bytes: int  # what the process held before it began
    stopped: bool = False  # it had more than the machine should give: the peak is a lower bound
    failed: bool = False  # Optimum's, which cannot write every model above 2 GB: the peak is of what it did


class Memory(Strict):
    """Everything that was measured."""

    machine: Provenance
    code: str = ""  # digest of what was measured
    parameters: int
    rows: tuple[Row, ...]


def main() -> int:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--quick", action="store_true", help="a small model; keeps nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--limit-gb", type=float, help="stop a row here; default: 0.9 of what is free when it begins")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=get_args(Float), help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = HOME / ("quick" if options.quick else "opt-1.3b")
    if options.worker:
        end_with_parent()
        work(options.worker, options.precision, folder, folder / "out")
        return 0
    try:
        if options.report:
            found = judged(read(), lambda each: each.machine.cpu, met)
        else:
            found = measure(folder, options.quick, options.limit_gb)
        print(page(found))
        print(json.dumps(verdict(found)))
        if not options.report and not options.quick:  # after the table, which a full disk does not refuse
            keep(results_path("memory", found.machine.cpu), found)
        if not options.quick:
            put_between_markers(PAGE, "\n\n".join(map(page, read())), "memory")
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def measure(folder: Path, quick: bool, limit_gb: float | None) -> Memory:
    """Make the model where it is missing, and run every job."""
    from trsp_deploy.tools.resources.weights import counts_of

    config = make(folder / "model", quick)
    code = code_digest(*CODE)  # as it is now, not as it is when all is done
    rows = []

    def measured(job: str, precision: Float) -> None:
        limit = limit_gb * 1e9 if limit_gb else 0.9 * psutil.virtual_memory().available
        rows.append(run(job, precision, quick, round(limit)))
        print(f"{job} {precision}: {rows[-1].peak_bytes / 1e9:.2f} GB", file=sys.stderr)

    clear(folder)  # what a run that was stopped has left would be in the way of what is made, and be built from
    for job in JOBS:
        for precision in FLOAT_BYTES:
            measured(job, precision)
            if job == "export":
                shutil.move(folder / "out", folder / "graph")
                for engine in ENGINES[precision]:
                    measured(BUILD + engine, precision)
                    shutil.rmtree(folder / "out", ignore_errors=True)
            clear(folder)
    return Memory(machine=provenance(), code=code, parameters=counts_of(config).total, rows=tuple(rows))


def clear(folder: Path) -> None:
    """Delete what rows have made, if anything is there."""
    for made in ("out", "graph"):
        shutil.rmtree(folder / made, ignore_errors=True)


def make(folder: Path, quick: bool) -> object:
    """The random model's config, and its folder where it is missing."""
    import torch
    from transformers import AutoModelForCausalLM, OPTConfig

    sizes = OPT_125M if quick else OPT_1B3
    config = OPTConfig(**sizes, word_embed_proj_dim=sizes["hidden_size"])
    if not folder.is_dir():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        with writing(folder) as partial:
            model.save_pretrained(partial, max_shard_size="500MB")
    return config


def run(job: str, precision: Float, quick: bool, limit_bytes: int) -> Row:
    """One job in a fresh process that is watched from here; raises RunError when it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", "--worker", job, "--precision", precision]
    seen = watch([*command, *(["--quick"] if quick else [])], limit_bytes)
    failed = seen.code != 0 and not seen.stopped
    if failed and job != "optimum":
        raise RunError(f"{job} in {precision} ended with {seen.code}; what it said is above")
    own = {"peak_bytes": 0, "libraries_bytes": 0} if seen.stopped or failed else json.loads(seen.said.splitlines()[-1])
    return Row(
        job=job,
        precision=precision,
        peak_bytes=max(seen.peak_bytes, own["peak_bytes"]),
        anonymous_bytes=seen.anonymous_bytes,
        libraries_bytes=own["libraries_bytes"],
        stopped=seen.stopped,
        failed=failed,
    )


class Watched(NamedTuple):
    """What a process and its children held at most, and how it ended."""

    peak_bytes: int
    anonymous_bytes: int
    stopped: bool
    code: int
    said: str  # on stdout


def watch(command: Sequence[str], limit_bytes: int) -> Watched:
    """Run a command to its end, or until it and its children hold more than the limit; then all of them are killed."""
    peak = anonymous = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:  # a pipe would be full after 64 KB
        process = subprocess.Popen(command, stdout=said)
        tree = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                held, without_files = resident(tree)
                peak, anonymous = max(peak, held), max(anonymous, without_files)
                if held > limit_bytes:
                    kill(tree)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            kill(tree)
            process.wait()
        said.seek(0)
        return Watched(peak, anonymous, peak > limit_bytes, process.returncode, said.read())


def kill(process: psutil.Process) -> None:
    """Kill a process and its children."""
    for each in (process, *_children(process)):
        with contextlib.suppress(psutil.Error):  # it has ended
            each.kill()


def resident(process: psutil.Process) -> tuple[int, int]:
    """Bytes of a process and its children, and how many of them are not pages of files."""
    held = anonymous = 0
    for each in (process, *_children(process)):
        try:
            memory = each.memory_info()
        except psutil.Error:  # it has ended
            continue
        held, anonymous = held + memory.rss, anonymous + memory.rss - memory.shared
    return held, anonymous


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


# -- the jobs, each in a process of its own ----------------------------------------------------------------------------


def work(job: str, precision: Float, folder: Path, out: Path) -> None:
    """Do one job and print what the kernel says of this process."""
    model = folder / "model"
    if job == "optimum":
        from optimum.exporters.onnx import main_export

        before = resident_bytes()
        task = "text-generation-with-past"  # which it cannot tell of a folder
        main_export(str(model), output=out, task=task, dtype=precision, local_files_only=True)
    elif job.startswith(BUILD):
        from trsp_deploy.stages.build import build_engine
        from trsp_deploy.stages.export import FILE
        from trsp_deploy.tools.library import load_engine_spec

        before = resident_bytes()
        build_engine(folder / "graph" / FILE, load_engine_spec(job.removeprefix(BUILD)), out)
    else:
        from trsp_deploy.stages.export import FILE, export_onnx

        with quiet_libraries():
            import optimum.exporters.onnx  # noqa: F401

            before = resident_bytes()
            settings = ExportSettings(exporter="dynamo" if job == "export by torch" else "auto")
            export_onnx(model, precision, settings, out)
            if job == "export and parity":
                compare(model, precision, out / FILE)
    print(json.dumps({"peak_bytes": peak_resident_bytes(), "libraries_bytes": before}))


def compare(model: Path, precision: Float, graph: Path) -> None:
    """The pipeline's parity check, on random tokens."""
    import numpy as np

    from trsp_deploy.stages.parity import check_parity, make_reference, open_graph

    tokens = np.random.default_rng(0).integers(5, 50_000, sum(PROMPTS)).tolist()
    reference = make_reference(model, [tokens[: PROMPTS[0]], tokens[PROMPTS[0] :]])
    with open_graph(graph) as runner:
        check_parity(reference, runner, "onnx", "dense", precision)


# -- the report --------------------------------------------------------------------------------------------------------


def figures(found: Memory) -> dict[str, float | None]:
    """Peaks over the weights in the export's precision, of the rows that have a target; None where it was stopped."""
    rows = {f"{row.precision}_{row.job.replace(' ', '_')}": row for row in found.rows if not row.stopped}
    return {name: ratio(found, rows[name]) if name in rows else None for name in TARGETS}


def ratio(found: Memory, row: Row) -> float:
    """Peak over weights."""
    return row.peak_bytes / (found.parameters * FLOAT_BYTES[row.precision])


def met(found: Memory) -> dict[str, bool]:
    """Which targets are met; what was not measured to its end is not."""
    return targets.met(TARGETS, figures(found))


def verdict(found: Memory) -> dict[str, object]:
    """The JSON line."""
    return targets.verdict("memory", TARGETS, figures(found), machine=found.machine.cpu)


def page(found: Memory) -> str:
    """Markdown: every row, and what it was measured on."""
    body = []
    for row in found.rows:
        more = "more than " if row.stopped else "failed after " if row.failed else ""
        state = "stopped, **not met**" if row.stopped else "met" if ratio(found, row) <= MOST else "**not met**"
        cells = (f"{row.peak_bytes / 1e9:.2f}", f"{row.anonymous_bytes / 1e9:.2f}", f"{ratio(found, row):.2f}")
        name = "plain Optimum" if row.job == "optimum" else row.job.replace(BUILD, "engine ")
        weights = f"{found.parameters * FLOAT_BYTES[row.precision] / 1e9:.2f}"
        target = (f"at most {MOST:g}", state) if row.job in OURS else ("", "")
        body.append((name, row.precision, weights, *(more + cell for cell in cells), *target))
    libraries = max(row.libraries_bytes for row in found.rows)
    packages = found.machine.packages
    earlier = "" if found.code == code_digest(*CODE) else ", measured of earlier code"
    return "\n\n".join(
        [
            f"{found.machine.cpu}, torch {packages.get('torch', '?')}, onnxruntime {packages.get('onnxruntime', '?')}"
            f"{earlier}; a random OPT of {found.parameters / 1e9:.2f}B parameters, stored in fp16. GB are 1e9 bytes; "
            f"each process held up to {libraries / 1e9:.2f} of them, its libraries, before it began.",
            markdown(
                (
                    "job",
                    "precision",
                    "weights, GB",
                    "peak RSS, GB",
                    "without files, GB",
                    "peak / weights",
                    "target",
                    "",
                ),
                body,
            ),
        ]
    )


def read() -> list[Memory]:
    """What is there, by machine; raises RunError when there is nothing."""
    return [each for (each,) in every_machine("memory", Memory)]


if __name__ == "__main__":
    sys.exit(main())
