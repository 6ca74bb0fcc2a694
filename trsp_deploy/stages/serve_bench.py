"""Load on a server that holds dense and pruned: how fast each is served, in turn on one machine."""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trsp_deploy.artifacts import ENGINE_MANIFEST, RunLayout, fingerprint, provenance
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import Strict
from trsp_deploy.results import ROLES, Role, Served, ServedRequest, ServedWindow, Subject
from trsp_deploy.tools.measuring.telemetry import Recorder
from trsp_deploy.tools.model_repository.manifest import ServedModel, read_repository
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.runners.manifest import read_manifest
from trsp_deploy.tools.serving.text import read_tokenizer
from trsp_deploy.tools.triton_server import process as triton_server
from trsp_deploy.tools.triton_server.load import LoadGenerator, prompts_of
from trsp_deploy.tools.triton_server.served import of_another_engine, tokens_per_s

PROMPTS = 16
FEWEST_REQUESTS = 3  # after each other, in a window


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    http: str
    grpc: str

    def version(self) -> str:
        """Name and version; raises RunError when nothing answers."""
        try:
            with triton_server.DIRECT.open(f"http://{self.http}/v2", timeout=10) as reply:
                said = json.load(reply)
        except (OSError, ValueError, http.client.HTTPException) as problem:
            raise RunError(f"{self.http}: no Triton server answers there ({problem})") from problem
        return f"{said.get('name', 'unknown')} {said.get('version', 'unknown')}"


class LoadSettings(Strict):
    """What is asked of the server."""

    concurrencies: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 128
    new_tokens: int = 64
    window_s: float = 5.0  # at least; longer where so few requests end in it
    replicates: int = 6


@contextlib.contextmanager
def started(repository: Path, server: Path | None) -> Iterator[Address]:
    """A server of the repository for the length of the block; raises RunError where one runs already."""
    running = triton_server.start(repository, triton_server.find_installation(server))
    try:
        yield Address(http=f"127.0.0.1:{running.http}", grpc=f"127.0.0.1:{running.grpc}")
    except BaseException:
        triton_server.stop(repository, grace_s=0)  # after Ctrl-C there is a second for all of it
        raise
    triton_server.stop(repository)


Serve = Callable[[], contextlib.AbstractContextManager[Address]]  # called for each replicate


def measure_served(
    repository: Path,
    serve: Serve,
    generator: LoadGenerator,
    settings: LoadSettings,
    before: Callable[[int], None] = lambda replicate: None,
    *,
    fresh: bool = True,
    run: Path | None = None,
) -> Served:
    """Load dense, dense again and pruned in turn, at every concurrency, `replicates` times.

    serve: a server of the repository; fresh: whether another one each time, as it should be: where a process has its
    memory decides by some percent how fast it is. before: called with each replicate's number, while no server runs.
    run: whose report is to show it.
    Raises RunError when the repository is none of ours, dense and pruned have two engines or not the run's, a text does
    not fit its models, or the server fails.
    """
    models = read_repository(repository).texts
    _check_there(repository, models)
    engine = _common_engine(repository, models)
    engines = {
        role: fingerprint(repository / model.name / "1" / "engine" / ENGINE_MANIFEST) for role, model in models.items()
    }
    other = None if run is None else of_another_engine(engine, engines, RunLayout(run))
    if other is not None:
        raise RunError(
            f"--run {run}: '{models[other].name}' of {repository} is not the run's {other} engine {engine} as it is "
            f"now; `trsp-deploy triton {shlex.quote(str(run))} --out DIR --dense` writes a repository of it"
        )
    load = Load(repository, generator, settings)
    names = {role: model.name for role, model in models.items()}
    with Recorder() as recorder:
        windows, versions = _windows(load, names, settings, recorder, serve, before)
        elapsed_s = recorder.now_s
    return Served(
        engine=engine,
        models=names,
        engines=engines,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        window_s=settings.window_s,
        concurrencies=settings.concurrencies,
        windows=tuple(windows),
        telemetry=tuple(recorder.samples),
        load_generator=generator.version(),
        server=versions[0],
        fresh=fresh,
        provenance=provenance(),
        elapsed_s=elapsed_s,
    )


