"""Stage 2 against Hugging Face's Trainer: the same model, windows and order, batch, precision and frozen embeddings.

    python -m benchmarks.train --model smollm2-135m
    python -m benchmarks.train --quick --clock cpu      # on a busy machine: processor time instead of the clock's
    python -m benchmarks.train --report                 # the table and docs/memory.md from what is there

Each block is a fresh process that trains `--steps` steps after two warm-up steps; blocks of the two alternate (ABBA),
so that drift of the machine hits both. Stage 2 runs its `anneal` form with every layer still there, and the 25% of them
that would go are annealed all the while; the LM loss alone, as Trainer has it. Beside it, and not judged, the same with
the loss of the recipes, of which the dense model is the teacher. A ratio is of the median steps of two blocks of a
pair, its interval over pairs; memory is the peak of the training alone, on a GPU what torch allocated, on a CPU the
resident set.

Both see one GPU, for with several Trainer would share each batch out among them. Prints a table and ends with one JSON
line. Raw samples go to benchmarks/results/train-<cpu or cuda>-<processor>.json, unless options decide that are not the
defaults: of those there is the table alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import targets
from benchmarks.code import code_digest
from benchmarks.kept import every_machine, judged, keep, results_path
from benchmarks.pages import markdown, put_between_markers
from benchmarks.targets import at_least, at_most
from trsp_deploy.artifacts import Provenance, provenance
from trsp_deploy.errors import RunError, TrspError
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.host_memory import forget_peak, peak_resident_bytes
from trsp_deploy.tools.judging.statistics import Ratio, interval
from trsp_deploy.tools.prctl import end_with_parent

TARGETS = {
    "speed_ratio": at_least(1.0, "tokens/s of stage 2 over Trainer's"),
    "memory_ratio": at_most(0.8, "peak memory of stage 2 over Trainer's"),
}
PAGE = Path("docs/memory.md")
WARMUP_STEPS = 2
OURS, TAUGHT, THEIRS = ENGINES = ("stage 2", "stage 2 with teacher", "Trainer")
JUDGED = (OURS, THEIRS)
# Where the code of stage 2 begins, below trsp_deploy/; what it imports belongs to it, but for what decides no step.
CODE = ("stages/transfer.py", "tools/training/forms.py", "tools/training/heap.py")
NO_INFLUENCE = frozenset({"__init__", "artifacts", "errors", "progress"})
Clock = Literal["wall", "cpu"]


class Options(Strict):
    """What decides samples; both clocks are in each, and --quick is another number of steps."""

    model: str
    texts: str
    batch_size: int
    context: int  # tokens a window
    steps: int  # measured, a block
    pairs: int


class Block(Strict):
    """What one process measured."""

    device: Literal["cpu", "cuda"]
    wall_s: tuple[float, ...]  # a step
    cpu_s: tuple[float, ...]
    peak_bytes: int
    mean_loss: float  # of all steps, warm-up included
    layers: int | None = None  # that stage 2 computed

    def step_s(self, clock: Clock) -> float:
        """The median step."""
        return statistics.median(self.wall_s if clock == "wall" else self.cpu_s)


class Training(Strict):
    """Everything that was measured: blocks by engine, in the order of the pairs."""

    machine: Provenance
    code: str  # digest of what was measured
    omp_num_threads: str | None
    options: Options
    blocks: dict[str, tuple[Block, ...]]

    @property
    def processor(self) -> str:
        """Name of the GPU or the CPU that it ran on."""
        return self.machine.gpus[0] if self.device == "cuda" else self.machine.cpu

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return self.blocks[OURS][0].device


def main() -> int:
    """Measure blocks in turn and report; the table before the samples are kept, which a full disk may refuse."""
    options = parse(sys.argv[1:])
    try:
        if options.worker:
            end_with_parent()
            print(WORKERS[options.worker](options).model_dump_json())
            return 0
        found = judged(read(), lambda each: each.processor, met) if options.report else measure(options)
        print(page(found, options.clock))
        print(json.dumps(verdict(found, options.clock)))
        if not options.report:
            if found.options != decisive(parse([])):
                print("not kept: options other than the defaults", file=sys.stderr)
                return 0
            keep(results_path(f"train-{found.device}", found.processor), found)
        put_between_markers(PAGE, "\n\n".join(map(page, read())), "train")
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def measure(options: argparse.Namespace) -> Training:
    """Every block."""
    code = code_digest(*CODE, without=NO_INFLUENCE)  # as it is now, not as it is when all is done
    blocks: dict[str, list[Block]] = {engine: [] for engine in ENGINES}
    for pair in range(options.pairs):
        for engine in ENGINES if pair % 2 == 0 else reversed(ENGINES):
            blocks[engine].append(block(engine, sys.argv[1:]))
            taken = blocks[engine][-1]
            print(
                f"pair {pair + 1} of {options.pairs}, {engine}: {taken.step_s(options.clock):.2f} s a step, "
                f"peak {taken.peak_bytes / 1e9:.2f} GB",
                file=sys.stderr,
            )
    return Training(
        machine=machine(),
        code=code,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        options=decisive(options),
        blocks={engine: tuple(taken) for engine, taken in blocks.items()},
    )


def decisive(options: argparse.Namespace) -> Options:
    """Those of the options that decide samples."""
    return Options(**{name: getattr(options, name) for name in Options.model_fields})


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; what a worker needs of them is handed on to it."""
    parser = argparse.ArgumentParser(prog="train", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m", help="a folder or a short name")
    parser.add_argument("--texts", default="exl-wiki", help="as --calibration of trsp-deploy")
    parser.add_argument("--batch-size", type=count, default=4)
    parser.add_argument("--context", type=count, default=256, help="tokens a window")
    parser.add_argument("--steps", type=count, default=8, help="measured steps a block")
    parser.add_argument("--pairs", type=count, default=5, help="blocks of each of the two")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--quick", action="store_true", help="3 steps, 1 pair: shows that it works")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.pairs = 3, 1
    return options


def count(text: str) -> int:
    """For argparse, which names this function in what it says of another text: 1 at least."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def block(engine: str, arguments: list[str]) -> Block:
    """One block in a fresh process that sees one GPU; raises RunError when it fails."""
    command = [sys.executable, "-m", "benchmarks.train", *arguments, "--worker", engine]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=one_gpu(os.environ))
    if done.returncode:
        raise RunError(f"{engine}: its process ended with {done.returncode}; what it said is above")
    return Block.model_validate_json(done.stdout.splitlines()[-1])


def one_gpu(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose only visible GPU is the first of those that were."""
    return {**environment, "CUDA_VISIBLE_DEVICES": environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def machine() -> Provenance:
    """What the numbers were measured on."""
    import torch  # noqa: F401  # without it provenance knows of no GPU

    return provenance()


# -- the report --------------------------------------------------------------------------------------------------------


def ratios(found: Training, clock: Clock = "wall") -> dict[str, Ratio]:
    """Stage 2 over Trainer: of tokens a second, and of peak memory."""
    ours, theirs = (found.blocks[engine] for engine in JUDGED)
    return {
        "speed_ratio": over(theirs, ours, lambda taken: taken.step_s(clock)),
        "memory_ratio": over(ours, theirs, lambda taken: taken.peak_bytes),
    }


def over(above: Sequence[Block], below: Sequence[Block], value: Callable[[Block], float]) -> Ratio:
    """A ratio over pairs with its 95% interval; one pair has none."""
    logs = [math.log(value(one) / value(other)) for one, other in zip(above, below, strict=True)]
    if len(logs) == 1:
        return Ratio(ratio=math.exp(logs[0]), low=0.0, high=math.inf)
    return interval(logs)


def figures(found: Training, clock: Clock = "wall") -> dict[str, float | None]:
    """The ratios alone."""
    return {name: ratio.ratio for name, ratio in ratios(found, clock).items()}


def met(found: Training) -> dict[str, bool]:
    """Which targets are met."""
    return targets.met(TARGETS, figures(found))


def verdict(found: Training, clock: Clock = "wall") -> dict[str, Any]:
    """The line for scripts: figures, targets and whether they are met, under the same keys."""
    return targets.verdict("train", TARGETS, figures(found, clock), machine=found.processor)


def page(found: Training, clock: Clock = "wall") -> str:
    """Markdown: what was measured, on what, and the targets."""
    options, packages = found.options, found.machine.packages
    tokens = options.batch_size * options.context
    body = []
    for engine, blocks in found.blocks.items():
        step_s = statistics.median(taken.step_s(clock) for taken in blocks)
        peak = statistics.median(taken.peak_bytes for taken in blocks)
        body.append((engine, f"{tokens / step_s:.1f}", f"{step_s:.2f}", f"{peak / 1e9:.2f}"))
    cells = {name: ratio.text(".3f", "") for name, ratio in ratios(found, clock).items() if ratio.high < math.inf}
    earlier = "" if found.code == code_digest(*CODE, without=NO_INFLUENCE) else ", measured of earlier code"
    processor_time = ", processor time in place of the clock's" if clock == "cpu" else ""
    return "\n\n".join(
        [
            f"**{found.processor}**, {found.machine.cores} cores, torch {packages.get('torch', '?')}, transformers "
            f"{packages.get('transformers', '?')}{earlier}; {options.model} on {options.texts}, steps of "
            f"{options.batch_size} windows of {options.context} tokens, {options.pairs} "
            f"pair{'s' * (options.pairs > 1)} of blocks of {options.steps} steps in turn, medians{processor_time}.",
            markdown(("", "tokens/s", "step, s", "peak, GB"), body),
            targets.table(TARGETS, figures(found, clock), cells=cells),
        ]
    )


def read() -> list[Training]:
    """What is there, by machine; raises RunError when there is nothing."""
    return [each for (each,) in every_machine("train", Training)]


# -- the two workers --------------------------------------------------------------------------------------------------


class Job:
    """What both train: the model's folder, windows in the order of the batches, and the stopwatch."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from trsp_deploy.decoder import load_tokenizer
        from trsp_deploy.recipe import read_recipe
        from trsp_deploy.tools.sources.models import resolve_model
        from trsp_deploy.tools.sources.texts import load_texts, tokenize_windows
        from trsp_deploy.tools.training.shared import pick_device

        self.folder = Path(resolve_model(options.model, lambda _: None).path)
        self.steps = options.steps + WARMUP_STEPS
        transfer = {"form": "anneal", "anneal_share": 1.0, "steps": self.steps, "batch_size": options.batch_size}
        if options.worker in JUDGED:
            transfer |= {"ce_weight": 1.0, "kl_weight": 0.0}
        self.recipe = read_recipe({"model": options.model, "transfer": transfer}, "bench-train")
        self.device = pick_device(self.recipe)
        texts, tokenizer = load_texts(options.texts, "calibration"), load_tokenizer(self.folder)
        count = self.steps * options.batch_size
        self.windows = tokenize_windows(texts, tokenizer, options.context, count)
        self._marks: list[tuple[float, float]] = []
        self._torch = torch

    def mark(self) -> None:
        """The beginning of a step, or the end of the last one."""
        if self.device == "cuda":
            self._torch.cuda.synchronize()
        self._marks.append((time.perf_counter(), time.process_time()))

    def reset_peak(self) -> None:
        """Forget the peak of what loading took."""
        if self.device == "cuda":
            self._torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()

    def taken(self, mean_loss: float, layers: int | None = None) -> Block:
        """The block's raw samples; the loss is the mean over all steps, warm-up included."""
        pairs = list(itertools.pairwise(self._marks))[WARMUP_STEPS:]
        on_gpu = self.device == "cuda"
        peak_bytes = self._torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()
        if peak_bytes is None:
            raise RunError("this system does not say how much memory a process had at most")
        return Block(
            device="cuda" if on_gpu else "cpu",
            wall_s=tuple(end[0] - start[0] for start, end in pairs),
            cpu_s=tuple(end[1] - start[1] for start, end in pairs),
            peak_bytes=peak_bytes,
            mean_loss=mean_loss,
            layers=layers,
        )


def stage_2(options: argparse.Namespace) -> Block:
    """Stage 2 with every layer computed at every step."""
    from trsp_deploy.decoder import decoder_layers, load_model
    from trsp_deploy.stages.transfer import Training
    from trsp_deploy.tools.gates import LayerGates
    from trsp_deploy.tools.training.forms import Anneal
    from trsp_deploy.tools.training.heap import kept_heap
    from trsp_deploy.tools.training.losses import TokenLosses
    from trsp_deploy.tools.training.parameters import choose_trained, recomputed_layers
    from trsp_deploy.tools.training.processes import Processes
    from trsp_deploy.tools.training.shared import TRAINING_DTYPES

    job = Job(options)

    class Timed(Anneal):
        def before_step(self, step: int) -> None:
            job.mark()
            super().before_step(step)

    model = load_model(job.folder, job.device, TRAINING_DTYPES[job.recipe.weights])
    choose_trained(model, job.recipe.transfer)
    processes = Processes(job.device)
    settings = job.recipe.transfer
    losses = TokenLosses(model, settings.ce_weight, settings.kl_weight)
    training = Training(losses, job.windows, job.recipe, processes, None)
    job.reset_peak()
    with (
        kept_heap(),
        recomputed_layers(model, job.recipe.transfer.gradient_checkpointing),
        LayerGates(model, "branch") as gates,
    ):
        dropped = range(len(gates.open) // 2, len(gates.open) // 2 + len(gates.open) // 4)
        training.run(Timed(model, gates, dropped, job.recipe.transfer, processes))
        job.mark()
    return job.taken(statistics.fmean(training.lm_losses), len(decoder_layers(model)))


def trainer(options: argparse.Namespace) -> Block:
    """Trainer on the same batches in the same order, with its own defaults where stage 2 does not decide."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from trsp_deploy.decoder import load_model
    from trsp_deploy.tools.training.parameters import choose_trained
    from trsp_deploy.tools.training.shared import TRAINING_DTYPES, batches, has_fast_bf16

    job = Job(options)
    settings = job.recipe.transfer

    class InOrder(Trainer):  # type: ignore[misc]  # transformers does not type it
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            job.mark()

    model = load_model(job.folder, job.device, TRAINING_DTYPES[job.recipe.weights])
    choose_trained(model, settings)
    order = itertools.islice(batches(job.windows, settings.batch_size, job.recipe.seed), job.steps)
    rows = [{"input_ids": window, "labels": window} for batch in order for window in batch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            max_steps=job.steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_ratio=settings.warmup_share,
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=has_fast_bf16(job.device),
            use_cpu=job.device == "cpu",
            report_to=[],
            save_strategy="no",
            logging_steps=job.steps,
            disable_tqdm=True,
            dataloader_pin_memory=job.device == "cuda",
        )
        run = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Timed()])
        job.reset_peak()
        found = run.train()
        job.mark()
    return job.taken(found.training_loss)


WORKERS = {OURS: stage_2, TAUGHT: stage_2, THEIRS: trainer}

if __name__ == "__main__":
    sys.exit(main())
