"""Secrets to plant in the environment of a command, none of which may be in what it writes or says."""

from __future__ import annotations

from pathlib import Path

# Each in the form that its owner gives it.
SECRETS = {
    "HF_TOKEN": "hf_" + "pLaNtEd" * 5,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "sEcOnD" * 5,
    "GITHUB_TOKEN": "ghp_" + "0pLaNtEd" * 5,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYplanted",
    "STORAGE_SECRET_KEY": "/9uK7MDENG+bPxRfi/CYplanted=",
    "MY_API_KEY": "correct-horse-battery-staple",
}


def check_no_secret(folder: Path, *said: str) -> int:
    """Assert that no secret is in a folder's files or in what was said; returns how many of these there were."""
    places = {f"output {number}": text.encode() for number, text in enumerate(said)}
    places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, content in places.items():
        for variable, secret in SECRETS.items():
            assert secret.encode() not in content, f"{variable} in {name}"
    return len(places)
