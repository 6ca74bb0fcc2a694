"""What a served text's pieces look like, and what a request may ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from trsp_deploy.tools.runners.generation import Sampling
from trsp_deploy.tools.serving.requests import RequestError, parse
from trsp_deploy.tools.serving.text import TextStream, read_tokenizer


@pytest.mark.parametrize(
    "text", ["The quick brown fox.", "naïve café — 日本語 🙂🙂 done", "  two  spaces\n\n\tand a tab "]
)
def test_streamed_text_is_the_whole_text(served_tokenizer: Tokenizer, text: str) -> None:
    prompt, answer = served_tokenizer.encode("Question:").ids, served_tokenizer.encode(text).ids
    stream = TextStream(served_tokenizer, prompt)
    pieces = [stream.add(token) for token in answer]
    assert "".join(pieces) + stream.end() == text
    assert "�" not in "".join(pieces)


@pytest.mark.parametrize("stop", [["END"], ["nothing", "END", "ENDING"]])
def test_nothing_of_a_stop_string_is_shown(served_tokenizer: Tokenizer, stop: list[str]) -> None:
    stream, shown = TextStream(served_tokenizer, [], stop), ""
    for token in served_tokenizer.encode("An EN, an ENgine, the END and more").ids:
        shown += stream.add(token)
        if stream.stopped:
            break
    assert stream.stopped and shown == "An EN, an ENgine, the "


def byte_fallback() -> Tokenizer:
    """As Llama 2's and Mistral's: what is no word is one token a byte, and a run of bytes is text as a whole or not."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁end", "▁the"]
    served_tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    served_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    served_tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return served_tokenizer


@pytest.mark.parametrize("prompt", ["", "안녕", "🙂"])
@pytest.mark.parametrize("text", ["😀😁😂🤣😃😄", "안녕하세요여러분", "naïve"])
def test_characters_of_many_tokens_are_never_torn(prompt: str, text: str) -> None:
    served_tokenizer = byte_fallback()
    tokens = [served_tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    before = [served_tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in prompt.encode()]
    stream = TextStream(served_tokenizer, [served_tokenizer.token_to_id("▁the"), *before])
    pieces = [stream.add(token) for token in [*tokens, served_tokenizer.token_to_id("▁end")]]
    assert "".join(pieces) + stream.end() == f"{text} end"


@pytest.mark.parametrize("count", [1, 5, 6, 40])
def test_a_space_is_kept_behind_special_tokens(count: int) -> None:
    """They have no text, and a Llama's tokenizer takes the space off what nothing is in front of."""
    served_tokenizer = byte_fallback()
    the, end, special = (served_tokenizer.token_to_id(word) for word in ("▁the", "▁end", "</s>"))
    stream = TextStream(served_tokenizer, [the])
    assert "".join(stream.add(token) for token in [the, *[special] * count, end, the]) == " the end the"
    after_them = TextStream(served_tokenizer, [the, *[special] * count])
    assert "".join(after_them.add(token) for token in [end, the]) == " end the"


def test_the_first_stop_string_of_the_text_ends_it(served_tokenizer: Tokenizer) -> None:
    stream = TextStream(served_tokenizer, [], ["\n", "."])
    shown = ""
    for token in served_tokenizer.encode("Paris.\nAnd").ids:
        shown += stream.add(token)
        if stream.stopped:
            break
    assert shown == "Paris" and stream.stopped
    stream = TextStream(served_tokenizer, [], ["later", "first"])
    stream._held = "the first and later"  # both in one piece
    assert stream._show("") == "the "


def test_limits_that_training_left_in_a_tokenizer_are_not_for_prompts(
    served_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    limited = Tokenizer.from_str(served_tokenizer.to_str())
    limited.enable_truncation(2)
    limited.enable_padding(length=50)
    limited.save(str(tmp_path / "tokenizer.json"))
    text = "a prompt of several tokens"
    assert read_tokenizer(tmp_path / "tokenizer.json").encode(text).ids == served_tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "input 'text_input' is missing"),
        ({"text_input": ""}, "input 'text_input': string should have at least 1 character, got ''"),
        ({"text_input": "x", "max_tokens": 0}, "input 'max_tokens': should be greater than or equal to 1, got 0"),
        ({"text_input": "x", "max_tokens": -5}, "input 'max_tokens'"),
        ({"text_input": "x", "temperature": float("nan")}, "input 'temperature'"),
        ({"text_input": "x", "temperature": -1.0}, "input 'temperature'"),
        ({"text_input": "x", "top_p": 0.0}, "input 'top_p'"),
        ({"text_input": "x", "top_k": -1}, "input 'top_k'"),
        (
            {"text_input": "x", "repetition_penalty": 1e-40},
            "input 'repetition_penalty': should be greater than or equal to 0.01",
        ),
        ({"text_input": "x", "seed": -1}, "input 'seed'"),
        ({"text_input": "x", "stop": ("",)}, "input 'stop.0'"),
        ({"text_input": "x", "stop": ("a",) * 17}, "input 'stop': 17 strings, at most 16"),
        (
            {"text_input": "x", "beam_width": 4},
            "unknown input 'beam_width'; valid: add_special_tokens, exclude_input_in_output",
        ),
        ({"text_input": "x", "min_length": -1}, "input 'min_length'"),
        ({"text_input": "x", "min_length": 65}, "input 'min_length': 65; at most 'max_tokens', 64"),
        ({"text_input": "x", "max_token": 4}, "unknown input 'max_token'; did you mean 'max_tokens'?"),
        ({"text_inputs": "x"}, "unknown input 'text_inputs'; did you mean 'text_input'?"),
    ],
)
def test_a_bad_request_is_one_line(values: dict[str, object], line: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(values)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_client_asks_for_is_how_its_tokens_are_chosen() -> None:
    chosen = {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "seed": 2**63 - 1}
    request = parse({"text_input": "x", "max_tokens": 9, **chosen})
    assert request.sampling((7,)) == Sampling.model_validate({"max_new_tokens": 9, "end": (7,), **chosen})
    greedy = parse({"text_input": "x", "ignore_eos": True}).sampling((7,))
    assert greedy == Sampling(max_new_tokens=64, temperature=0, top_k=0, top_p=1, seed=0, end=())
