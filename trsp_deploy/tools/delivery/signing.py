"""Signatures of manifests, by OpenSSF's `model-signing` with a key of one's own; nothing is asked of a network.

What is signed is the manifest (`MANIFEST.json`, or an engine's `manifest.json`): it has the SHA-256 of every file, so a
signature of it and `verify` together say that all of them are what the holder of the key saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trsp_deploy.artifacts import SIGNATURE, writing
from trsp_deploy.errors import RunError, one_line
from trsp_deploy.tools.delivery.verification import manifest_of, verify

INSTALL = "pip install 'trsp_deploy[signing]'"


def sign(folder: Path, key: Path) -> Path:
    """Sign a folder's manifest with a private key (PEM, elliptic curve); returns the signature's file.

    Raises RunError when a file is not what the manifest says, when the key does not serve, or without `model-signing`.
    """
    found = verify(folder)
    if not found.whole:
        raise RunError(
            f"{folder}: {len(found.findings)} files are not as its manifest says ({found.findings[0]}); nothing signed"
        )
    manifest = manifest_of(folder)
    signature = signature_of(manifest)
    with _library(f"--key {key}"), writing(signature) as partial:
        from model_signing import signing

        signing.Config().use_elliptic_key_signer(private_key=key).sign(manifest, partial)
    return signature


def check_signature(folder: Path, public_key: Path) -> str | None:
    """None where the manifest was signed by the key's owner and is as it was then; else what is wrong, in a line.

    Raises RunError when the key does not serve, or without `model-signing`.
    """
    manifest = manifest_of(folder)
    signature = signature_of(manifest)
    if not signature.is_file():
        return f"{signature.name} is missing; `trsp-deploy sign {folder} --key FILE` makes it"
    with _library(f"--public-key {public_key}"):
        from model_signing import verifying

        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        try:
            config.verify(manifest, signature)
        except Exception as problem:  # of a damaged signature the library says so in errors of every kind
            return f"{signature.name} is no signature of this {manifest.name} by that key ({_reason(problem)})"
    return None


def signature_of(manifest: Path) -> Path:
    """Where the signature of a manifest lies."""
    return manifest.with_name(f"{manifest.name}{SIGNATURE}")


@contextmanager
def _library(option: str) -> Iterator[None]:
    try:
        yield
    except ImportError as problem:
        raise RunError(f"{option}: model-signing is not installed here ({problem}): {INSTALL}") from problem
    except OSError as problem:
        raise RunError(f"{option}: cannot be read ({problem.strerror})") from problem
    except (ValueError, TypeError) as problem:
        expected = (
            "expected a PEM file of an elliptic-curve key, such as `openssl ecparam -name prime256v1 -genkey` makes"
        )
        raise RunError(f"{option}: {_reason(problem)}; {expected}") from problem


def _reason(problem: Exception) -> str:
    return one_line(problem)[:120].rstrip(". ")
