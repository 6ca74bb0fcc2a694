"""The command line: each command parses, calls one library function and prints.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer
from typer.exceptions import Exit, TyperException

from trsp_deploy.cli import catalogue, check_jobs, engine_jobs, jobs, serving_jobs, sweep_jobs, triton_jobs, trust_jobs
from trsp_deploy.errors import TrspError, machine_reason, redacted

INTERRUPTED = 130
BUG = 70
LONGEST_LINE = 2000  # characters of an error, whatever a user or a library put into it

app = typer.Typer(
    name="trsp-deploy",
    help="Remove a share of an LLM's layers (TRSP), ship its engine, and prove that it got faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
jobs.register(app)
sweep_jobs.register(app)
check_jobs.register(app)
engine_jobs.register(app)
triton_jobs.register(app)
serving_jobs.register(app)
trust_jobs.register(app)
catalogue.register(app)


def main() -> None:
    """Entry point of `trsp-deploy`; exit codes are listed in docs/exit-codes.md."""
    # Threads that spin at barriers make two busy processes on few cores five times slower, and gain nothing alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors become one line on stderr."""
    try:
        result = app(args=arguments, prog_name="trsp-deploy", standalone_mode=False)
        # Outside its standalone mode the framework returns the code of an Exit.
        code = result if isinstance(result, int) else 0
        return _interrupted() if code == INTERRUPTED else code
    except Exit as done:
        return _interrupted() if done.exit_code == INTERRUPTED else done.exit_code
    except TyperException as problem:
        message = problem.format_message()
        return _say(message, 1) if message else 0  # without one it has just shown the help of a bare command
    except TrspError as problem:
        return _say(str(problem), problem.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as problem:
        # What a user's paths, disk or limits can cause, wherever it happens; all else is a bug and shows its traceback.
        reason = machine_reason(problem)
        if reason is not None:
            return _say(reason, 1)
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return BUG


def _interrupted() -> int:
    return _say("interrupted; finished steps are kept, and the same command goes on from there", INTERRUPTED)


def _say(message: str, code: int) -> int:
    line = redacted(" ".join(message.split()))
    print(f"error: {line if len(line) <= LONGEST_LINE else f'{line[:LONGEST_LINE]}…'}", file=sys.stderr)
    return code
