"""What a comparison is of: an engine folder, a run folder (one of its engines), or a decoder's ONNX file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trsp_deploy.artifacts import ENGINE_MANIFEST, RUN_MARK, RunLayout, check_is_run, check_no_sweep, model_of_engine
from trsp_deploy.decoder import DecoderSize, decoder_size, known_positions, load_config, max_positions
from trsp_deploy.errors import EngineUnavailable, RunError, first_line, nearest, passes_through
from trsp_deploy.recipe import EngineSpec, engine_name, kept_recipe
from trsp_deploy.results import Role
from trsp_deploy.tools.library import wanted_engines
from trsp_deploy.tools.runners import EngineManifest, check_can_run, check_fresh, device_of, read_manifest
from trsp_deploy.tools.runners.graph_files import graph_bytes


@dataclass(frozen=True)
class Subject:
    """Something that can be measured."""

    path: Path  # engine folder or ONNX file
    spec: EngineSpec | None  # None for an ONNX file
    vocabulary: int
    cuts_logits: bool  # whether it computes logits of the last position alone when asked for no more
    size: DecoderSize | None  # None where the model's config is not at hand
    positions: int | None = None  # tokens that it was made for, where that is known
    architecture: str = ""  # by its config; empty where that is not at hand
    size_bytes: int | None = None  # of the files that running needs; None where nobody looked

    @property
    def device(self) -> str:
        """Device that the subject runs on: "cpu" or "cuda"."""
        return "cpu" if self.spec is None else device_of(self.spec)

    @property
    def name(self) -> str:
        """Name for people: the engine's; for a file its folder's, else its own."""
        return (self.path.parent.name or self.path.stem) if self.spec is None else self.spec.name


def find_subject(path: Path, role: Role, engine: str | None) -> Subject:
    """What `path` stands for; `engine` names one of a run folder's engines, else the first that runs here is taken.

    Raises RunError when there is nothing to measure, EngineUnavailable when it cannot run here.
    """
    if path.suffix == ".onnx":
        return _from_onnx(path)
    if (path / ENGINE_MANIFEST).is_file():
        return _from_engine(path)
    if RunLayout(path).is_run:
        return _from_engine(find_engine(path, role, engine))
    check_no_sweep(path)
    if path.is_file():
        raise RunError(f"{path}: is no .onnx file; give an engine folder, a run folder or an .onnx file")
    there = "is a folder without" if path.is_dir() else "is not there, and so has no"
    raise RunError(
        f"{path}: {there} {ENGINE_MANIFEST} or {RUN_MARK}; give an engine folder, a run folder or an .onnx file"
    )


def _from_onnx(path: Path) -> Subject:
    import onnx

    if not path.is_file():
        raise RunError(f"{path}: no such file")
    try:
        graph, size_bytes = onnx.load(path, load_external_data=False).graph, graph_bytes(path)
    except Exception as problem:  # protobuf's own error, which is no OSError
        raise RunError(f"{path}: not an ONNX file ({type(problem).__name__})") from problem
    logits = next((output for output in graph.output if output.name == "logits"), None)
    if logits is None:
        raise RunError(f"{path}: has no output `logits`, so it is no decoder")
    shape = logits.type.tensor_type.shape.dim
    vocabulary = shape[-1].dim_value if shape else 0
    if vocabulary < 1:
        raise RunError(
            f"{path}: its output `logits` does not say how many tokens there are; its last axis needs a number"
        )
    return Subject(path=path, spec=None, vocabulary=vocabulary, cuts_logits=False, size=None, size_bytes=size_bytes)


def _from_engine(folder: Path) -> Subject:
    manifest = _usable(folder)
    subject = Subject(
        path=folder,
        spec=manifest.spec,
        vocabulary=int(manifest.outputs["logits"][1][-1]),
        cuts_logits=any(outcome.changed for outcome in manifest.passes if outcome.name == "cut-logits"),
        size=None,
        size_bytes=manifest.size_bytes,
    )
    model = model_of_engine(folder)
    if model is None or not (model / "config.json").is_file():
        return subject
    try:
        size, positions, kind = decoder_size(model), positions_of(model), load_config(model).model_type
    except Exception as problem:  # of a config that was changed, or by code of the model's own
        if passes_through(problem):
            raise
        raise RunError(f"{model / 'config.json'}: transformers cannot read it ({first_line(problem)})") from problem
    return dataclasses.replace(subject, size=size, positions=positions, architecture=kind)


def _usable(folder: Path) -> EngineManifest:
    """An engine's manifest; raises EngineUnavailable where it cannot run here or its run has another model by now."""
    manifest = read_manifest(folder)
    check_fresh(folder, manifest)
    check_can_run(manifest.spec)
    return manifest


def positions_of(model: Path) -> int | None:
    """Tokens that an engine of the model in a folder holds for; None where its config does not say."""
    return None if known_positions(model) is None else max_positions(model)


def find_engine(run: Path, role: Role, name: str | None) -> Path:
    """Folder of a run's engine, the one named or the first that runs here.

    Raises RunError when there is none, EngineUnavailable when the one named is of another model than the run's.
    """
    check_is_run(run)
    layout = RunLayout(run)
    built = _built(run, (role,))
    if name is None:
        folders = {each: [layout.engine(each, role)] for each in built}
        return layout.engine(_first_that_runs(run, folders), role)
    if name not in built:
        raise RunError(f"{run}: has no engine '{name}'{nearest(name, built)}; built: {', '.join(built) or 'none'}")
    folder = layout.engine(name, role)
    check_fresh(folder, read_manifest(folder))
    return folder


def common_engine(dense: Path, pruned: Path) -> str:
    """The first engine that one run has of its dense model and the other, or the same one, of its pruned, and of which
    both run here; RunError when there is none."""
    there = _built(pruned, ("pruned",))
    both = [name for name in _built(dense, ("dense",)) if name in there]
    if not both and dense != pruned:
        said = ", ".join(_built(dense, ("dense",))) or "none"
        raise RunError(f"{dense} has engines of {said}, {pruned} of {', '.join(there) or 'none'}: no comparison")
    pairs = {name: [RunLayout(dense).engine(name, "dense"), RunLayout(pruned).engine(name, "pruned")] for name in both}
    return _first_that_runs(dense, pairs)


def _built(run: Path, roles: Sequence[Role]) -> list[str]:
    """A run's engines in the order in which its recipe names them, as `check` and `baseline` take them; then others."""
    folders = sorted(RunLayout(run).engines.glob("*"))
    built = [folder.name for folder in folders if all((folder / role).is_dir() for role in roles)]
    wanted = [name for name in _wanted(run) if name in built]
    return [*wanted, *(name for name in built if name not in wanted)]


def _wanted(run: Path) -> list[str]:
    """The engines of a run's recipe; none where it cannot be read: what was built can be measured all the same."""
    recipe = kept_recipe(run / RUN_MARK)
    return [] if recipe is None else [engine_name(engine) for engine in wanted_engines(recipe.engines)]


def _first_that_runs(run: Path, engines: Mapping[str, Sequence[Path]]) -> str:
    """engines: by name, folders that all have to run."""
    reasons = []
    for engine, folders in engines.items():
        try:
            for folder in folders:
                _usable(folder)
            return engine
        except EngineUnavailable as problem:
            reasons.append(f"{engine}: {problem}")
    raise RunError(f"{run}: no engine that runs here ({'; '.join(reasons) or 'none was built'})")
