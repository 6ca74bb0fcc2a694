"""Items of a choice task of one's own: a `.jsonl` file, one object per line.

    {"prompt": "Question: Which of these floats?\\nAnswer:", "choices": ["a cork", "a stone"], "answer": 0}

They are data alone. A task's definition of lm-eval's is a program, whose templates and functions run with one's rights.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trsp_deploy.errors import TextError
from trsp_deploy.reading import read_text, user_path, what_is_wrong
from trsp_deploy.tools.sources.texts import Texts

EXAMPLE = '{"prompt": "...", "choices": ["...", "..."], "answer": 0}, answer being the right choice, from 0'


class ChoiceItem(BaseModel):
    """One item: the model answers with the choice that it finds likeliest behind the prompt and a space.

    Keys that an item has besides are nobody's concern here.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    prompt: Annotated[str, Field(min_length=1)]
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]  # the right choice's place, from 0

    @model_validator(mode="after")
    def _one_is_right(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer} where there are {len(self.choices)} choices")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two of the choices are the same")
        return self


def load_items(task: str) -> Texts:
    """The items of a task's file, each a document: the JSON of its prompt, choices and answer.

    task: the file's name. Raises TextError with one line when it is missing, unreadable or empty, or a line is no item.
    """
    where, path = f"zero-shot task '{task}'", user_path(task)
    items = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it would split at.
    for number, line in enumerate(read_text(path, TextError, where).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(ChoiceItem.model_validate_json(line).model_dump_json())
        except ValidationError as problem:
            wrong = what_is_wrong(problem, ChoiceItem)
            raise TextError(f"{where}: line {number}: {wrong}; an item is {EXAMPLE}") from problem
    if not items:
        raise TextError(f"{where}: holds no items")
    digest = hashlib.sha256(json.dumps(items).encode())
    return Texts(name=task, origin=str(path.resolve()), documents=tuple(items), fingerprint=digest.hexdigest())
