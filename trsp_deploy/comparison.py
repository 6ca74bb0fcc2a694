"""Two engines side by side, of runs or of none: how much faster one is, and what it costs in perplexity.

    found = compare_paths(Path("dense"), Path("pruned"), None, Asked(texts={"news": "news.jsonl"}))

Sits above the stages: perplexities first, then times, as a check of a run does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from trsp_deploy.artifacts import reading_alone
from trsp_deploy.decoder import load_tokenizer
from trsp_deploy.errors import EngineUnavailable, ModelError, RecipeError, RunError
from trsp_deploy.recipe import BenchSettings, EvaluateSettings, Positive, Strict
from trsp_deploy.results import ROLES, Comparison, Perplexity, Phase, Role
from trsp_deploy.stages import bench, evaluate, parity
from trsp_deploy.tools.judging.comparisons import ComparisonReport
from trsp_deploy.tools.judging.verdicts import Outcome, Word, worst
from trsp_deploy.tools.measuring.subjects import Subject
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.reports.quality import QualityReport, perplexity_outcomes, quality_report
from trsp_deploy.tools.reports.texts import TextReport, text_report
from trsp_deploy.tools.runners import Runner, open_engine
from trsp_deploy.tools.runners.inspection import has_tokenizer, tokenizer_folder
from trsp_deploy.tools.sources.texts import Texts, documents_of, load_texts
from trsp_deploy.tools.sources.windows import extent_of, known_windows


class Asked(Strict):
    """What is measured of two engines, and what is required of it."""

    min_speedup: dict[Phase, Positive] = Field(default_factory=dict)  # dense time / pruned time
    max_ppl_ratio: Positive | None = None  # pruned / dense perplexity, on every text
    texts: dict[str, str] = Field(default_factory=dict)  # by name, as a recipe's `evaluation`
    bench: BenchSettings = BenchSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    tokenizer: Path | None = None  # Hugging Face folder; None: the engines' own


class Samples(Comparison):
    """`compare --out`: a comparison's raw samples, and the losses that its perplexities are derived from."""

    perplexity: dict[str, dict[Role, Perplexity]] = Field(default_factory=dict)  # by text
    texts: tuple[TextReport, ...] = ()  # that were read


class _Read(NamedTuple):
    """A text as both engines read it."""

    ids: torch.Tensor  # (windows, length)
    documents: np.ndarray | None  # which one each token is of
    origin: str
    report: TextReport


@dataclass(frozen=True)
class Compared:
    """What was found of two engines."""

    label: str
    samples: Samples
    report: ComparisonReport
    quality: Mapping[str, QualityReport]  # by text
    outcomes: tuple[Outcome, ...]  # of what was required
    said: tuple[str, ...]  # what speaks against the two being a model and its cut

    @property
    def verdict(self) -> Word:
        """The worst of the outcomes; "pass" where nothing was required."""
        return worst(outcome.word for outcome in self.outcomes)


def compare_paths(
    dense: Path,
    pruned: Path | None,
    engine: str | None,
    asked: Asked,
    say: Callable[[str], None] = lambda line: None,
) -> Compared:
    """Read the texts with both engines, then time them in turn until what is required is decided.

    dense, pruned: run folders, engine folders or ONNX files; a run folder alone has both. engine: one of a run's.
    Raises RunError where there is nothing to compare or it cannot run here, RecipeError where more is asked for than
    the engines hold, TextError and ModelError for a text or tokenizer that cannot be used.
    """
    with reading_alone(dense, pruned or dense):
        pair = bench.find_pair(dense, pruned, engine)
        bench.check_pair(*pair, asked.bench)
        goals = bench.speedup_goals(*pair, asked.min_speedup, asked.bench)
        label = bench.label_of(*pair)
        texts = _read_texts(*pair, asked)  # first: a text that cannot be read is said before the long part
        losses = _perplexities(*pair, texts)
        comparison = bench.compare_engines(*pair, label, asked.bench, seed=0, goals=goals, say=say)
    quality = {name: quality_report(both["dense"], both["pruned"]) for name, both in losses.items()}
    outcomes = [goal.outcome(comparison.replicates, cases=comparison.settings.cases) for goal in goals]
    return Compared(
        label=label,
        samples=Samples(**dict(comparison), perplexity=losses, texts=tuple(text.report for text in texts.values())),
        report=bench.derive(*pair, comparison),
        quality=quality,
        outcomes=(*outcomes, *perplexity_outcomes(quality, asked.max_ppl_ratio, "--max-ppl-ratio")),
        said=tuple(bench.pair_notes(*pair)),
    )


