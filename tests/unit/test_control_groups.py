"""How many cores a container leaves, and that ONNX Runtime takes no more."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from trsp_deploy.artifacts import control_groups
from trsp_deploy.artifacts.control_groups import usable_cores
from trsp_deploy.cli import app
from trsp_deploy.pipeline import pruning
from trsp_deploy.tools.runners import ort_session


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
        # A group's limit holds for those within it.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/pod\n3:memory:/\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/elsewhere\n",  # the container sees its own group as the root
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
    ],
)
def test_a_containers_limit_counts(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cores(tmp_path) == cores


def test_onnx_runtime_has_as_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[opset]), tmp_path / "model.onnx")
    monkeypatch.setattr(ort_session, "usable_cores", lambda: 3)
    for threads, expected in ((None, 3), (1, 1)):
        session = ort_session.create_session(tmp_path / "model.onnx", "onnxruntime-cpu", threads)
        assert session.get_session_options().intra_op_num_threads == expected


def test_what_is_kept_with_a_figure_is_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline made with a quota of 4 cores does not serve one of 2."""
    module = importlib.import_module("trsp_deploy.artifacts.provenance")  # the package has a function of that name
    monkeypatch.setattr(module, "usable_cores", lambda: 3)
    assert module._here.__wrapped__().cores == 3


@pytest.mark.parametrize(
    ("quota", "given", "threads"), [(3, None, "3"), (3, "5", "5"), (16, None, None), (16, "5", "5")]
)
def test_torch_keeps_to_a_containers_quota(
    quota: int, given: str | None, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the cores that it may run on alone, and takes a thread for each of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(control_groups, "usable_cores", lambda: quota)
    environment = {} if given is None else {"OMP_NUM_THREADS": given}
    monkeypatch.setattr(os, "environ", environment)
    app.asked_for()
    assert environment.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("device", "of_a_launch", "threads"), [("cuda", True, [7]), ("cuda", False, []), ("cpu", True, [])]
)
def test_the_main_process_of_a_launch_on_gpus_computes_with_every_core(
    device: str, of_a_launch: bool, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher leaves it one thread, on which a sharded model's perplexity was computed. Beside other processes that
    train on the cores they stay divided."""
    taken: list[int] = []
    monkeypatch.setattr(pruning, "in_a_group", lambda: of_a_launch)
    monkeypatch.setattr(pruning, "usable_cores", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    pruning._take_cores(device)
    assert taken == threads
