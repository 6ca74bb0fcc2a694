"""A built engine as a model of lm-eval: likelihoods of continuations, which is all that choice tasks ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from scipy.special import log_softmax

from trsp_deploy.errors import EngineUnavailable, TextError, UserError
from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.generation import left_padded, prompt_tokens

# Tokens of one call where several texts share it: their logits are in the memory that a run is said to need.
MOST_TOKENS = 2048
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Wraps an open runner and the model's tokenizer; batches are padded on the left, as in generation."""

    def __init__(self, runner: Runner, tokenizer: Any, batch_size: int, longest: int) -> None:
        """longest: tokens that model and engine read in one call."""
        super().__init__()
        self._runner = runner
        self.tokenizer = tokenizer
        self._batch_size = batch_size
        self.max_length = longest  # as lm-eval's own models call it

    @property
    def eot_token_id(self) -> int | None:
        found: int | None = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """What an answer to no prompt follows: BOS, or EOS where there is none, as where lm-eval asks transformers."""
        begins: int | None = self.tokenizer.bos_token_id
        found = self.eot_token_id if begins is None else begins
        if found is None:
            raise TextError(
                "this task has items without a prompt, which begin with BOS or EOS, and the tokenizer has neither; "
                "take a task with prompts"
            )
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text that goes on: an EOS that the tokenizer puts there would part a choice from its prompt. One
        that begins with BOS gets no other, as where lm-eval asks transformers."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        encoded = self.tokenizer(string, return_special_tokens_mask=True, **options)
        return prompt_tokens(encoded["input_ids"], encoded["special_tokens_mask"])

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation, and whether greedy decoding would give it."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        found: dict[int, tuple[float, bool]] = {}
        while order:  # of about one length, so that little is padding
            longest = sum(map(len, requests[order[0]][1:]))
            together = max(1, min(self._batch_size, MOST_TOKENS // longest))
            rows, order = order[:together], order[together:]
            for index, answer in zip(rows, self._batch([requests[index] for index in rows]), strict=True):
                found[index] = answer
        return [found[index] for index in range(len(requests))]

    def _batch(self, requests: list[Request]) -> list[tuple[float, bool]]:
        longest = max(len(continuation) for _, _, continuation in requests)
        if longest > self.max_length:
            raise EngineUnavailable(
                f"a choice of {longest} tokens: model and engine read {self.max_length} in one call"
            )
        # An item that is longer loses its beginning, as it does where lm-eval asks transformers; a score counts these.
        texts = [(context + continuation)[:-1][-self.max_length :] for _, context, continuation in requests]
        input_ids, mask = left_padded(texts)
        try:
            logits = self._runner.prefill(input_ids, mask)  # (batch, sequence, vocabulary)
        except EngineUnavailable:
            # Profiles of fewer texts, a graph that takes no padding, or a GPU without room for so many.
            if len(requests) == 1:
                raise
        else:
            return [self._score(logits[row], continuation) for row, (_, _, continuation) in enumerate(requests)]
        half = len(requests) // 2  # only here, where the error no longer holds what the step had on the GPU
        return self._batch(requests[:half]) + self._batch(requests[half:])

    def _score(self, logits: np.ndarray, continuation: list[int]) -> tuple[float, bool]:
        scores = log_softmax(logits[-len(continuation) :], axis=-1)  # the continuation ends each row
        wanted = np.take_along_axis(scores, np.array(continuation)[:, None], axis=-1)
        return float(wanted.sum()), bool((scores.argmax(-1) == continuation).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise UserError("this task asks for whole texts' likelihoods; engines answer choice tasks alone")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise UserError("this task asks for generated text; engines answer choice tasks alone")
