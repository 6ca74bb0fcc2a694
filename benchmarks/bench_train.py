"""Stage 2 against Hugging Face's Trainer: the same model, windows and order, batch, precision and frozen embeddings.

    python -m benchmarks.bench_train --model smollm2-135m
    python -m benchmarks.bench_train --quick --clock cpu      # on a busy machine: processor time instead of the clock's

Each block is a fresh process that trains `--steps` steps after two warm-up steps; blocks of the two alternate (ABBA),
so that drift of the machine hits both. Stage 2 runs its `anneal` form with every layer still there, and the 25% of them
that would go are annealed all the while; the LM loss alone, as Trainer has it. Beside it, and not judged, the same with
the loss of the recipes, of which the dense model is the teacher. Tokens a second are of the steps' median; memory is
the peak of the training alone, on a GPU what torch allocated, on a CPU the resident set.

Both see one GPU, for with several Trainer would share each batch out among them. Prints a table and ends with one JSON
line. Raw samples go to benchmarks/results/train-<cpu or cuda>-<processor>.json, unless options decide that are not the
defaults: of those there is the table alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.kept import results_path
from benchmarks.targets import at_least, at_most
from trsp_deploy.artifacts import provenance, writing
from trsp_deploy.errors import RunError, TrspError
from trsp_deploy.tools.host_memory import forget_peak, peak_resident_bytes
from trsp_deploy.tools.prctl import end_with_parent

TARGETS = {"speed_ratio": at_least(1.0), "memory_ratio": at_most(0.8)}
WARMUP_STEPS = 2
JUDGED = ("stage 2", "Trainer")
ENGINES = ("stage 2", "stage 2 with teacher", "Trainer")


def main() -> int:
    """Measure blocks in turn and report."""
    options = parse(sys.argv[1:])
    try:
        if options.worker:
            end_with_parent()
            print(json.dumps(WORKERS[options.worker](options)))
        else:
            measure(options)
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def measure(options: argparse.Namespace) -> None:
    """Every block; the table before the samples are kept, which a full disk may refuse."""
    samples: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for pair in range(options.pairs):
        for engine in ENGINES if pair % 2 == 0 else reversed(ENGINES):
            samples[engine].append(block(engine, sys.argv[1:]))
            print(f"{engine}: {row(samples[engine][-1:], options)}", file=sys.stderr)
    for engine in ENGINES:
        print(f"{engine:20}  {row(samples[engine], options)}")
    print(json.dumps(verdict(samples, options)))
    if decisive(options) == decisive(parse([])):
        keep(samples, options)
    else:
        print("not kept: options other than the defaults", file=sys.stderr)


def keep(samples: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Write the raw samples down, with what they were measured on."""
    device, here = samples[ENGINES[0]][0]["device"], machine()
    processor = here["gpus"][0] if device == "cuda" else here["cpu"]
    raw = {"options": decisive(options), "machine": here, "samples": samples}
    with writing(results_path(f"train-{device}", processor)) as partial:
        partial.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def decisive(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide samples; both clocks are in each, and --quick is another number of steps."""
    return {name: value for name, value in vars(options).items() if name not in ("clock", "quick", "worker")}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; what a worker needs of them is handed on to it."""
    parser = argparse.ArgumentParser(prog="bench_train", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m", help="a folder or a short name")
    parser.add_argument("--texts", default="exl-wiki", help="as --calibration of trsp-deploy")
    parser.add_argument("--batch-size", type=count, default=4)
    parser.add_argument("--context", type=count, default=256, help="tokens a window")
    parser.add_argument("--steps", type=count, default=12, help="measured steps a block")
    parser.add_argument("--pairs", type=count, default=4, help="blocks of each of the two")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--quick", action="store_true", help="3 steps, 1 pair: shows that it works")
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


def block(engine: str, arguments: list[str]) -> dict[str, Any]:
    """One block in a fresh process that sees one GPU; raises RunError when it fails."""
    command = [sys.executable, "-m", "benchmarks.bench_train", *arguments, "--worker", engine]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=one_gpu(os.environ))
    if done.returncode:
        raise RunError(f"{engine}: its process ended with {done.returncode}; what it said is above")
    sample: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return sample


def one_gpu(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose only visible GPU is the first of those that were."""
    return {**environment, "CUDA_VISIBLE_DEVICES": environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def tokens_per_s(samples: list[dict[str, Any]], options: argparse.Namespace) -> float:
    """Of the median step of all blocks."""
    steps = [step for sample in samples for step in sample[f"{options.clock}_s"]]
    return float(options.batch_size * options.context / statistics.median(steps))


def peak_bytes(samples: list[dict[str, Any]]) -> float:
    """Median over blocks."""
    return float(statistics.median(sample["peak_bytes"] for sample in samples))


def row(samples: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """One line of the table."""
    speed, memory = tokens_per_s(samples, options), peak_bytes(samples)
    return f"{speed:8.1f} tokens/s   peak {memory / 1e9:.2f} GB   mean loss {samples[-1]['mean_loss']:.3f}"


def verdict(samples: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """The line for scripts: figures, targets and whether they are met, under the same keys."""
    ours, theirs = (samples[engine] for engine in JUDGED)
    figures = {
        "speed_ratio": tokens_per_s(ours, options) / tokens_per_s(theirs, options),
        "memory_ratio": peak_bytes(ours) / peak_bytes(theirs),
    }
    return targets.verdict("train", TARGETS, figures)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch  # noqa: F401  # without it provenance knows of no GPU

    return {**provenance().model_dump(mode="json"), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}


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
        self.recipe = read_recipe({"model": options.model, "transfer": transfer}, "bench_train")
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

    def sample(self, mean_loss: float) -> dict[str, Any]:
        """The block's raw samples; the loss is the mean over all steps, warm-up included."""
        pairs = list(itertools.pairwise(self._marks))[WARMUP_STEPS:]
        return {
            "device": self.device,
            "wall_s": [end[0] - start[0] for start, end in pairs],
            "cpu_s": [end[1] - start[1] for start, end in pairs],
            "peak_bytes": self._torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_resident_bytes(),
            "mean_loss": mean_loss,
        }


def stage_2(options: argparse.Namespace) -> dict[str, Any]:
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
    return job.sample(statistics.fmean(training.lm_losses)) | {"layers": len(decoder_layers(model))}


def trainer(options: argparse.Namespace) -> dict[str, Any]:
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
    return job.sample(found.training_loss)


WORKERS = {"stage 2": stage_2, "stage 2 with teacher": stage_2, "Trainer": trainer}

if __name__ == "__main__":
    sys.exit(main())
