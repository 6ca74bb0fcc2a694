"""All commands as one application, and how its framework's exceptions are called here."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import Counter
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption
from typer.exceptions import Exit, TyperException

from trsp_deploy import __version__
from trsp_deploy.cli import catalogue, check_jobs, engine_jobs, jobs, serving_jobs, sweep_jobs, triton_jobs, trust_jobs
from trsp_deploy.errors import UserError
from trsp_deploy.model_code import FINGERPRINT, TRUST
from trsp_deploy.reading import is_utf8, user_path

EMPTY = re.compile(r"(--(?!prompt)[a-z-]+=)?")
HOME = re.compile(r"(--(?!prompt)[a-z-]+=)?(~(?:/.*)?)", re.DOTALL)
ABORTED = 130  # what the framework makes of Ctrl-C


class OnceEach(TyperCommand):
    """A command whose options stand once each, but for flags and those that collect: of two values the last would win
    without a word, and a looser limit take a stricter one's place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise UserError for an option that is given twice; all else is the framework's."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option, times in Counter(given).items():
            once = isinstance(option, TyperOption) and not (option.multiple or option.is_flag)
            if once and times > 1 and not ctx.resilient_parsing:  # as a shell asks that completes a line
                one = f"{ctx.info_name} takes one engine" if option.name == "engine" else "give it once"
                raise UserError(f"{option.opts[0]}: is given twice; {one}")
        return super().parse_args(ctx, args)


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
for group in (app, *(each.typer_instance for each in app.registered_groups)):
    for command in group.registered_commands if group is not None else ():
        command.cls = OnceEach


def _show_version(asked: bool) -> None:
    if asked:
        print(f"trsp-deploy {__version__}")
        raise typer.Exit


@app.callback()
def asked_for(
    trust_remote_code: Annotated[
        list[str] | None,
        typer.Option(
            "--trust-remote-code",
            metavar="FINGERPRINT",
            envvar=TRUST,
            help="Run the Python files of this fingerprint that a model brings, with your rights. A model that brings "
            "code is refused with its fingerprint otherwise.",
        ),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """What holds for every command."""
    _keep_to_quota()
    fingerprints = " ".join(trust_remote_code or ()).split()
    for fingerprint in fingerprints:
        if not FINGERPRINT.fullmatch(fingerprint):
            raise UserError(
                f"--trust-remote-code {fingerprint!r}: expected the 32 hexadecimal digits that the refusal of a model "
                "with code of its own shows"
            )
    if fingerprints:
        from trsp_deploy.tools.sources.packaged import home

        os.environ[TRUST] = " ".join(fingerprints)  # for this process and those that it starts
        os.environ.setdefault("HF_MODULES_CACHE", str(home() / "model-code" / "-".join(sorted(fingerprints))))
        print(
            f"warning: Python files that a model brings will run if their fingerprint is {' or '.join(fingerprints)}: "
            "they can read and change your files, use your keys and reach the network",
            file=sys.stderr,
        )


def _keep_to_quota() -> None:
    """Have torch, in this process and those that it starts, take no more threads than a container's quota is worth.

    By itself it takes one for each core that it may run on, which then wait for one another. To be called before torch
    is imported, which reads the variable then; what a user or a launcher has set stays.
    """
    from trsp_deploy.artifacts.control_groups import usable_cores

    cores = usable_cores()
    if cores < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def call(arguments: list[str]) -> int:
    """Run one command line; returns its exit code, and raises UserError for one that cannot be read."""
    for before, argument in itertools.pairwise(["", *arguments]):
        if EMPTY.fullmatch(argument) and before != "--prompt":  # as a path it would be the folder that this runs in
            after = f" after {before}" if before else ""
            raise UserError(f"argument {argument!r}{after}: is empty, as of a variable that is not set")
        if not is_utf8(argument):  # safetensors and tokenizers open no such file, and no recipe can name it
            raise UserError(f"argument {argument!a}: is not UTF-8; rename what it stands for")
    try:
        result = app(args=_from_home(arguments), prog_name="trsp-deploy", standalone_mode=False)
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


def _from_home(arguments: list[str]) -> list[str]:
    """Arguments with `~` as the home folder where the shell left it: quoted, and in bash behind `--out=`.

    Else `--out=~/x` would make a folder of that name, which is removed with the home folder sooner or later.
    """
    pairs = itertools.pairwise(["", *arguments])
    found = [None if before == "--prompt" else HOME.fullmatch(argument) for before, argument in pairs]
    return [
        argument if path is None else f"{path[1] or ''}{user_path(path[2])}"
        for argument, path in zip(arguments, found, strict=True)
    ]
