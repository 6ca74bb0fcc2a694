"""Text that the dense model writes itself, to train on beside the calibration text.

    documents = write_texts(model, tokenizer, tokens=32_768, context_length=256, seed=0)

A calibration text has one domain, and what is trained on it alone forgets the others. What a model with a chat template
puts into a user's mouth, and then answers, is spread over what it was tuned for; what any other writes from its first
token on, over what it was trained on. A conversation becomes a document as any instruction data set does: the user's
words, a blank line, the answer, and nothing of the template, which would be the same in all of them.

Sources: self-calibration, Williams et al. 2025, arXiv 2410.17170 (text to calibrate quantisation and pruning with);
LLM-QAT, Liu et al. 2023, arXiv 2305.17888 (text to train on); Magpie, Xu et al. 2024, arXiv 2406.08464 (an aligned
model writes instructions when its template opens a user's turn).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from trsp_deploy.errors import RecipeError, first_line
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training.checkpoints import Checkpoints
from trsp_deploy.tools.training.heap import kept_heap

TEMPERATURE = 0.6  # what is written at 0.8 or 1 teaches less of instructions (docs/log.md)
TOKENS_AT_ONCE = 16_384  # in the KV cache: texts of up to 256 tokens are written 64 at a time
USUAL_SHARE = 0.75  # of the longest text, what one is expected to come to before any is written
# Stand for what user and assistant say in a chat template; of the private use area, so that no template has them.
WORDS, ANSWER = "\ue000", "\ue001"
WITHOUT = "`--set calibration.self_generated=0` trains on the calibration text alone"


@dataclass(frozen=True)
class Form:
    """What each text begins with, where it ends, and what of it is the template's."""

    opening: tuple[int, ...]  # tokens before the user's words, or the model's first (BOS)
    between: str  # the template's from the end of the user's words to the answer; empty: there is one piece
    end: int | None  # token; None: a text ends where there is no more room
    ends: int  # how many of them a whole text has: a user's turn may end with one too


