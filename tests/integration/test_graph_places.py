"""A graph's weights lie in its folder, as files of their own, or there is one line before anything is built."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest

from tests.tiny import tiny_model
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import ExportSettings
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec

WEIGHTS = f"{FILE}_data"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph-places")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "model")
    (folder / "graph").mkdir()
    export_onnx(folder / "model", "fp32", ExportSettings(), folder / "graph")
    return folder / "graph"


@pytest.fixture
def graph(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "my graph")
    return tmp_path / "my graph" / FILE


def refused(graph: Path, words: str, out: Path) -> str:
    """What the build of each engine says, which has these words."""
    said = set()
    for name in ("ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int4"):
        with pytest.raises(EngineUnavailable, match=words) as caught:
            build_engine(graph, load_engine_spec(name), out)
        said.add(str(caught.value))
    (line,) = said
    assert not out.exists()
    return line


def moved(graph: Path, location: str) -> None:
    """Let a graph look for its weights somewhere else."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    graph.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../weights", "sub/../../weights", "{folder}/weights"])
def test_weights_of_another_folder_are_neither_read_nor_copied(graph: Path, tmp_path: Path, location: str) -> None:
    """ONNX Runtime's engine for CUDA is a copy of the graph's files, each where the graph has it."""
    (graph.parent / WEIGHTS).rename(tmp_path / "weights")
    moved(graph, location.format(folder=tmp_path))
    refused(graph, "its weights are in '.*weights', which is not within its folder", tmp_path / "engine")


def test_a_link_out_of_a_graphs_folder_is_not_followed(graph: Path, tmp_path: Path) -> None:
    weights = graph.parent / WEIGHTS
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    refused(graph, f"{WEIGHTS}: is a link out of the graph's folder; ", tmp_path / "engine")


def test_weights_with_a_second_name_are_one_line_whose_command_helps(graph: Path, tmp_path: Path) -> None:
    """As after `cp -al`: an engine lacked its passes then, and one in integers ended in a traceback."""
    os.link(graph.parent / WEIGHTS, tmp_path / "copy")
    line = refused(graph, f"{WEIGHTS}: has a second name on the disk ", tmp_path / "engine")
    _, command, rest = line.split("`")
    assert rest == " makes it a file of its own"
    subprocess.run(command, shell=True, check=True)
    assert build_engine(graph, load_engine_spec("ort-cpu-int4"), tmp_path / "engine").files
    assert (tmp_path / "copy").stat().st_size == (graph.parent / WEIGHTS).stat().st_size
