"""What records are made of: strictness, bounded numbers, and texts that are safe as names and paths."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

Value = TypeVar("Value")


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):  # which pydantic takes for 0 or 1
        raise ValueError("should be a number")
    return value


# Nobody means more, and sizes and times that are worked out of these still fit the integers of native code.
MOST = 10**9
NUMBER = BeforeValidator(_no_truth)  # the last of an annotation, for what stands behind it says no bounds in a schema
Count = Annotated[int, Field(ge=1, le=MOST), NUMBER]
Length = Annotated[int, Field(ge=2, le=MOST), NUMBER]  # of a window: a single token predicts none
Share = Annotated[float, Field(ge=0.0, le=1.0), NUMBER]
Positive = Annotated[float, Field(gt=0.0, le=MOST), NUMBER]
NonNegative = Annotated[float, Field(ge=0.0, le=MOST), NUMBER]
Seed = Annotated[int, Field(ge=0, lt=2**63), NUMBER]  # torch's generators take 64 bits
LONGEST_NAME = 100  # in bytes: a step's file is called by two of them, and no file's name has more than 255


def _no_longer(name: str) -> str:
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"should have at most {LONGEST_NAME} bytes")
    return name


Name = Annotated[str, Field(pattern=r"^\w[\w .+-]*$"), AfterValidator(_no_longer)]  # of a file or folder


def _below(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError("leads out of its folder; a relative path without `..` is valid")
    return path


RelativePath = Annotated[str, AfterValidator(_below)]  # below the folder of the record that holds it


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no file, dataset or task has in its name")
    return text


Text = Annotated[str, AfterValidator(_without_nul)]  # what becomes a path or a name elsewhere


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _no_other_twice(values: tuple[Value, ...]) -> tuple[Value, ...]:
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise ValueError(f"'{twice}' stands twice")
    return values


Different = Annotated[tuple[Text, ...], AfterValidator(_no_other_twice)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_no_other_twice)]
# One text as it is, or a list of them.
OneOrMore = Annotated[
    tuple[Text, ...],
    Field(min_length=1),
    AfterValidator(_no_other_twice),
    BeforeValidator(_as_list),
    PlainSerializer(lambda texts: texts[0] if len(texts) == 1 else list(texts)),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class Strict(BaseModel):
    """A frozen record that refuses unknown keys. In JSON, which has none, an infinite number is its name in quotes."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")
