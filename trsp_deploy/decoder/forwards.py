"""Other code in place of a module's forward, for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextlib.contextmanager
def forward_replaced(modules: Iterable[nn.Module], wrap: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Within the block each module runs `wrap(index in modules, its forward)`; afterwards what it ran before.

    An instance attribute stands in front of the class's forward: attributes that a model reads from its modules
    (a layer's `attention_type`, ...) stay reachable, which a wrapping module would hide. One that stood there already,
    put there by another block or by a library, is wrapped and comes back.
    """
    with contextlib.ExitStack() as undone:
        for index, module in enumerate(modules):
            undone.callback(_put_back, module, vars(module).get("forward"))
            module.forward = wrap(index, module.forward)
        yield


def _put_back(module: nn.Module, before: Forward | None) -> None:
    if before is not None:
        module.forward = before
    else:
        vars(module).pop("forward", None)
