"""How much to drop: a sweep of SmolLM2-135M through real engines, as a table and a plot for docs/choosing-a-drop.md.

    python -m benchmarks.sweep            # runs the sweep, which goes on where it stopped
    python -m benchmarks.sweep --report   # writes the page again from what was measured

Kept whole in benchmarks/results/sweep-CPU.json, a sweep's own sweep.json with the blocks of every comparison beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks import targets
from benchmarks.kept import every_machine, judged, keep, results_path
from benchmarks.pages import markdown, put_between_markers
from benchmarks.targets import at_least
from trsp_deploy.artifacts import writing
from trsp_deploy.errors import TrspError
from trsp_deploy.recipe import Strict
from trsp_deploy.results import Comparison
from trsp_deploy.tools.judging.statistics import speedup
from trsp_deploy.tools.reports.sweeps import Point, Sweep

COUNTS = (3, 6, 9, 12)  # of 30 layers
ENGINE = "ort-cpu-fp32"
PAGE, PLOT = Path("docs/choosing-a-drop.md"), Path("docs/img/sweep.png")
SHARE = 0.95  # issue: the pruned engine's measured speed-up over its limit, at least
HEAD = ("layers dropped", "parameters", "engine MB", "peak MB", "prompt", "token", "end to end", "limit", "perplexity")
COLOURS, MARKERS = ("#D55E00", "#0072B2", "#009E73"), "osD"


class Found(Strict):
    """What one machine measured."""

    sweep: Sweep
    comparisons: dict[int, Comparison]  # by layers dropped: every block that was timed


def main() -> int:
    """Measure, unless the page alone is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sweep"), help="folder of the sweep")
    options = parser.parse_args()
    try:
        if not options.report:
            measured = measure(options.out)
            keep(results_path("sweep", measured.sweep.provenance.cpu), measured)
        every = [derived(found) for (found,) in every_machine("sweep", Found)]
        put_between_markers(PAGE, "\n\n".join(text(found) for found in every), "sweep")
        draw(every, PLOT)
        found = judged(every, lambda each: each.sweep.provenance.cpu, lambda each: verdict(each)["met"])
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    print(text(found))
    print(json.dumps(verdict(found)))
    return 0


def derived(found: Found) -> Found:
    """What one machine measured, the intervals derived again from the blocks that were timed."""
    points = tuple(_derived(point, found.comparisons.get(point.num_dropped)) for point in found.sweep.points)
    return found.model_copy(update={"sweep": found.sweep.model_copy(update={"points": points})})


def _derived(point: Point, raw: Comparison | None) -> Point:
    if point.comparison is None or raw is None:
        return point
    phases = tuple(
        each.model_copy(update={"speedup": speedup(raw.replicates, 0, each.phase).found})
        for each in point.comparison.phases
    )
    return point.model_copy(update={"comparison": point.comparison.model_copy(update={"phases": phases})})


def measure(out: Path) -> Found:
    """Run `trsp-deploy sweep`, and read what it leaves; raises TrspError when it fails."""
    counts = ",".join(map(str, COUNTS))
    command = ["sweep", "--recipe", "smollm2-135m", "--drop", counts, "--engine", ENGINE, "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "trsp_deploy", *command], check=False, stdout=sys.stderr)
    if done.returncode:
        raise TrspError(f"trsp-deploy {' '.join(command)}: ended with {done.returncode}")
    sweep = Sweep.model_validate_json((out / "sweep.json").read_bytes())
    return Found(sweep=sweep, comparisons={n: _comparison(out / f"drop-{n}") for n in COUNTS})


def _comparison(run: Path) -> Comparison:
    record = json.loads((run / "records" / f"bench-{ENGINE}.json").read_bytes())
    return Comparison.model_validate(record["result"])


def verdict(found: Found) -> dict[str, Any]:
    """The line of JSON that a bench ends with."""
    figures = {f"drop_{point.num_dropped}_speedup_over_limit": _share(point) for point in found.sweep.points}
    return targets.verdict("sweep", dict.fromkeys(figures, at_least(SHARE)), figures, decimals=3)


def _share(point: Point) -> float | None:
    """Of a new token's limit, as in docs/engines.md."""
    if point.comparison is None or (step := point.comparison.of("decode")).limit is None:
        return None
    return step.speedup.ratio / step.limit


def text(found: Found) -> str:
    """One machine's table."""
    sweep = found.sweep
    done = sweep.provenance
    first = sweep.points[0]
    dense = f"dense {_mb(first.dense_size_bytes)} MB"
    if first.comparison is not None:
        step = first.comparison.of("decode")
        dense += (
            f", {first.comparison.of('prefill').dense_s * 1e3:.0f} ms a prompt and {step.dense_s * 1e3:.1f} ms a token"
        )
    return (
        f"**{done.cpu}**, {done.cores} cores, onnxruntime {done.packages['onnxruntime']}: {ENGINE}, {dense}. "
        "Times dense / pruned with 95% intervals.\n\n" + markdown(HEAD, [_row(sweep, point) for point in sweep.points])
    )


def _row(sweep: Sweep, point: Point) -> list[str]:
    quality = ", ".join(f"{name} {each.ratio:.2f}x" for name, each in point.quality.items())
    begin = [
        f"{point.num_dropped} of {sweep.num_layers}",
        f"-{point.parameters_dropped_share:.0%}",
        _mb(point.size_bytes),
    ]
    if point.comparison is None:
        return [*begin, "–", "–", "–", "not run", "–", quality]
    phases = [point.comparison.of(phase) for phase in ("prefill", "decode", "total")]
    ratios = [each.speedup.text(unit="") for each in phases]
    limit = "–" if phases[-1].limit is None else f"{phases[-1].limit:.2f}"
    return [*begin, _mb(point.comparison.peak_rss_bytes.get("pruned")), *ratios, limit, quality]


def _mb(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.0f}"


def draw(every: list[Found], path: Path) -> None:
    """Perplexity over dense against end-to-end speed-up: a panel a machine, a line a text, layers dropped beside it."""
    figure, panels = pyplot.subplots(1, len(every), figsize=(6.4 * len(every), 4.4), squeeze=False)
    for panel, found in zip(panels[0], every, strict=True):
        points = [point for point in found.sweep.points if point.comparison is not None]
        totals = [point.comparison.of("total").speedup for point in points if point.comparison is not None]
        speeds = [total.ratio for total in totals]
        spread = [[t.ratio - t.low for t in totals], [t.high - t.ratio for t in totals]]
        for name, colour, marker in zip(points[0].quality, COLOURS, MARKERS, strict=False):
            ratios = [point.quality[name].ratio for point in points]
            panel.errorbar(speeds, ratios, xerr=spread, color=colour, marker=marker, capsize=3, label=name)
        for point, speed in zip(points, speeds, strict=True):
            place = (speed, point.worst_ppl_ratio)
            panel.annotate(
                f"{point.num_dropped} layers", place, textcoords="offset points", xytext=(-4, 8), ha="right", fontsize=9
            )
        panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        panel.axvline(1, color="black", linewidth=0.8, linestyle=":")
        panel.grid(color="#DDDDDD", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"SmolLM2-135M-Instruct, {ENGINE}, {found.sweep.provenance.cpu}", fontsize=11)
        panel.set_xlabel("times as fast, end to end")
        panel.set_ylabel("perplexity, times dense")
        panel.margins(y=0.1)
        panel.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
