"""Text by the dense model: sampled as it thinks, whatever its settings for users, and the same after a kill."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.tiny import FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer
from trsp_deploy.errors import RecipeError
from trsp_deploy.tools.training import self_calibration
from trsp_deploy.tools.training.checkpoints import Checkpoints
from trsp_deploy.tools.training.self_calibration import opening, write_windows

BOS = [0]


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_begin_with_the_first_token_and_follow_from_the_seed(family):
    model = tiny_model(family)
    windows = write_windows(model, BOS, 5, 12, seed=0)
    assert windows.shape == (5, 12) and windows.dtype == torch.int64 and windows.device.type == "cpu"
    assert (windows[:, 0] == model.config.bos_token_id).all() and windows.max() < VOCABULARY
    assert len(windows.unique(dim=0)) == 5, "texts of one batch differ"
    assert torch.equal(windows, write_windows(model, BOS, 5, 12, seed=0))
    assert not torch.equal(windows, write_windows(model, BOS, 5, 12, seed=1))


def test_tokens_come_as_often_as_the_model_says():
    model = tiny_model("llama")
    # What users of an instruction-tuned model get is not what it knows.
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0, eos_token_id=[7])
    own = model.generation_config
    first = torch.zeros(1, 1, dtype=torch.int64)
    wanted = (model(first).logits[0, -1] / self_calibration.TEMPERATURE).softmax(-1)
    found = torch.bincount(write_windows(model, BOS, 4000, 2, seed=0)[:, 1], minlength=VOCABULARY) / 4000
    assert model.generation_config is own
    deviation = (wanted * (1 - wanted) / 4000).sqrt()  # of a share of 4,000 draws
    assert ((found - wanted).abs() < 5 * deviation + 1e-3).all()


def test_the_callers_random_numbers_are_left_alone():
    model = tiny_model("llama")
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    write_windows(model, BOS, 2, 4, seed=0)
    assert torch.equal(torch.rand(4), wanted)


def test_a_text_that_is_over_goes_on():
    model = tiny_model("llama")
    likely = model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1].topk(40).indices
    model.generation_config.update(eos_token_id=likely.tolist(), pad_token_id=int(likely[0]))
    windows = write_windows(model, BOS, 64, 12, seed=0)
    after = windows[torch.isin(windows[:, 1], likely)][:, 2:]
    assert len(after) and (after != likely[0]).any(), "else it was filled up with padding"


class Killed(Checkpoints):
    """Dies once it has saved."""

    def save(self, state):
        super().save(state)
        raise KeyboardInterrupt


def test_a_killed_writer_goes_on_where_it_was(tmp_path, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(self_calibration, "TOKENS_AT_ONCE", 16)  # two windows at a time
    wanted = write_windows(model, BOS, 5, 8, seed=0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_windows(model, BOS, 5, 8, 0, Killed(tmp_path, "key", 0.0))
    asked = []
    monkeypatch.setattr(model, "generate", lambda *args, do=model.generate, **how: asked.append(1) or do(*args, **how))
    assert torch.equal(write_windows(model, BOS, 5, 8, 0, Checkpoints(tmp_path, "key", 600.0)), wanted)
    assert len(asked) == 1, "two of three batches were there"


def test_texts_begin_as_the_chat_does_or_else_the_model():
    model, tokenizer = tiny_model("llama"), copy.deepcopy(tiny_tokenizer())
    assert opening(model, tokenizer) == [model.config.bos_token_id]
    tokenizer.chat_template = "Be kind.{% for m in messages %}{{ '\\n' + m.role }}: {{ m.content }}!{% endfor %}"
    user = tokenizer("Be kind.\nuser: ", add_special_tokens=False)["input_ids"]
    assert opening(model, tokenizer) == user
    windows = write_windows(model, user, 3, 24, seed=0)
    assert windows[:, : len(user)].tolist() == [user] * 3 and len(windows.unique(dim=0)) == 3
    assert write_windows(model, user, 2, 3, seed=0).tolist() == [user[:3]] * 2, "a beginning as long as the window"


def test_a_template_that_begins_with_the_users_words_leaves_the_models_first_token():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    assert opening(tiny_model("llama"), tokenizer) == BOS


def test_a_model_with_nothing_to_begin_with_is_refused():
    model = tiny_model("llama")
    model.config.bos_token_id = None
    with pytest.raises(RecipeError, match="LlamaForCausalLM has nothing to begin a text with"):
        opening(model, tiny_tokenizer())
