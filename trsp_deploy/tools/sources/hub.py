"""The Hugging Face hub's failures, in words."""

from __future__ import annotations

import functools


@functools.cache
def hub_errors() -> tuple[type[Exception], ...]:
    """What a question to the hub may raise: OSErrors, and whatever else its HTTP library calls an error.

    requests' errors are OSErrors; httpx's, which huggingface_hub uses since 1.0, share a base class of their own.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    library = (base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError" and issubclass(base, Exception))
    return (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, LocalEntryNotFoundError, OSError, *library)


def hub_problem(problem: Exception) -> str:
    """Say in a few words why the Hugging Face hub did not deliver."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(problem, HFValidationError):
        return "the hub has no such names (no `--`, `..` or `.git`, at most 96 characters)"
    if isinstance(problem, OfflineModeIsEnabled):
        return "the hub may not be asked: HF_HUB_OFFLINE is set"
    if isinstance(problem, GatedRepoError):
        return "the hub has it behind a licence: accept it on its page, then run `hf auth login`"
    if isinstance(problem, RepositoryNotFoundError):
        return "the hub has nothing of that name (if it is private, run `hf auth login`)"
    status = problem.response.status_code if isinstance(problem, HfHubHTTPError) and problem.response is not None else 0
    if status:
        return f"the hub answered with HTTP status {status}"
    return f"the hub cannot be reached ({type(problem).__name__})"
