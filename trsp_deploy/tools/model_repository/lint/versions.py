"""The versions of a model, and which of them the server loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

VERSION = re.compile("[1-9][0-9]*")


def numbered(folder: Path) -> list[Path]:
    """The versions in a model's folder."""
    return [each for each in folder.iterdir() if each.is_dir() and VERSION.fullmatch(each.name)]


def served(config: Any, versions: list[Path]) -> list[Path]:
    """Of these versions those that the server loads: the latest one where the config does not say."""
    policy = config.version_policy
    if policy.HasField("all"):
        return versions
    if policy.HasField("specific"):
        return [version for version in versions if int(version.name) in policy.specific.versions]
    count = policy.latest.num_versions if policy.HasField("latest") else 1
    return sorted(versions, key=lambda version: int(version.name), reverse=True)[:count]
