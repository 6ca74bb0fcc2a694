"""All commands as one application, and how its framework's exceptions are called here."""

from __future__ import annotations

import typer
from typer.exceptions import Exit, TyperException

from trsp_deploy.cli import catalogue, check_jobs, engine_jobs, jobs, serving_jobs, sweep_jobs, triton_jobs, trust_jobs
from trsp_deploy.errors import UserError
from trsp_deploy.reading import is_utf8

ABORTED = 130  # what the framework makes of Ctrl-C

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


def call(arguments: list[str]) -> int:
    """Run one command line; returns its exit code, and raises UserError for one that cannot be read."""
    for argument in arguments:
        if not is_utf8(argument):  # safetensors and tokenizers open no such file, and no recipe can name it
            raise UserError(f"argument {argument!a}: is not UTF-8; rename what it stands for")
    try:
        result = app(args=arguments, prog_name="trsp-deploy", standalone_mode=False)
        code = result if isinstance(result, int) else 0  # outside its standalone mode it returns the code of an Exit
    except Exit as done:
        code = done.exit_code
    except TyperException as problem:
        message = problem.format_message()
        if message:
            raise UserError(message) from problem
        return 0  # it has just shown the help of a bare command
    except typer.Abort as problem:
        raise KeyboardInterrupt from problem
    if code == ABORTED:
        raise KeyboardInterrupt
    return code
