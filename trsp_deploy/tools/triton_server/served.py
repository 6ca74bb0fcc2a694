"""What a server under load showed: rates and waits of each model, and how much quicker the pruned one is served.

Terms are those of the field's load generators (AIPerf, GenAI-Perf): time to first token; inter-token latency, which is
a request's time after its first answer over the tokens that came after it; request latency, to the last token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from trsp_deploy.artifacts import ENGINE_MANIFEST, RunLayout, fingerprint
from trsp_deploy.recipe import Strict
from trsp_deploy.results import ROLES, Role, Served, ServedRequest, ServedWindow, Subject
from trsp_deploy.tools.judging.comparisons import TAIL_SAMPLES
from trsp_deploy.tools.judging.statistics import Speedup, widened
from trsp_deploy.tools.judging.verdicts import Claim, claim

Metric = Literal["throughput", "first", "inter_token", "request"]
METRIC_TITLES: dict[Metric, str] = {
    "throughput": "throughput",
    "first": "time to first token",
    "inter_token": "inter-token latency",
    "request": "request latency",
}
SUBJECTS: tuple[Subject, ...] = ("dense", "again", "pruned")
TAILS = {"p90": 90, "p95": 95, "p99": 99}
PERCENTILES = {"p50": 50, **TAILS}
# Requests that each needs, as many beyond a tail as `compare` asks for: of fewer it would be one of the slowest few.
FEWEST = {"p50": 1, **{name: 100 * TAIL_SAMPLES // (100 - percent) for name, percent in TAILS.items()}}


class ServedFigures(Strict):
    """One model at one concurrency."""

    requests: int
    tokens_per_s: float  # new ones, of all requests together
    first_s: dict[str, float]  # by PERCENTILES; without those that have fewer requests than FEWEST
    inter_token_s: dict[str, float]
    request_s: dict[str, float]


class ServedLevel(Strict):
    """One concurrency."""

    concurrency: int
    figures: dict[Role, ServedFigures]
    speedup: dict[Metric, Speedup]  # empty where one model alone was served


class ServedReport(Strict):
    """A server under load."""

    engine: str
    server: str
    load_generator: str
    prompt_tokens: int
    new_tokens: int
    replicates: int
    fresh: bool  # whether the server was started anew for each replicate
    elapsed_s: float
    levels: tuple[ServedLevel, ...]

    @property
    def roles(self) -> list[Role]:
        """The models that were served: both, or one alone."""
        return [role for role in ROLES if any(role in level.figures for level in self.levels)]


def derive(served: Served) -> ServedReport:
    """Figures and ratios of the raw samples; raises ValueError when a level has fewer than two replicates."""
    replicates = max(window.replicate for window in served.windows) + 1
    return ServedReport(
        engine=served.engine,
        server=served.server,
        load_generator=served.load_generator,
        prompt_tokens=served.prompt_tokens,
        new_tokens=served.new_tokens,
        replicates=replicates,
        fresh=served.fresh,
        elapsed_s=served.elapsed_s,
        levels=tuple(_level(served, concurrency) for concurrency in served.concurrencies),
    )


def of_another_engine(engine: str, engines: Mapping[Role, str], run: RunLayout) -> Role | None:
    """The first role whose engine in a run is not the one that is served; engines: SHA-256 of their manifests."""
    for role, sha256 in engines.items():
        manifest = run.engine(engine, role) / ENGINE_MANIFEST
        if not manifest.is_file() or fingerprint(manifest) != sha256:
            return role
    return None


def _level(served: Served, concurrency: int) -> ServedLevel:
    windows = [window for window in served.windows if window.concurrency == concurrency]
    by_subject: dict[Subject, list[ServedWindow]] = {}
    for window in sorted(windows, key=lambda window: window.replicate):
        by_subject.setdefault(window.subject, []).append(window)
    speedup: dict[Metric, Speedup] = {}
    if "again" in by_subject:
        for metric, value in METRICS.items():
            logs = _logs(by_subject, value)
            if logs is not None:
                dense, again, pruned = logs
                speedup[metric] = widened(list((dense + again) / 2 - pruned), list(again - dense))
    return ServedLevel(
        concurrency=concurrency,
        figures={role: _figures(by_subject[role]) for role in ROLES if role in by_subject},
        speedup=speedup,
    )


def _logs(
    windows: dict[Subject, list[ServedWindow]], value: Callable[[ServedWindow], float | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Logs of a metric for dense, dense again and pruned, one per replicate; None where a window has no value."""
    found = [[value(window) for window in windows[subject]] for subject in SUBJECTS]
    if any(each is None for values in found for each in values):
        return None
    dense, again, pruned = np.log(np.array(found, dtype=float))
    return dense, again, pruned


def _figures(windows: Sequence[ServedWindow]) -> ServedFigures:
    requests = [request for window in windows for request in window.requests]
    return ServedFigures(
        requests=len(requests),
        tokens_per_s=float(np.median([tokens_per_s(window) for window in windows])),
        first_s=_percentiles([first_s(request) for request in requests]),
        inter_token_s=_percentiles([inter_token_s(request) for request in requests]),
        request_s=_percentiles([request.answered_s[-1] for request in requests]),
    )


