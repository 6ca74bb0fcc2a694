"""What is wrong with a model that is made of the repository's other models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trsp_deploy.tools.model_repository.lint.finding import Finding, Say
from trsp_deploy.tools.model_repository.lint.versions import numbered, served


def against_steps(config: Any, folder: Path, configs: Mapping[str, Any], error: Say) -> Iterator[Finding]:
    """The steps of an ensemble beside the models that they name.

    configs: of the repository's models by their folders' names; None for one that has none to be read.
    """
    for step in config.ensemble_scheduling.step:
        if step.model_name not in configs:
            yield error(f"a step of the ensemble is model '{step.model_name}', which is not here")
            continue
        within, wanted = configs[step.model_name], f"version {step.model_version} of '{step.model_name}'"
        versions = numbered(folder.parent / step.model_name)
        if step.model_version > 0 and str(step.model_version) not in {version.name for version in versions}:
            yield error(f"a step of the ensemble is {wanted}, which is not here")
        elif step.model_version > 0 and within is not None:
            loaded = sorted(version.name for version in served(within, versions))
            if str(step.model_version) not in loaded:
                others = ", ".join(loaded) or "none"
                yield error(f"a step of the ensemble is {wanted}, whose version_policy loads {others}")
        # The server compares them unless the step takes no batch at all (ValidateEnsembleConfig in its core).
        if within is not None and 0 < within.max_batch_size < config.max_batch_size:
            yield error(
                f"max_batch_size {config.max_batch_size}, and step '{step.model_name}' takes {within.max_batch_size}"
            )
    if folder.name in _below(folder.name, configs):
        yield error("the ensemble is a step of its own, by way of its steps")


def _below(name: str, configs: Mapping[str, Any]) -> set[str]:
    """Names of the models that a model is made of, and of those that they are made of."""
    found: set[str] = set()
    left = [name]
    while left:
        config = configs.get(left.pop())
        steps = {step.model_name for step in config.ensemble_scheduling.step} if config is not None else set()
        left += steps - found
        found |= steps
    return found
