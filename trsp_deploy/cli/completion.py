"""Names that a shell completes an option with; each is looked up when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes."""
    from trsp_deploy.tools.library import recipe_names

    return _beginning(recipe_names(), incomplete)


def engines(incomplete: str) -> list[str]:
    """Shipped engine specs."""
    from trsp_deploy.tools.library import engine_names

    return _beginning(engine_names(), incomplete)


def engines_or_auto(incomplete: str) -> list[str]:
    """What `--engine` takes."""
    return [*_beginning(["auto"], incomplete), *engines(incomplete)]


def methods(incomplete: str) -> list[str]:
    """What `--method` takes."""
    from trsp_deploy.recipe import METHODS

    return _beginning(METHODS, incomplete)


def transfers(incomplete: str) -> list[str]:
    """What `--then` takes."""
    from trsp_deploy.recipe import TransferSettings

    return _beginning(get_args(TransferSettings.model_fields["form"].annotation), incomplete)


def models(incomplete: str) -> list[str]:
    """Short names of models."""
    from trsp_deploy.tools.sources.names import SHORT_NAMES

    return _beginning(SHORT_NAMES, incomplete)


def assets(incomplete: str) -> list[str]:
    """What `fetch` fetches."""
    from trsp_deploy.tools.sources.assets import ASSETS

    return _beginning(ASSETS, incomplete)


def tasks(incomplete: str) -> list[str]:
    """Choice tasks that are packaged."""
    from trsp_deploy.tools.sources.assets import ASSETS

    return _beginning((name for name, asset in ASSETS.items() if asset.kind == "task"), incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
