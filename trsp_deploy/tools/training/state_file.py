"""Dicts, lists, numbers, text and tensors as one safetensors file, which can hold data and never code.

write_state(path, key, {"step": 3, "weights": {"w": torch.ones(2)}})
read_state(path, key)                          # the same again; None for another key, or a damaged file

safetensors' own writer wants all tensors of a file on the CPU at once. This one takes one after the other, so that a
GPU's state passes through main memory in small pieces, and hashes what it writes, for the format has no checksum.
"""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

State = dict[str, Any]

DTYPES = {  # as the format calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TREE, DIGEST = "tree", "sha256"  # the last tensors: what is no tensor, as JSON, and the hash of all bytes before it
DIGEST_BYTES = hashlib.sha256().digest_size
CHUNK = 1 << 24  # bytes that are read at once
# Of the system, by which a file may be whole, and is not to be overwritten.
REFUSALS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def write_state(path: Path, key: str, state: State) -> None:
    """Write a state under a key; raises TypeError for what is neither of the above nor a number, and OSError."""
    tensors: list[torch.Tensor] = []
    tree = json.dumps(_taken_apart(state, tensors)).encode()
    named = {str(index): tensor.detach() for index, tensor in enumerate(tensors)}
    named[TREE] = torch.frombuffer(bytearray(tree), dtype=torch.uint8)
    named[DIGEST] = torch.empty(DIGEST_BYTES, dtype=torch.uint8)
    # The format has no gaps, and a tensor is mapped where it lies at a multiple of its numbers' size.
    named = dict(sorted(named.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, Any] = {"__metadata__": {"key": key}}
    end = 0
    for name, tensor in named.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    del named[DIGEST]
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for tensor in named.values():
            content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.write(digest.digest())


def read_state(path: Path, key: str) -> State | None:
    """What was written under this key; None where that is another key's, damaged, or not there.

    Tensors are mapped from the file, and keep its bytes on the disk for as long as they live: copy what stays.
    """
    if not _is_whole(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tree = json.loads(bytes(file.get_tensor(TREE).tolist()))
            state: State = _put_together(tree, file)
    except SafetensorError:  # whole, and no such file
        return None
    return state


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the hash of what stands before it."""
    digest = hashlib.sha256()
    try:
        left = path.stat().st_size - DIGEST_BYTES
        with path.open("rb") as file:
            while left > 0 and (content := file.read(min(left, CHUNK))):
                digest.update(content)
                left -= len(content)
            return file.read() == digest.digest()
    except OSError as problem:
        if problem.errno in REFUSALS:
            raise
        return False


def _taken_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value as JSON has it, whose only objects say what JSON cannot; its tensors are added to `tensors`."""
    match value:
        case torch.Tensor():
            tensors.append(value)
            return {"tensor": str(len(tensors) - 1)}
        case dict():  # whose keys may be numbers
            return {"dict": [[name, _taken_apart(each, tensors)] for name, each in value.items()]}
        case tuple():
            return {"tuple": [_taken_apart(each, tensors) for each in value]}
        case list():
            return [_taken_apart(each, tensors) for each in value]
    return value


def _put_together(value: Any, file: Any) -> Any:
    """The reverse of `_taken_apart`; file: the open safetensors file."""
    match value:
        case {"tensor": name}:
            return file.get_tensor(name)
        case {"dict": items}:
            return {name: _put_together(each, file) for name, each in items}
        case {"tuple": items}:
            return tuple(_put_together(each, file) for each in items)
        case list():
            return [_put_together(each, file) for each in value]
    return value
