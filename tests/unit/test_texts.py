"""Texts: files, packaged assets and datasets become documents; documents become token windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.command import one_line
from tests.hub import forget_sessions
from tests.tiny import english, tiny_tokenizer
from trsp_deploy.errors import TextError
from trsp_deploy.stages.build import read_calibration
from trsp_deploy.tools.sources import texts as module
from trsp_deploy.tools.sources.packaged import ASSETS, find_asset
from trsp_deploy.tools.sources.texts import Texts, documents_of, load_texts, split_windows, tokenize_windows


def error_line(texts: str, role: module.Role = "calibration") -> str:
    with pytest.raises(TextError) as caught:
        load_texts(texts, role)
    return one_line(caught.value)


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub switched off, empty caches, and a working directory of one's own."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    forget_sessions()
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level BPE, trained on the spot, with a BOS that it adds by default and a short context."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["a blank line joins documents and words repeat so that merges happen " * 20]
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"]))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=16)


def documents(*texts: str) -> Texts:
    return Texts(name="mine.txt", origin="here", documents=texts, fingerprint="0")


def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\nstill one\r\n \r\n\n\ntwo é\n".encode())
    loaded = load_texts(str(path), "calibration")
    assert loaded.documents == ("one\nstill one", "two é")
    assert loaded.origin == str(path) and len(loaded.fingerprint) == 64


def test_jsonl_has_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n\\nstill one\u2028too"}\n\n{"text": "two", "url": 1}\n', encoding="utf-8")
    assert load_texts(str(path), "evaluation").documents == ("one\n\nstill one\u2028too", "two")


def test_fingerprint_is_of_the_documents_and_their_limits(tmp_path: Path) -> None:
    prints = []
    for name, content in [("a.txt", "x\n\ny"), ("b.txt", "x\n\n\n\ny\n"), ("c.txt", "x\ny"), ("d.txt", "x\n\nz")]:
        (tmp_path / name).write_text(content)
        prints.append(load_texts(str(tmp_path / name), "calibration").fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("gone.txt", None, "no such file"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n \n", "holds no text"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8 text (byte 3)"),
        ("utf16.txt", "Words.".encode("utf-16-le"), "holds NUL characters, as UTF-16 does where it is read as UTF-8"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', 'line 2 has no "text"'),
        ("b.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', 'line 3 has no "text"'),
        ("c.jsonl", b'["text"]\n', 'line 1 has no "text"'),
        ("d.jsonl", b'{"text": \n', "line 1 is not valid JSON"),
        ("e.jsonl", b'{"text": "\\ud800"}\n', "line 1 has half of a surrogate pair"),
        ("a.csv", b"x", "expected a .txt or .jsonl file"),
    ],
)
def test_file_errors(tmp_path: Path, file: str, content: bytes | None, words: str) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    elif file.endswith(".csv"):
        pytest.fail("a .csv must exist to be taken for a file")
    message = error_line(str(path))
    assert words in message and message.startswith(f"calibration text '{path}': ")


def test_a_mistyped_path_is_a_file_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for a dataset that names no split, for a file of another kind, or for a misspelt short name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wiki.txt").write_text("Words.")
    forms = "(expected a .txt or .jsonl file, or a dataset owner/name:split)"
    for path in ("data/wiki.tx", "data/wiki", "./data/wiki.tx", f"{tmp_path}/data/wiki.text"):
        assert error_line(path) == f"calibration text '{path}': no such file; did you mean 'wiki.txt'? {forms}"
    assert error_line("data/other.tex") == f"calibration text 'data/other.tex': no such file {forms}"
    assert error_line("data/wikj.txt") == "calibration text 'data/wikj.txt': no such file; did you mean 'wiki.txt'?"
    assert "no such file" in error_line("~/nothing.tx") and "no such file" in error_line("./none/wiki.tx")
    (tmp_path / "wiki.txt").write_text("Words.")
    assert "neither a file nor a known name; did you mean 'wiki.txt'? (" in error_line("wiki.tx")
    (tmp_path / "data" / "texts").mkdir()
    assert error_line("data/texts") == "calibration text 'data/texts': expected a .txt or .jsonl file"


def test_a_dataset_may_be_called_as_a_folder_here(no_hub: Path) -> None:
    (no_hub / "owner").mkdir()
    assert "dataset owner/name is not in the cache" in error_line("owner/name:train")


def test_folder_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    assert "is a folder, expected a file" in error_line(str(tmp_path / "folder.txt"))


def test_unknown_name_has_the_nearest() -> None:
    message = error_line("wikitext", "evaluation")
    assert message.startswith("evaluation text 'wikitext': neither a file nor a known name; did you mean 'wikitext2'?")
    assert "exl-wiki" in message


def test_packaged_text_that_is_not_here(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_asset", lambda name: None)
    message = error_line("c4-demo")
    assert "not on this machine" in message and "`trsp-deploy fetch c4-demo`" in message


PACKAGED = {
    "wiki-demo": (
        "Anarchism is a political philosophy.\nAlbedo is a fraction.\n",
        ("Anarchism is a political philosophy.",),
    ),
    "c4-demo": ('{"text": "One page."}\n{"text": "Another."}\n', ("One page.",)),
    "alpaca-demo": (
        json.dumps([{"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Hi", "output": "Ho"}]),
        ("Add.\n\n1 1\n\n2", "Hi\n\nHo"),
    ),
    "exl-wiki": (
        f'<doc id="1" title="S">\nShort.\n\n</doc>\n<doc id="2" title="L">\n{"x" * 1000}\n\n</doc>\n',
        ("x" * 1000,),
    ),
}


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_layouts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, first = PACKAGED[name]
    (tmp_path / "asset").write_text(content)
    monkeypatch.setattr(module, "find_asset", lambda name: tmp_path / "asset")
    loaded = load_texts(name, "calibration")
    assert loaded.documents[: len(first)] == first
    assert ASSETS[name].distribution in loaded.origin


@pytest.mark.parametrize(
    ("name", "count"), [("wiki-demo", 30), ("c4-demo", 300), ("alpaca-demo", 999), ("exl-wiki", 407)]
)
def test_real_packaged_texts(name: str, count: int) -> None:
    if find_asset(name) is None:
        pytest.skip(f"needs `trsp-deploy fetch {name}`")
    loaded = load_texts(name, "evaluation")
    assert len(loaded.documents) == count
    assert not any("<doc" in document for document in loaded.documents)


def test_dataset_with_config_and_split(no_hub: Path) -> None:
    (no_hub / "owner" / "name").mkdir(parents=True)
    (no_hub / "owner" / "name" / "train.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "three"}\n')
    loaded = load_texts("owner/name:train", "calibration")
    assert loaded.documents == ("one", "", "three"), "blank rows stay"
    assert loaded.origin == "owner/name:train"
    assert load_texts("owner/name:train[:1]", "calibration").documents == ("one",)
    assert "datasets cannot load it" in error_line("owner/name:tset") and "tset" in error_line("owner/name:tset")
    assert "datasets cannot load it" in error_line("owner/name,conf:train")


def test_dataset_without_text_names_its_columns(no_hub: Path) -> None:
    (no_hub / "owner" / "name").mkdir(parents=True)
    (no_hub / "owner" / "name" / "train.jsonl").write_text('{"question": "one", "label": 1}\n')
    message = error_line("owner/name:train")
    assert "has no text column, only question, label" in message


def test_dataset_needs_a_split() -> None:
    assert "names no split; write it as owner/name:train" in error_line("owner/name")


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4", "alpaca", "owner/name:train"])
def test_dataset_out_of_reach(no_hub: Path, name: str) -> None:
    message = error_line(name)
    assert "not in the cache" in message and "HF_HUB_OFFLINE is set" in message
    assert "`trsp-deploy fetch wiki-demo`" in message


def test_windows_are_the_joined_text_in_order(tokenizer) -> None:
    texts = documents("a blank line joins", "documents and words repeat")
    expected = tokenizer("a blank line joins\n\ndocuments and words repeat", add_special_tokens=False)["input_ids"]
    windows = tokenize_windows(texts, tokenizer, 4)
    assert windows.dtype == torch.int64 and windows.shape == (len(expected) // 4, 4)
    assert windows.flatten().tolist() == expected[: windows.numel()]
    assert tokenizer.bos_token_id not in windows


def test_few_windows_equal_the_first_of_all(tokenizer) -> None:
    texts = documents(*["words repeat so that merges happen " * 9 + str(i) for i in range(200)])
    everything = tokenize_windows(texts, tokenizer, 7)
    for count in (1, 5, 60):
        assert torch.equal(tokenize_windows(texts, tokenizer, 7, max_windows=count), everything[:count])
    assert len(tokenize_windows(texts, tokenizer, 7, max_windows=10**6)) == len(everything)


def test_few_windows_read_little_of_a_long_text(tokenizer) -> None:
    read: list[int] = []

    def counting(text: str, **options):
        read.append(len(text))
        return tokenizer(text, **options)

    tokenize_windows(documents("words repeat " * 100_000), counting, 8, max_windows=4)
    assert sum(read) < 10_000


def test_too_short_a_text(tokenizer) -> None:
    with pytest.raises(TextError) as caught:
        tokenize_windows(documents("a blank line"), tokenizer, 512, source="--evaluation")
    message = one_line(caught.value)
    assert message.startswith("--evaluation 'mine.txt': holds 3 tokens, fewer than one window of 512")


def test_no_warning_about_long_sequences(tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    tokenize_windows(documents("words repeat " * 100), tokenizer, 8)
    assert capfd.readouterr() == ("", "")


def test_split_draws_from_the_whole_text_and_holds_out_its_end():
    windows = torch.arange(40).view(20, 2)
    train, held_out = split_windows(windows, 16, 4, seed=0)
    assert torch.equal(held_out, windows[16:])
    assert sorted(train.flatten().tolist()) == list(range(32)) and not torch.equal(train, windows[:16])
    again, _ = split_windows(windows, 16, 4, seed=0)
    assert torch.equal(train, again)
    few, _ = split_windows(windows, 5, 4, seed=0)
    assert torch.equal(few, train[:5]) and few.max() > 10  # not the text's beginning
    assert [len(part) for part in split_windows(windows[:5], 9, 4, seed=0)] == [4, 1]  # three quarters stay
    assert [len(part) for part in split_windows(windows[:1], 9, 4, seed=0)] == [1, 1]


def test_rows_of_one_wikitext_article_are_one_document() -> None:
    """Paragraphs of an article say much the same of a model: ten of them are no ten samples."""
    rows = (
        "",
        " = One title = \n",
        "",
        " It begins here . \n",
        " = = A section = = \n",
        " And goes on . \n",
        " = = = Below it = = = \n",
        " = Another title = \n",
        " The second article . \n",
    )
    texts, tokenizer = Texts(name="t", origin="", documents=rows, fingerprint=""), tiny_tokenizer()
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    found = documents_of(texts, tokenizer, len(ids))
    assert found is not None and found.tolist() == sorted(found.tolist())
    second = tokenizer("\n\n".join(rows[7:]), add_special_tokens=False)["input_ids"]
    assert set(found) - {0} == {1, 2} and (found == 2).sum() == pytest.approx(len(second), abs=1)
    alone = tokenizer("x = 1 =\n\n= y", add_special_tokens=False)["input_ids"]
    plain = Texts(name="t", origin="", documents=("x = 1 =", "= y"), fingerprint="")
    found = documents_of(plain, tokenizer, len(alone))
    assert found is not None and set(found) == {0, 1}, "no heading, so each is a document of its own"


def test_tokens_know_their_document() -> None:
    documents = ("One short text.", "", "Another text that is longer than the first.", "The end.")
    texts = Texts(name="t", origin="", documents=documents, fingerprint="")
    tokenizer = tiny_tokenizer()
    ids = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    found = documents_of(texts, tokenizer, len(ids))
    assert found is not None and found.tolist() == sorted(found.tolist()) and set(found) <= {0, 1, 2, 3}
    for index in (0, 2, 3):
        own = [token for token, document in zip(ids, found, strict=True) if document == index]
        assert tokenizer.decode(own).strip() == documents[index]


def test_a_text_too_short_for_an_engine_names_no_setting_that_its_command_lacks(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    text = tmp_path / "short.txt"
    text.write_text("a word or two")
    with pytest.raises(TextError) as caught:
        read_calibration(str(text), tmp_path)
    assert "holds fewer than the 512 tokens that an engine makes its choices on" in one_line(caught.value)
    assert "context_length" not in str(caught.value)
    text.write_text(english()[:3000])
    assert read_calibration(str(text), tmp_path).shape[1] == 512
