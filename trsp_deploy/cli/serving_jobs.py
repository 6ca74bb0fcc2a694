"""The commands that serve a model repository on this machine, and load the server."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from trsp_deploy.cli.options import Json, bounded, file_to_write
from trsp_deploy.cli.terminal import Output
from trsp_deploy.errors import RecipeError

Repository = Annotated[Path, typer.Argument(help="A model repository, ours or not.", metavar="REPO")]
Environment = Annotated[
    Path | None,
    typer.Option(
        "--server",
        help="Virtual environment with nvidia-pytriton; else $TRSP_DEPLOY_TRITON, else tritonserver on the path.",
        metavar="VENV",
    ),
]
Port = Annotated[
    int | None,
    typer.Option(
        "--port",
        help="Port of HTTP on 127.0.0.1; gRPC and metrics take the next two. Three free ones when not given.",
        min=1,
        max=65533,
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", help="The run that the repository is of: its report shows the result.", metavar="RUN"),
]
Concurrency = Annotated[
    str, typer.Option("--concurrency", help="Requests at once, one or several such as 1,8.", metavar="N,N")
]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt.", min=1)]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Tokens of each answer.", min=2)]
Window = Annotated[
    float, typer.Option("--window", help="Seconds of load at a time, at least.", min=1.0, callback=bounded)
]
Replicates = Annotated[int, typer.Option("--replicates", help="Times that each model is loaded.", min=2)]
Address = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="A server that holds this repository: HOST:HTTP_PORT:GRPC_PORT; else fresh ones are started.",
        metavar="URL",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Write the raw samples there.", callback=file_to_write, metavar="FILE")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("triton-start")(triton_start)
    app.command("triton-stop")(triton_stop)
    app.command("bench-server")(bench_server)


def triton_start(repository: Repository, server: Environment = None, port: Port = None, as_json: Json = False) -> None:
    """Serve a repository on this machine alone, in the background; returns when every model is loaded."""
    from trsp_deploy.tools.triton_server.process import find_installation, start

    output = Output(as_json)
    output.say(f"{repository}: starting tritonserver")
    output.stream.flush()  # loading takes minutes
    started = start(repository, find_installation(server), None if port is None else (port, port + 1, port + 2))
    output.say(
        f"ready: http 127.0.0.1:{started.http}, grpc 127.0.0.1:{started.grpc}, metrics 127.0.0.1:{started.metrics}",
        f"log: {started.log}",
        f"stop it: trsp-deploy triton-stop {shlex.quote(str(repository))}",
    )
    output.result({"repository": str(repository), **started.model_dump(mode="json")})


def triton_stop(repository: Repository, as_json: Json = False) -> None:
    """Stop a repository's server; also removes what a killed one left: processes and shared memory."""
    from trsp_deploy.tools.triton_server.process import stop

    found = stop(repository)
    said = "stopped" if found.was_running else "was not running"
    left = f"; removed {found.killed} processes and {len(found.removed)} files in /dev/shm that were left"
    output = Output(as_json)
    output.say(f"{repository}: {said}{left if found.killed or found.removed else ''}")
    output.result(found.model_dump(mode="json"))


def bench_server(
    repository: Repository,
    run: RunFolder = None,
    server: Environment = None,
    url: Address = None,
    concurrency: Concurrency = "1,8",
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 64,
    window: Window = 5.0,
    replicates: Replicates = 6,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Load dense and pruned on one Triton server in turn (perf_analyzer): first token, inter-token, throughput."""
    levels = _concurrencies(concurrency)
    where = None if url is None else _address(url)
    from trsp_deploy.artifacts import write_json
    from trsp_deploy.cli.running import existing
    from trsp_deploy.cli.tables import print_served
    from trsp_deploy.stages.serve_bench import Address, LoadSettings, measure_served, started
    from trsp_deploy.tools.triton_server.load import find_load_generator
    from trsp_deploy.tools.triton_server.process import environment_of
    from trsp_deploy.tools.triton_server.served import derive

    generator = find_load_generator(environment_of(server))
    settings = LoadSettings(
        concurrencies=levels,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        window_s=window,
        replicates=replicates,
    )

    def serve() -> contextlib.AbstractContextManager[Address]:
        return started(repository, server) if where is None else contextlib.nullcontext(Address(*where))

    output = Output(as_json)
    # Entered before the minutes of measuring: a run that is none, or is in use, is said at once.
    with contextlib.nullcontext() if run is None else existing(run) as job:
        found = measure_served(repository, serve, generator, settings, fresh=where is None, run=run)
        report = derive(found)
        print_served(report, output.stream)
        if out is not None:  # after the table: what cannot be written has been shown
            write_json(out, found)
        if job is not None:
            job.run.outdate_manifest()
            write_json(job.run.layout.served, found)
            job.report()
            output.say(f"report: {job.run.path / 'report.html'}")
    output.result(report.model_dump(mode="json"))


def _concurrencies(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text) is None:
        raise RecipeError(f"--concurrency '{text}': expected requests at once, such as 1,8")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _address(url: str) -> tuple[str, str]:
    """The addresses of HTTP and gRPC in a --url."""
    found = re.fullmatch(r"([^:/]+):(\d+):(\d+)", url)
    if found is None:
        raise RecipeError(f"--url '{url}': expected HOST:HTTP_PORT:GRPC_PORT, such as localhost:8000:8001")
    return f"{found[1]}:{found[2]}", f"{found[1]}:{found[3]}"
