"""What a linter says of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from trsp_deploy.recipe import Strict


def _shown(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()  # a file's name need not be UTF-8


Shown = Annotated[str, BeforeValidator(_shown)]


class Finding(Strict):
    """One thing that is wrong, or that may be."""

    severity: Literal["error", "warning"]
    model: Shown
    message: Shown

    def __str__(self) -> str:
        return f"{self.severity}: {self.model}: {self.message}"


Say = Callable[[str], Finding]


def type_name(tensor: Any) -> str:
    """The data type of an input, output or state of a config, such as TYPE_FP32; its number where that is unknown."""
    return value_name(tensor, "data_type")


def value_name(message: Any, field: str) -> str:
    """The name of a field's value, or the value itself where it has none: protobuf's text takes any number."""
    number = getattr(message, field)
    known = message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number
    return str(known[number].name if number in known else number)


def dims_with_batch(config: Any, tensor: Any) -> list[int]:
    """The dimensions that a backend hands on of an input, output or state of a config: the batch is the first."""
    reshaped = "reshape" in tensor.DESCRIPTOR.fields_by_name and tensor.HasField("reshape")
    dims = list(tensor.reshape.shape if reshaped else tensor.dims)
    return [-1, *dims] if config.max_batch_size else dims
