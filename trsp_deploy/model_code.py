"""Python code that comes with a model, which runs only where the user asks for it by its fingerprint.

The configs of a model folder may name files beside them (`auto_map`) that transformers imports when it is told
`trust_remote_code`, with all rights of the user. It is told so where the fingerprint of these files, and of those that
they import from beside them, is in TRUST: a setting of the process and its children, which the command line's
`--trust-remote-code` makes and which is never read from a file, so that no run folder brings its own consent.

    load(folder, trust_remote_code=trusted(folder))
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp_deploy.errors import ModelError, shown
from trsp_deploy.reading import read_json

TRUST = "TRSP_DEPLOY_TRUST_REMOTE_CODE"  # fingerprints, with spaces between them
FINGERPRINT = re.compile(r"[0-9a-f]{32}")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
GENERATE = "custom_generate"  # a folder whose Python some versions of transformers run when they load the model
ADAPTER = "adapter_config.json"
# By these keys of a config, wherever in it, transformers runs code without asking: attention from the hub (before 5.3,
# CVE-2026-4372), what LightGlue finds points with (before 5.5, CVE-2026-5241); by the last it reads another config.
ATTENTION = (None, "eager", "sdpa")
HARMLESS: dict[str, tuple[str | None, ...]] = {
    "attn_implementation": ATTENTION,
    "_attn_implementation": ATTENTION,
    "_attn_implementation_internal": ATTENTION,
    "keypoint_detector_config": (None,),
    "configuration_files": (None,),
}
CODE = "*.py"  # of a hub repository: nothing runs by being downloaded
REFERENCE = re.compile(r"(?P<module>\w+)\.(?P<name>\w+)")


@dataclass(frozen=True)
class ModelCode:
    """The code that loading a model would run."""

    named_in: str  # the first config that names any
    classes: tuple[str, ...]  # "AutoModelForCausalLM as XForCausalLM of modeling_x.py"
    files: tuple[str, ...]  # in the model's folder
    fingerprint: str  # of their names and contents

    @property
    def trusted(self) -> bool:
        """Whether the user asked for this code."""
        return self.fingerprint in os.environ.get(TRUST, "").split()


def model_code(folder: Path) -> ModelCode | None:
    """The code that a model folder brings; None where its configs name none.

    Raises ModelError for code that is not beside the configs: another repository's may change at any time.
    """
    paths = [path for name in CONFIGS if (path := folder / name).is_file()]
    named = {path: entries for path in paths if (entries := _entries(path))}
    if not named:
        return None
    classes, modules = [], set()
    for path, entries in named.items():
        for kind, reference in entries:
            found = REFERENCE.fullmatch(reference)
            if found is None:
                raise ModelError(
                    f"{path}: its auto_map names '{reference}', which is not `file.Class` with the file beside it; "
                    "code from elsewhere never runs: take a copy of the model that has its code beside it"
                )
            classes.append(f"{kind} as {found['name']} of {found['module']}.py")
            modules.add(found["module"])
    files = _with_imports(folder, modules, next(iter(named)))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0{hashlib.sha256((folder / file).read_bytes()).hexdigest()}\n".encode())
    return ModelCode(
        named_in=str(next(iter(named))),
        classes=tuple(dict.fromkeys(classes)),
        files=files,
        fingerprint=digest.hexdigest()[:32],
    )


def trusted(folder: Path) -> bool:
    """transformers' `trust_remote_code`: whether the folder brings code, and the user asked for exactly that."""
    if not os.environ.get(TRUST):
        return False
    code = model_code(folder)
    return code is not None and code.trusted


def refuse_hidden_code(folder: Path) -> None:
    """Raise ModelError for a folder of which transformers would run code unasked as it loads the model."""
    if (folder / GENERATE).exists():
        raise ModelError(
            f"{folder / GENERATE}: transformers would run the Python in it, with your rights, as soon as the model is "
            "loaded; nothing here needs it: take it out of the folder"
        )
    refuse_adapter(folder)
    refuse_hidden_config(folder)


def refuse_adapter(folder: Path) -> None:
    """Raise ModelError for a folder in whose place transformers would load another."""
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{folder}: has {ADAPTER}, by which transformers loads another model, and its code; merge the adapter "
            "(peft's merge_and_unload), or take the file out"
        )


def refuse_hidden_config(folder: Path) -> None:
    """Raise ModelError for a config.json by which transformers would run code, or read another config, unasked."""
    path = folder / "config.json"
    waiting: list[Any] = [read_json(path, ModelError)] if path.is_file() else []
    while waiting:
        values = waiting.pop()
        if isinstance(values, dict):
            for key in HARMLESS.keys() & values:
                if values[key] not in HARMLESS[key]:
                    raise ModelError(
                        f"{path}: by `{key}`, which is {shown(values[key])}, transformers may load code or another "
                        "config that nobody asked for; take that key out of the file"
                    )
            waiting += values.values()
        elif isinstance(values, list):
            waiting += values


def copy_code(folder: Path, out: Path) -> None:
    """Put the code that a model folder brings into a copy of it."""
    code = model_code(folder)
    for file in code.files if code else ():
        shutil.copyfile(folder / file, out / file)


def refuse_unless_trusted(folder: Path) -> None:
    """Raise ModelError, with what would run and how to ask for it, for code that the user did not ask for."""
    code = model_code(folder)
    if code is None or code.trusted:
        return
    asked = f" (you asked for {os.environ[TRUST]}, which is other code)" if os.environ.get(TRUST) else ""
    raise ModelError(
        f"{code.named_in}: its auto_map would run code that comes with the model ({', '.join(code.classes)}), with "
        f"your rights; trust_remote_code stays off unless you name the code{asked}: read {', '.join(code.files)}, then "
        f"`trsp-deploy --trust-remote-code {code.fingerprint} COMMAND`; or, where transformers has the architecture "
        "too, take `auto_map` out of the file and give --model FOLDER"
    )


def _entries(path: Path) -> list[tuple[str, str]]:
    """A config's auto_map as (auto class, reference); a tokenizer's may be a pair, slow and fast."""
    auto_map: Any = read_json(path, ModelError).get("auto_map")
    if not auto_map:
        return []
    named = auto_map if isinstance(auto_map, dict) else {"AutoTokenizer": auto_map}
    return [
        (str(kind), reference if isinstance(reference, str) else json.dumps(reference))
        for kind, value in named.items()
        for reference in (value if isinstance(value, list) else [value])
        if reference
    ]


def _with_imports(folder: Path, modules: set[str], config: Path) -> tuple[str, ...]:
    """Names of the modules' files and of all that they import from beside them, as transformers looks for them."""
    from transformers.dynamic_module_utils import get_relative_import_files

    files: set[str] = set()
    for module in modules:
        file = folder / f"{module}.py"
        try:
            needed = [file, *map(Path, get_relative_import_files(file))]
        except (OSError, UnicodeDecodeError) as problem:
            missing = Path(getattr(problem, "filename", None) or file).name
            raise ModelError(f"{config}: its auto_map needs {missing}, which cannot be read beside it") from problem
        files.update(path.name for path in needed)
    return tuple(sorted(files))