def _read_texts(dense: Subject, pruned: Subject, asked: Asked) -> dict[str, _Read]:
    """The texts that were asked for, by name, as tokens that both know."""
    if not asked.texts:
        if asked.max_ppl_ratio is not None:
            raise RecipeError("compare: --max-ppl-ratio needs a text to read; give one with --eval NAME=TEXTS")
        return {}
    if asked.evaluate.tasks:
        raise RecipeError("compare: reads texts alone; tasks are asked of a run: `trsp-deploy check RUN --task T`")
    length = _context_length(dense, pruned, asked.evaluate)
    texts = {name: load_texts(text, "evaluation") for name, text in asked.texts.items()}
    with quiet_libraries():
        tokenizers = _tokenizers(dense, pruned, asked.tokenizer)
        vocabulary = min(dense.vocabulary, pruned.vocabulary)
        return {
            name: _read(name, text, tokenizers, vocabulary, length, asked.evaluate.max_tokens)
            for name, text in texts.items()
        }


def _perplexities(dense: Subject, pruned: Subject, texts: Mapping[str, _Read]) -> dict[str, dict[Role, Perplexity]]:
    """Losses of both on the same tokens, by text; one engine is open at a time."""
    found: dict[str, dict[Role, Perplexity]] = {name: {} for name in texts}
    subjects: dict[Role, Subject] = {"dense": dense, "pruned": pruned}
    for role in ROLES if texts else ():
        try:
            with _opened(subjects[role].path) as runner:
                for name, text in texts.items():
                    found[name][role] = evaluate.evaluate_engine(
                        runner, text.ids, name, role, text.origin, subjects[role].name, text.documents
                    )
        except EngineUnavailable as problem:
            raise RunError(str(problem)) from problem
    return found


def _opened(path: Path) -> Runner:
    return parity.open_graph(path) if path.is_file() else open_engine(path)


def _context_length(dense: Subject, pruned: Subject, settings: EvaluateSettings) -> int:
    """Tokens of a window: as many as were asked for, else as many as both engines read at once."""
    length = settings.context_length
    for subject in (dense, pruned):
        prompt = None if subject.spec is None else subject.spec.longest_prompt
        longest = min((each for each in (prompt, subject.positions) if each is not None), default=length)
        if longest < length and "context_length" in settings.model_fields_set:
            raise RecipeError(
                f"evaluate.context_length {length}: {subject.path} reads {longest} tokens at once; "
                f"--set evaluate.context_length={longest}"
            )
        length = min(length, longest)
    return length


def _tokenizers(dense: Subject, pruned: Subject, given: Path | None) -> dict[Path, Any]:
    """The tokenizers that a text is read with, by folder: the one given, or each engine's own. Raises ModelError."""
    folders = [given] if given is not None else [_tokenizer_of(subject) for subject in (dense, pruned)]
    there = {folder.resolve(): folder for folder in folders if folder is not None}
    if not there:
        raise ModelError(
            f"{dense.path} and {pruned.path}: neither has a tokenizer beside it; give its folder with --tokenizer"
        )
    return {folder: load_tokenizer(folder) for folder in there.values()}


def _tokenizer_of(subject: Subject) -> Path | None:
    """Folder of a subject's tokenizer: an engine's run has its model's, an ONNX file may lie beside it; else None."""
    if subject.spec is None:
        return subject.path.parent if has_tokenizer(subject.path.parent) else None
    try:
        return tokenizer_folder(subject.path)
    except ModelError:
        return None


def _read(
    name: str, text: Texts, tokenizers: Mapping[Path, Any], vocabulary: int, length: int, most: int | None
) -> _Read:
    """A text as windows of `length` tokens that both engines know; RunError where two tokenizers read it as different
    tokens, whose perplexities have nothing to do with each other."""
    limit = None if most is None else max(1, most // length)
    (first, tokenizer), *others = tokenizers.items()
    windows = known_windows(text, tokenizer, length, limit, f"--eval {name}", vocabulary)
    for folder, other in others:
        if not torch.equal(windows, known_windows(text, other, length, limit, f"--eval {name}", vocabulary)):
            raise RunError(
                f"--eval {name}: the tokenizers in {first} and {folder} read it as different tokens, so that "
                "perplexities a token cannot be compared; if one of them is right for both, give it with --tokenizer"
            )
    documents = documents_of(text, tokenizer, windows.numel())
    report = text_report(name, "evaluation", text, extent_of(windows, tokenizer))
    return _Read(windows, documents, text.origin, report)
