"""What a client may ask for, checked before anything is computed: one clear line for what cannot be."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

from trsp_deploy.errors import UserError
from trsp_deploy.reading import what_is_wrong
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.runners.generation import Sampling

MOST_STOPS = 16


class RequestError(UserError):
    """A request that cannot be answered."""


class GenerationRequest(Strict):
    """One request; names as TensorRT-LLM's and vLLM's Triton models have them."""

    text_input: Annotated[str, Field(min_length=1)]
    add_special_tokens: bool = True  # that the tokenizer puts around a text; a chat template has written its own
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    min_length: Annotated[int, Field(ge=0)] = 0  # new tokens before one may end the text
    stream: bool = False
    exclude_input_in_output: bool = True
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0  # 0 is greedy
    top_k: Annotated[int, Field(ge=0)] = 0  # 0 is all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Above 1 makes what is there less likely; one next to 0 would make logits infinite.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    ignore_eos: bool = False
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ()

    def sampling(self, end: tuple[int, ...]) -> Sampling:
        """How its tokens are chosen; `end` has the tokens that end a text."""
        return Sampling(
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            end=() if self.ignore_eos else end,
        )


def parse(values: dict[str, object]) -> GenerationRequest:
    """Check a request's inputs by name; raises RequestError with one line."""
    try:
        found = GenerationRequest.model_validate(values)
    except ValidationError as problem:
        raise RequestError(what_is_wrong(problem, GenerationRequest, "input")) from problem
    if len(found.stop) > MOST_STOPS:
        raise RequestError(f"input 'stop': {len(found.stop)} strings, at most {MOST_STOPS}")
    if found.min_length > found.max_tokens:
        raise RequestError(f"input 'min_length': {found.min_length}; at most 'max_tokens', {found.max_tokens}")
    return found