def _check_there(repository: Path, models: Mapping[Role, ServedModel]) -> None:
    """Raise RunError where a model, or a file of one, is gone: no server could load it."""
    files = (f"{model.name}/{file}" for model in models.values() for file in model.files)
    missing = next((file for file in files if not (repository / file).is_file()), None)
    if missing is not None:
        raise RunError(
            f"{repository}: {missing} is not there any more (`trsp-deploy verify {shlex.quote(str(repository))}` names "
            "all that is missing); `trsp-deploy triton RUN --out DIR --dense` writes another repository"
        )


def _common_engine(repository: Path, models: Mapping[Role, ServedModel]) -> str:
    """The engine's name; raises RunError where dense and pruned are served by two, for then neither is faster."""
    found = {model.name: read_manifest(repository / model.name / "1" / "engine") for model in models.values()}
    kinds = {
        name: f"{each.name} ({each.spec.backend} {each.backend_version}, settings {each.spec_sha256[:8]})"
        for name, each in found.items()
    }
    if len(set(kinds.values())) > 1:
        said = " and ".join(f"'{name}' by {kind}" for name, kind in kinds.items())
        raise RunError(
            f"{repository}: serves {said}: a comparison is of one engine; write both with "
            "`trsp-deploy triton RUN --dense`"
        )
    return next(iter(models.values())).engine


class Load:
    """One kind of request, to any model of a repository."""

    def __init__(self, repository: Path, generator: LoadGenerator, settings: LoadSettings) -> None:
        """Raises RunError when a text would be longer than a model takes."""
        models = list(read_repository(repository).texts.values())
        for model in models:
            if settings.prompt_tokens + settings.new_tokens > model.max_length:
                raise RunError(
                    f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens}: "
                    f"'{model.name}' takes {model.max_length} tokens in all"
                )
        tokenizer = read_tokenizer(repository / models[0].name / "1" / "tokenizer.json")
        self.prompts = prompts_of(tokenizer, settings.prompt_tokens, PROMPTS)
        self._generator = generator
        self._new_tokens = settings.new_tokens

    def window(self, address: Address, model: str, concurrency: int, seconds: float) -> tuple[ServedRequest, ...]:
        """The requests that finish in a window, at least one; raises RunError when none does even in a longer one."""
        for longer in (1, 4, 16):  # the machine may be busy
            found = self._generator.window(
                address.grpc, model, self.prompts, self._new_tokens, concurrency, longer * seconds
            )
            if found:
                return found
        raise RunError(f"{model}: no request ended within {longer * seconds:.0f} s, {concurrency} at once")


def _windows(
    load: Load,
    names: dict[Role, str],
    settings: LoadSettings,
    recorder: Recorder,
    serve: Serve,
    before: Callable[[int], None],
) -> tuple[list[ServedWindow], list[str]]:
    """Every window, and each server's version."""
    subjects: dict[Subject, str] = {role: names[role] for role in ROLES if role in names}
    if len(subjects) == 2:
        subjects["again"] = subjects["dense"]
    windows: list[ServedWindow] = []
    versions = []
    seconds: dict[int, float] = {}  # of a window, by concurrency
    with Meter("load", settings.replicates * len(settings.concurrencies) * len(subjects)) as meter:
        for replicate in range(settings.replicates):
            before(replicate)
            with serve() as address:
                versions.append(address.version())
                for name in names.values():
                    load.window(address, name, settings.concurrencies[0], settings.window_s / 2)  # warms it up
                for concurrency in settings.concurrencies:
                    if replicate == 0:
                        found = load.window(address, next(iter(names.values())), concurrency, settings.window_s)
                        seconds[concurrency] = max(settings.window_s, _window_s(found))
                    for subject in _order(list(subjects), replicate):
                        window = ServedWindow(
                            subject=subject,
                            concurrency=concurrency,
                            replicate=replicate,
                            began_s=recorder.now_s,
                            requests=load.window(address, subjects[subject], concurrency, seconds[concurrency]),
                        )
                        windows.append(window)
                        meter.advance(f"{subject} at {concurrency}: {tokens_per_s(window):.0f} tokens/s")
    return windows, versions


def _window_s(requests: Sequence[ServedRequest]) -> float:
    """Length of a window: enough for a few requests one after the other."""
    return FEWEST_REQUESTS * float(np.median([request.answered_s[-1] for request in requests]))


def _order(subjects: list[Subject], replicate: int) -> list[Subject]:
    """Each subject comes first, second and last equally often, so that a drift hits all alike."""
    turn = replicate // 2 % len(subjects)
    turned = subjects[turn:] + subjects[:turn]
    return turned if replicate % 2 == 0 else turned[::-1]
