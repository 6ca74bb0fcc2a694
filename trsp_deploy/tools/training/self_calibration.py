"""Text that the dense model writes itself, to train on beside the calibration text.

    windows = write_windows(model, opening(model, tokenizer), count=128, context_length=256, seed=0)  # (128, 256)

A calibration text has one domain, and what is trained on it alone forgets the others. What a model with a chat template
puts into a user's mouth, and then answers, is spread over what it was tuned for; what any other writes from its first
token on, over what it was trained on.

Sources: self-calibration, Williams et al. 2025, arXiv 2410.17170 (text to calibrate quantisation and pruning with);
LLM-QAT, Liu et al. 2023, arXiv 2305.17888 (text to train on); Magpie, Xu et al. 2024, arXiv 2406.08464 (an aligned
model writes instructions when its template opens a user's turn).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from trsp_deploy.errors import RecipeError
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training.checkpoints import Checkpoints
from trsp_deploy.tools.training.heap import kept_heap

TEMPERATURE = 0.8  # at 1 a small model soon writes what no text says (docs/log.md)
TOKENS_AT_ONCE = 16_384  # in the KV cache: windows of 256 tokens are written 64 at a time
PLACE = "\ue000"  # of a user's words in a chat template; of the private use area, so that no template has it


def opening(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that each text begins with: a user's turn where there is a chat template, else the model's first (BOS).

    Raises RecipeError for a model that has neither.
    """
    if tokenizer.chat_template:
        turn = tokenizer.apply_chat_template([{"role": "user", "content": PLACE}], tokenize=False)
        assert isinstance(turn, str)
        tokens: list[int] = tokenizer(turn.partition(PLACE)[0], add_special_tokens=False)["input_ids"]
        if tokens:  # some templates begin with the user's words
            return tokens
    first = model.config.bos_token_id
    if not isinstance(first, int):
        raise RecipeError(
            f"calibration.self_generated: {type(model).__name__} has nothing to begin a text with (no chat template, "
            "no bos_token_id in its config.json); `--set calibration.self_generated=0` trains on the calibration text "
            "alone"
        )
    return [first]


@kept_heap()
def write_windows(
    model: PreTrainedModel,
    begin: Sequence[int],
    count: int,
    context_length: int,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> torch.Tensor:
    """Sample windows (count, context_length) int64, each of which begins with `begin`.

    A text that is over before its window ends goes on with what the model puts after its end.
    checkpoints: where to go on after a kill. The windows are the same with and without one.
    """
    size = batch_size(context_length)
    seeds = torch.randint(2**62, (count // size + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    saved = None if checkpoints is None else checkpoints.load()
    written: list[torch.Tensor] = [] if saved is None else saved["written"]
    done = sum(map(len, written))
    with Meter("tokens by the dense model", count * context_length, done * context_length) as meter, torch.no_grad():
        while done < count:
            batch = torch.tensor([list(begin)[:context_length]] * min(size, count - done))
            written.append(_continued(model, batch, context_length, seeds[len(written)], meter))
            done += len(batch)
            if checkpoints is not None and checkpoints.due():
                checkpoints.save({"written": written})
    return torch.cat(written)


def batch_size(context_length: int) -> int:
    """Windows that are written side by side."""
    return max(1, TOKENS_AT_ONCE // context_length)


def _continued(
    model: PreTrainedModel, batch: torch.Tensor, context_length: int, seed: int, meter: Meter
) -> torch.Tensor:
    """A batch (windows, tokens) with its texts written on to (windows, context_length)."""
    meter.advance(by=batch.numel())
    if batch.shape[1] == context_length:
        return batch
    batch, own = batch.to(model.device), model.generation_config
    # In the model's place: what is handed to `generate` takes the model's own temperature and so on for what is at its
    # default. Without an end, for else texts that are over would be filled up with padding.
    model.generation_config = GenerationConfig(do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0)

    def count(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        # `generate` asks after every token whether to stop.
        meter.advance(by=len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            texts: torch.Tensor = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=context_length - batch.shape[1],
                stopping_criteria=StoppingCriteriaList([count]),
            )
    finally:
        model.generation_config = own
    return texts.cpu()
