"""Methods that are worked out once for each object, and whose results go with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

Owner = TypeVar("Owner")
Asked = ParamSpec("Asked")
Found = TypeVar("Found")


def cached_method(work: Callable[Concatenate[Owner, Asked], Found]) -> Callable[Concatenate[Owner, Asked], Found]:
    """`functools.cache` of a method, as a decorator; arguments are hashable.

    functools' own keeps every object that was ever asked, and so a run's models and texts, for as long as the process.
    """

    @functools.wraps(work)
    def cached(owner: Owner, /, *asked: Asked.args, **named: Asked.kwargs) -> Found:
        known: dict[Any, Found] = vars(owner).setdefault("_cached", {})
        key = (work.__name__, asked, tuple(named.items()))
        if key not in known:
            known[key] = work(owner, *asked, **named)
        return known[key]

    return cached
