"""Starting and stopping a server's process, with a stand-in program: which one is ours, and one at a time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from tests.breadth import BREADTH
from tests.command import PYTHON_SCRIPT
from trsp_deploy.artifacts import writing_alone
from trsp_deploy.errors import RunError, StorageError
from trsp_deploy.stages.serve_bench import started
from trsp_deploy.tools.triton_server import process
from trsp_deploy.tools.triton_server.process import Installation, Server, find, start, stop

# Answers "ready" at --http-port, as tritonserver does once it has loaded everything.
READY = f"""{PYTHON_SCRIPT}import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

options = dict(option.removeprefix("--").split("=", 1) for option in sys.argv[1:])
HTTPServer(("127.0.0.1", int(options["http-port"])), Ready).serve_forever()
"""
# Has a model's process beside it, as the Python backend makes them, which does not end with it.
WITH_A_MODEL = READY.replace(
    "HTTPServer((",
    'subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", options["backend-config"]])\nHTTPServer((',
).replace("import sys\n", "import subprocess\nimport sys\n", 1)
# Does not end when it is asked to.
STUBBORN = READY.replace("import sys\n", "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n", 1)
STUBBORN_WITH_A_MODEL = WITH_A_MODEL.replace(
    "import sys\n", "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n", 1
)
# `bench-server` in the middle of a measurement: repository, program and the folder in place of /dev/shm are given.
BENCH = """
import sys, time
from pathlib import Path
from trsp_deploy.cli.supervision import supervised
from trsp_deploy.stages.serve_bench import started
from trsp_deploy.tools.triton_server import process

def work():
    try:
        with started(repository, None):
            server = process.find(repository)
            (process.SHARED_MEMORY / f"{server.shared_memory}1").touch()
            print("loads", flush=True)
            time.sleep(60)
    finally:
        print("stopped", flush=True)

repository, program, process.SHARED_MEMORY = map(Path, sys.argv[1:])
process.find_installation = lambda server: process.Installation(binary=program)
supervised(work)
"""
# Finds its port taken, after the other server has answered for it.
ENDS = """#!/bin/sh
while [ ! -e "$(dirname "$0")/answered" ]; do sleep 0.01; done
echo 'E1128 19:30:00.000000 1 main.cc:1] failed to start HTTP service: Unavailable - Socket already in use'
exit 1
"""


@pytest.fixture
def another(tmp_path: Path) -> Iterator[int]:
    """The port of a server of somebody else, which is ready."""

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            (tmp_path / "answered").touch()

    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path / "home"))
    folder = tmp_path / "repository"
    folder.mkdir()
    yield folder
    stop(folder, grace_s=0)


def program(folder: Path, text: str) -> Installation:
    path = folder.parent / "tritonserver"
    path.write_text(text)
    path.chmod(0o755)
    return Installation(binary=path)


def free_ports() -> tuple[int, int, int]:
    http, grpc, metrics = process._free_ports(3)
    return http, grpc, metrics


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_port_that_is_taken_is_one_line_before_anything_starts(taken: int, repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        free = free_ports()
        ports = (*free[:taken], port, *free[taken + 1 :])
        with pytest.raises(RunError) as caught:
            start(repository, program(repository, READY), (ports[0], ports[1], ports[2]))
    name = ("HTTP", "gRPC", "metrics")[taken]
    assert str(caught.value) == (
        f"port {port} of 127.0.0.1, for {name}, cannot be had (Address already in use); --port takes the first of "
        "three free ones in a row, and without it some are found"
    )


def test_another_server_that_is_ready_on_our_port_is_not_ours(
    another: int, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it takes the port between our look and our server's."""
    monkeypatch.setattr(process, "_check_free", lambda ports: None)
    _, grpc, metrics = free_ports()
    with pytest.raises(RunError, match="tritonserver ended: failed to start HTTP service"):
        start(repository, program(repository, ENDS), (another, grpc, metrics))
    assert find(repository) is None


