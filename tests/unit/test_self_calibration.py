"""Text by the dense model: sampled as it thinks, whatever its settings for users, and the same after a kill."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from trsp_deploy.errors import RecipeError
from trsp_deploy.tools.sources.texts import jsonl, load_texts, tokenize_windows
from trsp_deploy.tools.training import self_calibration
from trsp_deploy.tools.training.checkpoints import Checkpoints
from trsp_deploy.tools.training.self_calibration import Form, form_of, self_generated_windows, write_texts

CHAT = "Be kind.{% for m in messages %}{{ '\\n' + m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"


@pytest.fixture
def tokenizer():
    return copy.deepcopy(tiny_tokenizer())


def count(tokenizer, documents):
    return len(tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("share", "given", "own"),
    [
        (0.0, 30, 0),
        (0.25, 96, 32),  # as much as there is asked of it
        (0.25, 1000, 32),
        (0.25, 60, 20),  # a short text: all of it, and a quarter of the whole
        (0.5, 1, 1),
        (1.0, 5, 128),
    ],
)
def test_what_was_given_is_put_away_for_no_less_than_was_asked_for(share, given, own):
    assert self_generated_windows(share, 128, given) == own


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_tokens_as_were_asked_for_follow_from_the_seed(family, tokenizer):
    model = tiny_model(family)
    documents = write_texts(model, tokenizer, 60, 12, seed=0)
    assert count(tokenizer, documents) >= 60 and len(set(documents)) == len(documents)
    assert all(document == document.strip() for document in documents)
    assert documents == write_texts(model, tokenizer, 60, 12, seed=0)
    assert documents != write_texts(model, tokenizer, 60, 12, seed=1)


def test_tokens_come_as_often_as_the_model_says(tokenizer):
    model = tiny_model("llama")
    # What users of an instruction-tuned model get is not what it knows.
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0, eos_token_id=[7])
    own = model.generation_config
    wanted = (model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1] / self_calibration.TEMPERATURE).softmax(-1)
    form = form_of(model, tokenizer)
    written = self_calibration._sampled(model, form, 4000, 2, seed=0, show=lambda tokens: None)
    assert written.shape == (4000, 2) and model.generation_config is own
    found = torch.bincount(written[:, 1], minlength=len(wanted)) / 4000
    deviation = (wanted * (1 - wanted) / 4000).sqrt()  # of a share of 4,000 draws
    assert ((found - wanted).abs() < 5 * deviation + 1e-3).all()


def test_the_callers_random_numbers_are_left_alone(tokenizer):
    model = tiny_model("llama")
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    write_texts(model, tokenizer, 8, 4, seed=0)
    assert torch.equal(torch.rand(4), wanted)


def test_a_text_ends_where_its_last_turn_does(tokenizer):
    model = tiny_model("llama")
    likely = int(model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1].argmax())
    form = Form(opening=(0,), between="", end=likely, ends=2)
    for ids in self_calibration._sampled(model, form, 64, 40, seed=0, show=lambda tokens: None).tolist():
        places = [place for place, token in enumerate(ids[1:], start=1) if token == likely]
        assert all(token == likely for token in ids[places[1] :]) if len(places) > 1 else len(ids) == 40


def test_a_conversation_becomes_words_and_answer(tokenizer):
    tokenizer.chat_template = CHAT
    form = form_of(tiny_model("llama"), tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(form.opening) == "Be kind.\nuser:" and form.ends == 2
    assert form.between == f"{end}\nassistant:" and form.end == tokenizer.eos_token_id

    def document(written):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        return self_calibration._document(tokenizer, form, [*form.opening, *ids])

    assert document(f"Why? {end}\nassistant: Because.{end}{end}{end}") == "Why?\n\nBecause."
    assert document(f"Why?{end}\nassistant: Because it") == "Why?\n\nBecause it", "as far as there was room"
    assert document(f"Why?{end}{end}") == document("Why? ") == "Why?", "no answer"
    assert document(f" {end}\nassistant: So.{end}\nuser: And?") == "So.", "what comes after the end is not its own"
    assert document(f"{end}{end}") == ""


# As published, cut to what a conversation of one turn takes.
PHI_3 = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
PHI_3 += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
LLAMA_3 = "{% for m in messages %}{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content + '<|eot|>' }}{% endfor %}"
LLAMA_3 += "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
LLAMA_2 = "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
LLAMA_2 += "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "markers", "end", "ends"),
    [
        (PHI_3, ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", 2),
        (LLAMA_3, ("<|start|>", "<|stop|>", "<|eot|>"), "<|eot|>", 2),
        (LLAMA_2, (), "EOS", 1),
    ],
)
def test_templates_of_other_families(tokenizer, template, markers, end, ends):
    tokenizer.add_tokens(list(markers), special_tokens=True)
    tokenizer.chat_template = template
    form = form_of(tiny_model("llama"), tokenizer)
    assert (tokenizer.convert_ids_to_tokens(form.end), form.ends) == (end.replace("EOS", tokenizer.eos_token), ends)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    opened = tokenizer.decode(form.opening)
    spoken = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(opened)
    ids = tokenizer(spoken, add_special_tokens=False)["input_ids"]
    assert self_calibration._document(tokenizer, form, [*form.opening, *ids, 9, 9]) == "Why?\n\nBecause."


def test_what_is_written_is_read_as_any_text(tokenizer, tmp_path):
    documents = write_texts(tiny_model("llama"), tokenizer, 100, 20, seed=0)
    documents.append('two\nlines, "quoted", \u2028 and \u00e9')
    path = tmp_path / "self-generated.jsonl"
    path.write_text(jsonl(documents), encoding="utf-8")
    texts = load_texts(str(path), "calibration")
    assert list(texts.documents) == documents
    assert tokenize_windows(texts, tokenizer, 20, 5).shape == (5, 20)


class Killed(Checkpoints):
    """Dies once it has saved."""

    def save(self, state):
        super().save(state)
        raise KeyboardInterrupt


def test_a_killed_writer_goes_on_where_it_was(tmp_path, monkeypatch, tokenizer):
    model = tiny_model("llama")
    monkeypatch.setattr(self_calibration, "TOKENS_AT_ONCE", 16)  # two texts at a time
    wanted = write_texts(model, tokenizer, 60, 8, seed=0)
    asked = []
    monkeypatch.setattr(model, "generate", lambda *args, do=model.generate, **how: asked.append(1) or do(*args, **how))
    assert write_texts(model, tokenizer, 60, 8, seed=0) == wanted
    batches = len(asked)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_texts(model, tokenizer, 60, 8, 0, Killed(tmp_path, "key", 0.0))
    asked.clear()
    assert write_texts(model, tokenizer, 60, 8, 0, Checkpoints(tmp_path, "key", 600.0)) == wanted
    assert len(asked) == batches - 2, "two batches were there"


def test_progress_is_of_the_tokens_asked_for(monkeypatch, tokenizer):
    shown = []

    class Meter(self_calibration.Meter):
        def advance(self, figures="", by=1):
            shown.append(by)

    monkeypatch.setattr(self_calibration, "Meter", Meter)
    write_texts(tiny_model("llama"), tokenizer, 100, 16, seed=0)
    assert all(step > 0 for step in shown) and max(itertools.accumulate(shown)) <= 100 and len(shown) > 3


def test_texts_begin_as_the_chat_does_or_else_the_model(tokenizer):
    model = tiny_model("llama")
    assert form_of(model, tokenizer) == Form((model.config.bos_token_id,), "", tokenizer.eos_token_id, 1)
    # Of templates that do not know how to ask for an answer, and whose turns end with words.
    tokenizer.chat_template = "Be kind.{% for m in messages %}{{ '\\n' + m.role }}: {{ m.content }}!{% endfor %}"
    form = form_of(model, tokenizer)
    assert tokenizer.decode(form.opening) == "Be kind.\nuser:" and form.between == "!"
    assert form.end == tokenizer("!")["input_ids"][0] and form.ends == 2
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    assert form_of(model, tokenizer).opening == (0,), "it begins with the user's words"


def test_a_model_with_nothing_to_begin_with_is_refused(tokenizer):
    model = tiny_model("llama")
    model.config.bos_token_id = None
    with pytest.raises(RecipeError, match="LlamaForCausalLM has nothing to begin a text with"):
        form_of(model, tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('a system message first') }}", r"\(a system message first\)"),
        ("{{ messages[0]['content'] + 1 }}", r"\(can only concatenate str"),
        ({"tool_use": "{{ messages[0]['content'] }}"}, r"\(This model has multiple chat templates"),
    ],
)
def test_a_template_that_fails_is_said(tokenizer, template, words):
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=f"takes no conversation of one turn {words}"):
        form_of(tiny_model("llama"), tokenizer)


def test_no_room_and_no_words_are_said(monkeypatch, tokenizer):
    model = tiny_model("llama")
    monkeypatch.setattr(self_calibration, "_document", lambda *about: "")
    with pytest.raises(RecipeError, match=r"LlamaForCausalLM wrote .* texts without a word"):
        write_texts(model, tokenizer, 20, 8, seed=0)
    tokenizer.chat_template = CHAT
    opening = len(form_of(model, tokenizer).opening)
    with pytest.raises(
        RecipeError, match=f"context_length {opening}: no room for a text .* begins with {opening} tokens"
    ):
        write_texts(model, tokenizer, 20, opening, seed=0)
