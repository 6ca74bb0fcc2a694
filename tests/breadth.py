"""What `make test-breadth` adds to the default tests, which should take ten minutes: those of several seconds.

Whole jobs, other parameters, and what few users meet; CI runs both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

BREADTH = pytest.mark.breadth


def by_default(wanted: Collection[Any], everything: Iterable[Any]) -> list[Any]:
    """`everything` in its order; what is not `wanted` by default is marked."""
    parameters = list(everything)
    assert all(each in parameters for each in wanted), f"{wanted}: not all of them are parameters"
    return [each if each in wanted else _marked(each) for each in parameters]


def _marked(parameter: Any) -> Any:
    values = parameter if isinstance(parameter, tuple) else (parameter,)
    return pytest.param(*values, marks=BREADTH)