def test_of_two_starts_at_once_one_serves_and_is_found(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_looked = threading.Barrier(2)

    def found(folder: Path) -> Server | None:
        server = find(folder)
        with contextlib.suppress(threading.BrokenBarrierError):  # one waits for the other, which may not look yet
            both_looked.wait(timeout=1)
        return server

    monkeypatch.setattr(process, "find", found)
    installation = program(repository, READY)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(start, repository, installation) for _ in range(2)]
    (refused,) = [each.exception() for each in both if each.exception() is not None]
    (served,) = [each.result() for each in both if each.exception() is None]
    assert f"is served already on port {served.http}" in str(refused)
    assert find(repository) == served
    assert stop(repository).was_running and process._processes(served) == []


def test_what_a_killed_server_left_is_no_server(repository: Path) -> None:
    installation = program(repository, WITH_A_MODEL)
    killed = psutil.Process(start(repository, installation).pid)
    killed.kill()
    killed.wait()
    assert find(repository) is None
    again = start(repository, installation)
    assert find(repository) == again and again.pid != killed.pid


def test_a_path_that_a_shell_would_split_is_given_to_the_server_as_a_link(repository: Path) -> None:
    spaced = repository.parent / "my models; (é)"
    spaced.mkdir()
    server = start(spaced, program(repository, READY))
    (given,) = [
        Path(option.removeprefix("--model-repository="))
        for option in psutil.Process(server.pid).cmdline()
        if option.startswith("--model-repository=")
    ]
    assert re.fullmatch(r"[\w/.-]+", str(given)) and given.samefile(spaced)
    assert stop(spaced, grace_s=0).was_running


def test_a_home_that_a_shell_would_split_is_one_line_where_a_model_starts_from_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the backend of an environment, and the link to a repository; a container's server needs neither."""
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(repository.parent / "my home"))
    spaced = repository.parent / "my models"
    spaced.mkdir()
    server = program(repository, READY)
    of_environment = replace(server, backends=repository, stub=server.binary)
    for folder, installation in ((repository, of_environment), (spaced, server)):
        with pytest.raises(
            RunError, match="Triton cannot start a model from there; set TRSP_DEPLOY_HOME to a path without"
        ):
            start(folder, installation)
    assert find(repository) is None
    assert start(repository, server) == find(repository)


def test_stopping_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder, and no server was started on it"):
        stop(tmp_path / "nowhere")


def test_stopping_what_was_never_served_writes_nothing(repository: Path) -> None:
    assert not stop(repository).was_running
    assert not process._folder(repository).parent.exists()


def test_a_start_that_fails_leaves_alone_what_was_started_since(repository: Path) -> None:
    first = start(repository, program(repository, READY))
    last = first.model_copy(update={"shared_memory": "trsp-00000000-", "pid": 0})
    process._clear_up(repository, last)
    assert find(repository) == first


def test_a_servers_python_takes_no_module_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib" / "python3.99" / "site-packages" / "pytriton" / "tritonserver").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    Path("sysconfig.py").write_text("open('ran', 'w').close()")
    with pytest.raises(RunError, match=r"Python 3\.99"):
        process.find_installation(tmp_path)
    assert not Path("ran").exists()


def test_an_environment_whose_python_is_gone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "lib" / "python3.11" / "site-packages" / "pytriton" / "tritonserver").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match="its Python does not run"):
        process.find_installation(tmp_path)