def _percentiles(values: Iterable[float | None]) -> dict[str, float]:
    """PERCENTILES of the values that are there, as far as there are FEWEST of them."""
    found = [value for value in values if value is not None]
    enough = {name: percent for name, percent in PERCENTILES.items() if len(found) >= FEWEST[name]}
    return {name: float(np.percentile(found, percent)) for name, percent in enough.items()}


def first_s(request: ServedRequest) -> float:
    """Seconds to the first text: a first token that is half a character waits for the second."""
    return request.answered_s[0]


def inter_token_s(request: ServedRequest) -> float | None:
    """Mean seconds of a token after the first answer; None where there was one answer alone."""
    tokens = request.tokens[-1] - request.tokens[0]
    return (request.answered_s[-1] - request.answered_s[0]) / tokens if tokens else None


def tokens_per_s(window: ServedWindow) -> float:
    """New tokens per second of all requests: Little's law (Operations Research 9, 1961), requests in the air over the
    mean time of one.

    Counting the tokens of a window instead would lose those of requests that its end cuts off.
    """
    latency = np.mean([request.answered_s[-1] for request in window.requests])
    return float(window.concurrency * window.requests[0].tokens[-1] / latency)


def _typical(value: Callable[[ServedRequest], float | None]) -> Callable[[ServedWindow], float | None]:
    return lambda window: _percentiles(value(request) for request in window.requests).get("p50")


# Each in seconds, so that dense over pruned is how much quicker the pruned model is served.
METRICS: dict[Metric, Callable[[ServedWindow], float | None]] = {
    "throughput": lambda window: 1 / tokens_per_s(window),
    "first": _typical(first_s),
    "inter_token": _typical(inter_token_s),
    "request": _typical(lambda request: request.answered_s[-1]),
}

SERVED_COLUMNS = ("concurrency", "metric", "dense", "pruned", "served speed-up (95%)", "control")


def served_rows(found: ServedReport) -> list[tuple[str, ...]]:
    """The requests of each concurrency, then each metric and its tail, a row each in the order of SERVED_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for level in found.levels:
        at_once, figures = str(level.concurrency), [level.figures.get(role) for role in ROLES]
        rows.append((at_once, "requests", *(str(each.requests) if each else "" for each in figures), "", ""))
        for metric, title in METRIC_TITLES.items():
            cells = [_cell(each, metric, "p50") if each else "" for each in figures]
            ratio = level.speedup.get(metric)
            shown = [each.text() if each else "" for each in ((ratio.found, ratio.control) if ratio else (None, None))]
            rows.append((at_once, title, *cells, *shown))
            if metric != "throughput":
                rows += [(at_once, f"{title}, {tail}", *cells, "", "") for tail, cells in _tails(figures, metric)]
    return rows


def _tails(figures: Sequence[ServedFigures | None], metric: Metric) -> list[tuple[str, list[str]]]:
    """Each percentile beyond the median that a model has, and the cells of all; blank where one has not."""
    rows = [(name, [_cell(each, metric, name) if each else "" for each in figures]) for name in TAILS]
    return [(name, cells) for name, cells in rows if any(cells)]


def served_claim(found: ServedReport) -> Claim | None:
    """What the throughputs of all levels say together; None where one model alone was served."""
    speedups = [level.speedup["throughput"] for level in found.levels if "throughput" in level.speedup]
    return claim(speedups, found.replicates) if len(speedups) == len(found.levels) else None


def served_sentence(found: ServedReport) -> str:
    """The verdict on serving, for people."""
    said = served_claim(found)
    if said is None:
        return f"Served on {found.engine}: one model alone, so nothing is compared."
    parts = [f"{level.speedup['throughput'].found.text()} at {level.concurrency} at once" for level in found.levels]
    return f"{said} as served on {found.engine}: throughput {', '.join(parts)}."


def served_notes(found: ServedReport) -> list[str]:
    """How serving was measured, one line each."""
    server = "a fresh server" if found.fresh else "the same server, whose luck with its memory is in the figures,"
    turns = "dense, dense again and pruned in turn" if len(found.roles) == len(ROLES) else f"{found.roles[0]} alone"
    return [
        f"{found.replicates} replicates on {server} ({found.server}): {turns}, "
        f"{found.prompt_tokens} tokens a prompt, {found.new_tokens} new ones, {found.elapsed_s:.0f} s; "
        f"load by {found.load_generator}",
        "throughput: new tokens a second of all requests (Little's law); latencies are medians, then p90, p95 and p99 "
        f"where {TAIL_SAMPLES} requests lie beyond: of {FEWEST['p90']}, {FEWEST['p95']} and {FEWEST['p99']:,}",
    ]


def _cell(figures: ServedFigures, metric: Metric, percentile: str) -> str:
    if metric == "throughput":
        return f"{figures.tokens_per_s:.1f} tokens/s"
    times = {"first": figures.first_s, "inter_token": figures.inter_token_s, "request": figures.request_s}[metric]
    return f"{1e3 * times[percentile]:.1f} ms" if percentile in times else ""
