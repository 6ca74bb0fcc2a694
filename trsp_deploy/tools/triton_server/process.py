"""A tritonserver on this machine: started on loopback, found again by its repository, stopped without leftovers.

    server = start(repository, find_installation())
    ...
    stop(repository)

A server that was killed leaves shared memory and stub processes behind. Every start gets a prefix of its own for the
Python backend's shared memory, which also stands in each process's command line: `stop` finds both by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import Field

from trsp_deploy.artifacts import locked, write_json, writing
from trsp_deploy.artifacts.locks import check_not_written
from trsp_deploy.errors import RunError, one_line
from trsp_deploy.reading import read_record
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.sources.packaged import home

VARIABLE = "TRSP_DEPLOY_TRITON"  # names a virtual environment that holds nvidia-pytriton
ADDRESS = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")
READY_S = 600.0  # loading an engine of many gigabytes takes minutes
GRACE_S = 30.0  # for running requests, before a server is killed
POLL_S = 0.1
STATE = "server.json"
ONE_WORD = re.compile(r"[\w@%+=:,./~-]+")  # paths that a shell takes for one, quoted or not
# Not through a proxy that the environment names: the server is on this machine, or as near as its load generator needs.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server(Strict):
    """A server that was started; `server.json` of its folder."""

    pid: int
    http: int  # ports of ADDRESS
    grpc: int
    metrics: int
    # Prefix of its files in /dev/shm, which stands in its processes' command lines, and in no others.
    shared_memory: Annotated[str, Field(pattern=r"^trsp-[0-9a-f]{8}-$")]
    log: str


class Stopped(Strict):
    """What `stop` found and did."""

    was_running: bool
    killed: int  # processes that did not end by themselves
    removed: tuple[str, ...]  # files left in /dev/shm


@dataclass(frozen=True)
class Installation:
    """How to run tritonserver on this machine."""

    binary: Path
    backends: Path | None = None  # holds the Python backend; None where the binary knows its own
    stub: Path | None = None  # the Python backend's for the installation's Python, to be put beside the backend
    environment: dict[str, str] = field(default_factory=dict)


def find_installation(environment: Path | None = None) -> Installation:
    """The server of a virtual environment with nvidia-pytriton, else `tritonserver` on the path.

    environment: the virtual environment; $TRSP_DEPLOY_TRITON when not given. Raises RunError when there is none.
    """
    named = environment_of(environment)
    if named is not None:
        return _in_environment(named)
    found = shutil.which("tritonserver")
    if found is None:
        raise RunError(
            "no tritonserver on the path; run inside Triton's container, or name a virtual environment that holds "
            f"nvidia-pytriton with --server or ${VARIABLE}"
        )
    return Installation(binary=Path(found))


def environment_of(named: Path | None) -> Path | None:
    """The virtual environment that was named, else that of $TRSP_DEPLOY_TRITON; None without either."""
    if named is not None:
        return named.absolute()
    return Path(os.environ[VARIABLE]).absolute() if os.environ.get(VARIABLE) else None


def _in_environment(environment: Path) -> Installation:
    site = next((environment / "lib").glob("python3*/site-packages"), None)
    server = None if site is None else site / "pytriton" / "tritonserver"
    if site is None or server is None or not server.is_dir():
        raise RunError(f"{environment}: no virtual environment with nvidia-pytriton, so no tritonserver")
    python = environment / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    try:
        command = [str(python), "-I", "-c", code]  # -I: no module of the working directory
        libraries = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as problem:
        raise RunError(f"{environment}: its Python does not run ({one_line(problem)})") from problem
    version = site.parent.name.removeprefix("python")
    stub = next((server / "python_backend_stubs").glob(f"{version}*/triton_python_backend_stub"), None)
    if stub is None:
        raise RunError(f"{environment}: nvidia-pytriton has no Python backend for Python {version}")
    return Installation(
        binary=server / "bin" / "tritonserver",
        backends=server / "backends" / "python",
        stub=stub,
        environment={
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            # The running Python's own library first: the stub would load another one.
            "LD_LIBRARY_PATH": f"{libraries}:{site / 'nvidia_pytriton.libs'}:{server / 'lib'}",
        },
    )


def start(
    repository: Path,
    installation: Installation,
    ports: tuple[int, int, int] | None = None,
    options: Sequence[str] = (),
) -> Server:
    """Serve a repository on 127.0.0.1 in the background, and return once every model is loaded.

    ports: of HTTP, gRPC and metrics; free ones when not given. options: further ones of tritonserver.
    Raises RunError when a server of this repository runs already, when `triton` writes it just now, when a port is
    taken, when a model does not load (with the server's own words), or when it is not ready in time.
    """
    named = shlex.quote(str(repository))
    if not repository.is_dir():
        raise RunError(f"{repository}: no such folder; `trsp-deploy triton RUN --out {named}` writes one")
    with _alone(repository):
        there = find(repository)
        if there is not None:
            stop_it = f"`trsp-deploy triton-stop {named}`"
            raise RunError(f"{repository}: is served already on port {there.http}; {stop_it}")
        last = _last(repository)
        if last is not None:
            _clear_up(repository, last)  # it was killed
        check_not_written(repository)
        if ports is not None:
            _check_free(ports)
        process, server = _launch(repository, installation, ports or _free_ports(3), options)
        try:
            write_json(_folder(repository) / STATE, server)
        except BaseException:
            _clear_up(repository, server)  # nobody would find it again
            raise
    try:
        _wait(process, server)
    except BaseException:
        with _alone(repository):
            _clear_up(repository, server)
        raise
    return server


def _launch(
    repository: Path, installation: Installation, ports: Sequence[int], options: Sequence[str]
) -> tuple[subprocess.Popen[bytes], Server]:
    folder = _folder(repository)
    http, grpc, metrics = ports
    prefix = f"trsp-{secrets.token_hex(4)}-"
    command = [
        str(installation.binary),
        f"--model-repository={_one_word(repository.resolve(), folder, installation)}",
        *_backend_options(installation, folder),
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        *(f"--{name}-address={ADDRESS}" for name in ("http", "grpc", "metrics")),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        *options,
    ]
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **installation.environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C in this terminal is not meant for it
        )
    return process, Server(
        pid=process.pid,
        http=http,
        grpc=grpc,
        metrics=metrics,
        shared_memory=prefix,
        log=str(log),
    )


def _one_word(repository: Path, folder: Path, installation: Installation) -> Path:
    """The repository, by a link in `folder` where a shell would not take its path for one word.

    Until August 2025 (its pull request 404) the Python backend had a shell start a model, with no quotes around paths;
    the model gets half of one and ends, and the server waits for it for good. Raises RunError where `folder`, which
    holds that link or the backend, has no such path itself.
    """
    given = ONE_WORD.fullmatch(str(repository)) is not None
    if given and installation.backends is None:  # nothing of `folder` is started
        return repository
    if ONE_WORD.fullmatch(str(folder)) is None:
        raise RunError(
            f"{folder}: Triton cannot start a model from there; set TRSP_DEPLOY_HOME to a path without spaces"
        )
    if given:
        return repository
    link = folder / "models"
    link.unlink(missing_ok=True)
    link.symlink_to(repository)
    return link


def find(repository: Path) -> Server | None:
    """The running server of a repository; None when there is none, or nothing but what a killed one left."""
    server = _last(repository)
    if server is None or all(process.pid != server.pid for process in _processes(server)):
        return None
    return server


def stop(repository: Path, grace_s: float = GRACE_S) -> Stopped:
    """Stop a repository's server, and remove what it or a killed one left: stub processes and shared memory.

    grace_s: seconds for running requests before it is killed. Raises RunError for a folder that is not there, unless a
    server was started on it.
    """
    if not _folder(repository).exists():  # never served here: nothing to keep others from, and no folder to make
        if not repository.is_dir():
            raise RunError(f"{repository}: no such folder, and no server was started on it")
        return Stopped(was_running=False, killed=0, removed=())
    with _alone(repository):
        server = _last(repository)
        if server is None:
            return Stopped(was_running=False, killed=0, removed=())
        running = _processes(server)
        main = [process for process in running if process.pid == server.pid]
        for process in main if grace_s > 0 else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        try:
            # Its stubs end with it; nothing would end those of a killed one.
            psutil.wait_procs(running, timeout=grace_s if main else 0)
        finally:  # after Ctrl-C too: nobody comes back for what it leaves
            killed, removed = _clear_up(repository, server)
    return Stopped(was_running=bool(main), killed=killed, removed=removed)


def _clear_up(repository: Path, server: Server) -> tuple[int, tuple[str, ...]]:
    """Kill what is left of a server, and remove its shared memory and its record: how many, and which files."""
    left = _processes(server)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # Before they have gone, which of many gigabytes takes longer than there is after Ctrl-C.
    files = sorted(SHARED_MEMORY.glob(f"{server.shared_memory}*"))
    for file in files:
        file.unlink(missing_ok=True)
    if _last(repository) == server:  # and none that another command has started since
        (_folder(repository) / STATE).unlink()
    _wait_for_end(left)
    return len(left), tuple(file.name for file in files)


def _wait_for_end(killed: list[psutil.Process]) -> None:
    """Of killed processes, those that are zombies among them: whom a model's fell to may not ask for its exit code."""
    until = time.monotonic() + GRACE_S
    while killed and time.monotonic() < until:
        _, left = psutil.wait_procs(killed, timeout=POLL_S)
        killed = [process for process in left if not _is_zombie(process)]


def _is_zombie(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@contextlib.contextmanager
def _alone(repository: Path) -> Iterator[None]:
    """Keep other commands from starting or stopping a server of this repository meanwhile; they wait."""
    folder = _folder(repository)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", repository, patience_s=None):
        yield


def _folder(repository: Path) -> Path:
    """Outside the repository, which may be mounted read-only and belongs to Triton.

    Of this machine alone: another one may share home and repository, and knows nothing of our processes.
    """
    place = os.fsencode(f"{socket.gethostname()}:{repository.resolve()}")  # a folder's name need not be UTF-8
    return home() / "servers" / hashlib.sha256(place).hexdigest()[:16]


def _last(repository: Path) -> Server | None:
    path = _folder(repository) / STATE
    if not path.exists():
        return None
    return read_record(path, Server, RunError, "is no record of a server", "delete it")


def _processes(server: Server) -> list[psutil.Process]:
    """The server and its stubs, wherever they hang in the tree of processes."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and any(
                server.shared_memory in part for part in process.cmdline()
            ):
                found.append(process)
    return found


def _backend_options(installation: Installation, folder: Path) -> list[str]:
    if installation.backends is None or installation.stub is None:
        return []
    backends = folder / "backends"
    with writing(backends) as partial:  # anew for each start: the installation may be another one
        shutil.copytree(installation.backends, partial / "python")
        shutil.copy2(installation.stub, partial / "python")
    return [f"--backend-directory={backends}"]


def _wait(process: subprocess.Popen[bytes], server: Server) -> None:
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RunError(f"tritonserver ended: {_cause(Path(server.log))}")
        try:
            with DIRECT.open(f"http://{ADDRESS}:{server.http}/v2/health/ready", timeout=2):
                if _listens(server):
                    return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(POLL_S)
    raise RunError(f"tritonserver is not ready after {READY_S:.0f} s; see {server.log}")


def _listens(server: Server) -> bool:
    """Whether it is this server that answers on its port, and none that took the port meanwhile."""
    for process in _processes(server):
        with contextlib.suppress(psutil.Error):
            if any(
                each.status == psutil.CONN_LISTEN and each.laddr.port == server.http
                for each in process.net_connections("tcp")
            ):
                return True
    return False


def _cause(log: Path) -> str:
    """What the server's log says of its end: the first model that did not load, else the last error line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        found = re.search(r"failed to load '([^']+)' version \d+: (.*?)\"?$", line)
        if found is not None:
            return f"model '{found[1]}': {found[2]} (all of it: {log})"
    # Triton's lines begin with their level, then date and time.
    errors = [line for line in lines if re.match(r"E\d{4} ", line)] or lines[-1:]
    message = errors[-1].partition("] ")[2] or errors[-1] if errors else "it said nothing"
    return f"{message} (all of it: {log})"


def _check_free(ports: Sequence[int]) -> None:
    for name, port in zip(("HTTP", "gRPC", "metrics"), ports, strict=True):
        try:
            socket.create_server((ADDRESS, port)).close()
        except OSError as problem:
            reason = os.strerror(problem.errno or 0)
            raise RunError(
                f"port {port} of {ADDRESS}, for {name}, cannot be had ({reason}); --port takes the first of three free "
                "ones in a row, and without it some are found"
            ) from problem


def _free_ports(count: int) -> tuple[int, ...]:
    with contextlib.ExitStack() as held:  # all at once, so that no two are the same
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((ADDRESS, 0))
        return tuple(each.getsockname()[1] for each in sockets)