def test_another_machine_with_the_same_home_leaves_a_server_alone(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees none of its processes, and would take it for one that was killed."""
    installation = program(repository, READY)
    first = start(repository, installation)
    with monkeypatch.context() as there:
        there.setattr(socket, "gethostname", lambda: "another")
        there.setattr(process, "_processes", lambda server: [])
        assert find(repository) is None and not stop(repository).was_running
    assert find(repository) == first and stop(repository).was_running


def test_a_server_that_cannot_be_recorded_does_not_stay(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Server] = []

    def full(path: Path, server: Server) -> None:
        launched.append(server)
        raise StorageError("the disk is full")

    monkeypatch.setattr(process, "write_json", full)
    with pytest.raises(StorageError, match="the disk is full"):
        start(repository, program(repository, READY))
    (server,) = launched
    assert not psutil.pid_exists(server.pid) and process._processes(server) == []


def test_a_repository_in_a_folder_whose_name_is_not_utf_8_is_served(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = repository.parent / os.fsdecode(b"m\xff")
    (place / "models").mkdir(parents=True)
    monkeypatch.chdir(place)
    server = start(Path("models"), program(repository, READY))
    assert find(Path("models")) == server and stop(Path("models"), grace_s=0).was_running


def test_what_is_said_to_stop_a_server_can_be_copied(repository: Path) -> None:
    spaced = repository.parent / "my models"
    with pytest.raises(RunError, match=f"`trsp-deploy triton RUN --out '{spaced}'` writes one"):
        start(spaced, program(repository, READY))
    spaced.mkdir()
    start(spaced, program(repository, READY))
    with pytest.raises(RunError, match=f"is served already on port [0-9]+; `trsp-deploy triton-stop '{spaced}'`"):
        start(spaced, program(repository, READY))
    assert stop(spaced, grace_s=0).was_running


def test_a_repository_that_is_being_written_is_not_served(repository: Path) -> None:
    """A model that is not whole keeps the server from starting."""
    said = rf"repository: in use by another trsp-deploy \(process {os.getpid()}\)"
    with writing_alone(repository, within=True), pytest.raises(RunError, match=said):
        start(repository, program(repository, READY))
    assert find(repository) is None
    assert start(repository, program(repository, READY)) == find(repository)


@pytest.fixture
def stubborn(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in place of /dev/shm, where servers do not end when they are asked to."""
    monkeypatch.setattr(process, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(process, "find_installation", lambda server=None: program(repository, STUBBORN))
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


@pytest.mark.alone  # of its three seconds one is given to the server
def test_ctrl_c_in_a_bench_leaves_nothing_of_its_server(repository: Path, stubborn: Path) -> None:
    """The process that waits for it kills it after a second, and the server had thirty."""
    with pytest.raises(KeyboardInterrupt), started(repository, None):
        server = find(repository)
        assert server is not None
        (stubborn / f"{server.shared_memory}1").touch()
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 3
    assert not list(stubborn.iterdir()) and not (process._folder(repository) / process.STATE).exists()
    assert not process._processes(server)


@BREADTH
@pytest.mark.alone
def test_ctrl_c_in_a_bench_leaves_nothing_within_the_second_that_it_has(repository: Path, tmp_path: Path) -> None:
    """The process that waits for it adopts the models of the killed server, and they stay zombies until it ends."""
    (tmp_path / "shm").mkdir()
    server = program(repository, STUBBORN_WITH_A_MODEL)
    command = [sys.executable, "-c", BENCH, repository, server.binary, tmp_path / "shm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as bench:
        assert bench.stdout is not None and bench.stdout.readline() == b"loads\n"
        assert list((tmp_path / "shm").iterdir())
        bench.send_signal(signal.SIGINT)
        assert bench.stdout.read() == b"stopped\n"
    assert not list((tmp_path / "shm").iterdir()) and not (process._folder(repository) / process.STATE).exists()


def test_ctrl_c_while_a_server_ends_leaves_nothing_of_it(
    repository: Path, stubborn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(repository, process.find_installation())
    (stubborn / f"{server.shared_memory}1").touch()
    wait_procs = psutil.wait_procs
    with monkeypatch.context() as interrupted:

        def wait(*_: object, **__: object) -> None:
            interrupted.setattr(psutil, "wait_procs", wait_procs)
            raise KeyboardInterrupt

        interrupted.setattr(psutil, "wait_procs", wait)
        with pytest.raises(KeyboardInterrupt):
            stop(repository)
    assert not list(stubborn.iterdir()) and not (process._folder(repository) / process.STATE).exists()
    assert not process._processes(server)