def form_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Form:
    """A conversation of one turn each where there is a chat template, else a text from the model's first token (BOS).

    Raises RecipeError for a model that has neither, or a template that takes no such conversation.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": ANSWER}]
        before, _, between = _templated(tokenizer, turns[:1], add_generation_prompt=True).partition(WORDS)
        opening = _ids(tokenizer, before.rstrip(" "))  # a word brings the space in front of it
        if opening:  # some templates begin with the user's words
            closing = _ids(tokenizer, _templated(tokenizer, turns).partition(ANSWER)[2].strip())
            marked = len(closing) == 1 or (closing and closing[0] in tokenizer.added_tokens_decoder)
            end = closing[0] if marked else tokenizer.eos_token_id
            return Form(tuple(opening), between.strip(), end, 1 + _ids(tokenizer, between).count(end))
    first = model.config.bos_token_id
    if not isinstance(first, int):
        raise RecipeError(
            f"calibration.self_generated: {type(model).__name__} has nothing to begin a text with (no chat template, "
            f"no bos_token_id in its config.json); {WITHOUT}"
        )
    return Form((first,), "", tokenizer.eos_token_id, 1)


def check_can_write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context_length: int) -> Form:
    """The form of its texts; `model` may be one without weights.

    Raises RecipeError for a model that has nothing to begin a text with, or a context too short for it.
    """
    form = form_of(model, tokenizer)
    if len(form.opening) >= context_length:
        raise RecipeError(
            f"calibration.context_length {context_length}: no room for a text by the model, which begins with "
            f"{len(form.opening)} tokens of its chat template; take more, or {WITHOUT}"
        )
    return form


def self_generated_windows(share: float, wanted: int, given: int) -> int:
    """How many of `wanted` windows the dense model writes, `given` being there of the calibration text.

    Where that is shorter than its part, all of it is read and the share kept: what was given is not put away for less.
    """
    own = round(share * wanted)
    return round(given * share / (1 - share)) if wanted - own > given else own


@kept_heap()
def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    context_length: int,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> list[str]:
    """Sample documents that come to at least `tokens` tokens, each of up to `context_length` with what opens it.

    checkpoints: where to go on after a kill. The documents are the same with and without one.
    Raises RecipeError for a model that has nothing to begin a text with, a context too short for it, or no text to say.
    """
    form = check_can_write(model, tokenizer, context_length)
    saved = None if checkpoints is None else checkpoints.load()
    documents: list[str] = [] if saved is None else saved["documents"]
    batches: int = 0 if saved is None else saved["batches"]
    seeds = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        _draw(seeds)
    done = _count(tokenizer, documents)
    with Meter("tokens by the dense model", tokens, min(done, tokens)) as meter, torch.no_grad():
        shown = done

        def show(written: int) -> None:
            nonlocal shown
            if shown < (reached := min(done + written, tokens)):
                meter.advance(by=reached - shown)
                shown = reached

        while done < tokens:
            usual = done / len(documents) if documents else USUAL_SHARE * context_length
            size = min(batch_size(context_length), math.ceil((tokens - done) / usual))
            written = _sampled(model, form, size, context_length, _draw(seeds), show)
            found = [document for ids in written.tolist() if (document := _document(tokenizer, form, ids))]
            if not found:
                raise RecipeError(
                    f"calibration.self_generated: {type(model).__name__} wrote {size} texts without a word; {WITHOUT}"
                )
            documents += found
            batches, done = batches + 1, _count(tokenizer, documents)
            if checkpoints is not None and checkpoints.due():
                checkpoints.save({"documents": documents, "batches": batches})
    return documents


def batch_size(context_length: int) -> int:
    """Texts that are written side by side, at most."""
    return max(1, TOKENS_AT_ONCE // context_length)


def _sampled(
    model: PreTrainedModel, form: Form, size: int, context_length: int, seed: int, show: Callable[[int], None]
) -> torch.Tensor:
    """Tokens (size, up to context_length) that the model writes; what stands behind a text's end is none of it."""
    batch = torch.tensor([form.opening] * size, device=model.device)
    end = -1 if form.end is None else form.end
    own, written = model.generation_config, 0
    # In the model's place: what is handed to `generate` takes the model's own temperature and so on for what is at its
    # default.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, pad_token_id=max(end, 0)
    )

    def is_over(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        # `generate` asks after every token which texts are to go on.
        nonlocal written
        over = (input_ids[:, len(form.opening) :] == end).sum(dim=1) >= form.ends
        written += int((~over).sum())
        show(written)
        return over

    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            texts: torch.Tensor = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=context_length - len(form.opening),
                stopping_criteria=StoppingCriteriaList([is_over]),
            )
    finally:
        model.generation_config = own
    return texts.cpu()


def _document(tokenizer: PreTrainedTokenizerBase, form: Form, ids: list[int]) -> str:
    """What was written, without the template's part and special tokens; empty for a text without a word."""
    ids = ids[len(form.opening) :]
    ends = [place for place, token in enumerate(ids) if token == form.end]
    text = str(tokenizer.decode(ids[: ends[form.ends - 1]] if len(ends) >= form.ends else ids))
    pieces = text.split(form.between, 1) if form.between else [text]
    for special in _special_tokens(tokenizer):
        pieces = [piece.replace(special, "") for piece in pieces]
    return "\n\n".join(piece.strip() for piece in pieces if piece.strip())


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Those with a role (BOS, EOS, ...), and those that only a chat template knows; the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


def _count(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> int:
    """Tokens of the documents as windows are cut of them: joined by a blank line."""
    return len(_ids(tokenizer, "\n\n".join(documents)))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _templated(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **how: Any) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **how)
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ) as problem:  # a template is the model's code
        raise RecipeError(
            f"calibration.self_generated: the model's chat template takes no conversation of one turn "
            f"({first_line(problem)}); {WITHOUT}"
        ) from problem
    assert isinstance(text, str)
    return text


def _draw(seeds: torch.Generator) -> int:
    return int(torch.randint(2**62, (1,), generator=seeds))
