"""Make the rows that are missing, each in a process of its own: `python -m benchmarks.quality [--quick] [--list]`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.quality.estimates import estimate_s, hours, pace
from benchmarks.quality.rows import Row
from benchmarks.quality.store import Store, work_digest
from benchmarks.quality.table import FULL, QUICK, Table, rows
from trsp_deploy.artifacts import RunFolder
from trsp_deploy.errors import RunError, TrspError
from trsp_deploy.tools.prctl import end_with_parent

RESULTS = Path("benchmarks/results/quality.jsonl")
SCRATCH = Path("runs/quality")  # lock, checkpoints that zero-shot rows ask, and the quick table's results


def main() -> int:
    """Parse, make, and say what could not be made."""
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped bench takes its row's process with it
    table = QUICK if options.quick else FULL
    store = Store(results_file(options.quick))
    try:
        if options.row:
            return make_row(table, options.row, store)
        wanted = rows(table, options.only)
        if not wanted:
            raise RunError(f"--only '{options.only}': no row's title holds it; the titles are in `--list`")
        if options.list:
            return list_rows(wanted, store)
        with RunFolder(SCRATCH):
            return make_rows(wanted, store, options)
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        if options.row:  # the process that started this one says it
            return 130
        print("stopped; finished rows are kept, the same command goes on", file=sys.stderr)
        return 130


def results_file(quick: bool) -> Path:
    """Where a table's rows are kept; the quick table's are not worth committing."""
    return SCRATCH / "quick.jsonl" if quick else RESULTS


def make_rows(wanted: list[Row], store: Store, options: argparse.Namespace) -> int:
    """Make every row that is missing, one after the other; a row that fails does not stop the rest."""
    stale = [row for row in wanted if store.stale(row)]
    missing = [row for row in wanted if row not in store or (options.redo_stale and row in stale)]
    if stale and not options.redo_stale:
        print(f"{len(stale)} rows were made by other code than there is now (--redo-stale makes them again)")
    failed = []
    for number, row in enumerate(missing):
        left = pace(store.lines.values()) * sum(map(estimate_s, missing[number:]))
        print(f"[{number + 1}/{len(missing)}] {row.title}; {hours(left)} left in all", flush=True)
        twin = store.twin(row)
        if twin is not None and not (options.redo_stale and store.stale(twin.row)):
            store.reuse(row, twin)
            print(f"    the same layers and training as '{twin.row.title}': its outcome is this row's", flush=True)
            continue
        began = time.perf_counter()
        done = subprocess.run(_command(row, options.quick), env=_environment(), check=False).returncode == 0
        print(f"    {'done' if done else 'FAILED'} in {hours(time.perf_counter() - began)}", flush=True)
        failed += [] if done else [row.title]
        store = Store(store.path)
    print(f"{len(missing) - len(failed)} rows made, {len(wanted) - len(missing)} were there, {len(failed)} failed")
    for title in failed:
        print(f"    failed: {title}")
    return 1 if failed else 0


def make_row(table: Table, key: str, store: Store) -> int:
    """Make one row in this process and keep it."""
    from benchmarks.quality.work import compute

    end_with_parent()  # or it would go on beside the next one
    row = next((row for row in rows(table) if row.key == key), None)
    if row is None:
        raise RunError(f"row '{key}': not in the table; the keys are in `--list`")
    work_digest(row.work)  # of the code as it is loaded now, not as it is when the row is done
    began = time.perf_counter()
    outcome = compute(row, store, SCRATCH / "checkpoints")
    store.add(row, outcome, time.perf_counter() - began)
    return 0


def list_rows(wanted: list[Row], store: Store) -> int:
    """Print each row with its key, its estimated time and whether it is there."""
    scale = pace(store.lines.values())
    for row in wanted:
        state = "stale" if store.stale(row) else "there" if row in store else hours(scale * estimate_s(row))
        print(f"{row.key}  {state:>8}  {row.title}")
    left = sum(estimate_s(row) for row in wanted if row not in store)
    print(f"{len(wanted)} rows, {sum(row in store for row in wanted)} there, about {hours(scale * left)} left")
    return 0


def _command(row: Row, quick: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.quality", "--row", row.key, *(["--quick"] if quick else [])]


def _environment() -> dict[str, str]:
    # Threads that spin beside another busy process cost five times the time; no row needs a model hub.
    return {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **os.environ}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="Make the missing rows.")
    parser.add_argument("--quick", action="store_true", help="the small table, about 10 minutes on 2 cores")
    parser.add_argument("--list", action="store_true", help="print the rows and their estimated time; make none")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose title holds this, and what they need")
    parser.add_argument("--redo-stale", action="store_true", help="make rows again that other code has made")
    parser.add_argument("--row", default="", metavar="KEY", help="make this row in this process")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
