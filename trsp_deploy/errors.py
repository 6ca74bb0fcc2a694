"""Every error that trsp_deploy raises on purpose, as one tree, and how an error becomes one line.

    TrspError
    |-- UserError              exit code 1, one line: the value, where it came from, what would be valid
    |   |-- ModelError         a model that cannot be found, read or pruned
    |   |-- TextError          calibration or evaluation text that cannot be used
    |   |-- RecipeError        a recipe, a --set or a --drop that does not make sense
    |   |-- PlanError          a plan.json that does not fit the model
    |   |-- EngineSpecError    an engine spec that is unknown or malformed
    |   |-- DeviceMemoryError  what needs more memory than this machine has, or lets a process have
    |   |-- BaselineError      a baseline that cannot be read, or whose figures are of other hardware
    |   |-- RunError           a run, engine, repository or server that is missing, in use, damaged or of the wrong kind
    |   |-- StorageError       a full disk, a folder that cannot be written
    |   `-- RequestError       one request that a server cannot answer; its client is told (tools/serving/requests.py)
    |-- ParityError            exit code 4: PyTorch, ONNX and engine disagree; nothing may be shipped
    |-- ProcessEnded           exit code 128 + its number: a signal ended the working process
    |-- LeftToMain             exit code 0, no line: of several processes the main one goes on alone
    `-- EngineUnavailable      in a run the report's `unavailable` with its reason; for one engine, exit code 1
        `-- ShapeUnavailable   so many texts, tokens or so much padding; others it may take, and nothing has run

The regression check is no error: a requirement missed exits with 2, one that is not decided with 3.
Anything else that escapes is a bug: it prints its traceback and exits with 70.
`docs/exit-codes.md` is the page for users.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import reprlib
from collections.abc import Iterable

# A URL's user and password, tokens by the forms that hubs and clouds give them, and what a URL's query calls one.
SECRETS = (
    (re.compile(r"(?<=://)[^\s/@'\"]+@"), "***@"),
    (re.compile(r"\b(hf_|ghp_|gho_|github_pat_|glpat-|sk-|nvapi-)[A-Za-z0-9_-]{16,}"), "***"),
    (re.compile(r"\bAKIA[A-Z0-9]{16}\b"), "***"),
    (re.compile(r"(?i)([?&](?:access_|api_)?(?:token|key|secret|password|sig(?:nature)?)=)[^\s&'\"]+"), r"\1***"),
)
# Not TOKENIZER_NAME; MAX_TOKENS holds a count, which is too short to be one.
SECRET_VARIABLE = re.compile(r"(?i)TOKEN(?!I[SZ])|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL")
SHORTEST_SECRET = 8  # a variable's value below that is a setting such as HF_HUB_DISABLE_IMPLICIT_TOKEN=1


class TrspError(Exception):
    """Root of the tree. `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(TrspError):
    """Something the user can put right; printed as one line, without a traceback."""


class ModelError(UserError):
    """The model cannot be found, read or pruned."""


class TextError(UserError):
    """Calibration or evaluation text cannot be used."""


class RecipeError(UserError):
    """A recipe, an override or the wanted drop does not make sense."""


class PlanError(UserError):
    """A pruning plan does not fit the model it is applied to."""


class EngineSpecError(UserError):
    """An engine spec is unknown or malformed."""


class DeviceMemoryError(UserError):
    """Something needs more memory than its device or this machine has, or than `ulimit` allows."""


class BaselineError(UserError):
    """A baseline cannot be read, or holds times of other hardware."""


class RunError(UserError):
    """A run, engine, repository or server is missing, in use, damaged or of the wrong kind."""


class StorageError(UserError):
    """The disk is full or the folder cannot be written."""


class ParityError(TrspError):
    """PyTorch, ONNX and engine disagree beyond the stated tolerance."""

    exit_code = 4


class ProcessEnded(TrspError):
    """A signal ended the working process: the kernel, a crash in native code, or somebody."""

    def __init__(self, message: str, number: int) -> None:
        """number: of the signal."""
        super().__init__(message)
        self.exit_code = 128 + number


class LeftToMain(TrspError):
    """This process of a launch has done its part: the rest is the main one's work, and it has left their group."""

    exit_code = 0


class EngineUnavailable(TrspError):
    """This engine cannot be built, run or go on; the message is the reason."""


class ShapeUnavailable(EngineUnavailable):
    """This engine takes no such batch, length or padding. It is whole, and nothing of the call has run."""


AGAIN = "run the same command again: finished steps are kept"
# What the machine refuses, and what helps; a path of that length or kind is the user's own.
REFUSALS = {
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EROFS: "",
    errno.ENAMETOOLONG: "",
    errno.ENOTDIR: "",
    errno.EISDIR: "",
    errno.ELOOP: "",
    errno.EIO: "",
    errno.EFBIG: "; see `ulimit -f`",
    errno.ENOSPC: f"; free some space and {AGAIN}",
    errno.EDQUOT: f"; remove files of yours, or have the quota raised, and {AGAIN}",
    errno.EMFILE: f"; raise the limit with `ulimit -n 1024` and {AGAIN}",
    errno.ENFILE: f"; close other programs and {AGAIN}",
    errno.EBUSY: f"; end the process that holds it, and {AGAIN}",
    errno.ENOTEMPTY: f"; end the process that holds a file in it open, and {AGAIN}",
    errno.ETXTBSY: f"; end the process that runs it, or writes it, and {AGAIN}",
    errno.ESTALE: f"; the file system's server no longer has what was open; {AGAIN}",
    errno.EREMOTEIO: f"; the file system's server could not read or write it; {AGAIN}",
    errno.ENOLCK: f"; the file system has no locks to give; {AGAIN}",
    errno.ETIMEDOUT: f"; the file system did not answer; {AGAIN}",
    errno.ENOTCONN: f"; the file system is no longer connected; mount it again and {AGAIN}",
}
OF_SOCKETS = (errno.ETIMEDOUT, errno.ENOTCONN)  # too, whose errors name no file
NO_MEMORY = re.compile(
    r"can(no|')t allocate memory|failed to allocate memory|bad allocation|bad_alloc|failed to map segment"
    r"|can't start new thread|out of memory|cublas_status_alloc_failed",
    re.IGNORECASE,
)
# torch's words where its allocator finds no room, and where CUDA itself or cuBLAS does, which torch only passes on.
GPU_FULL = re.compile("CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
NO_SCRATCH = "No usable temporary directory"  # tempfile's words; its number is that of a file that is not there


def machine_reason(problem: BaseException) -> str | None:
    """The line for an error that this machine's disk, limits or memory caused; None for all others.

    Libraries wrap such errors in their own, so what led to `problem` counts too.
    """
    cause: BaseException | None = problem
    while cause is not None:
        if GPU_FULL.search(str(cause)):
            return (
                f"the GPU's memory is full ({shown(first_line(cause))}); `--plan-memory` shows what needs how much; "
                "smaller batches, --set transfer.gradient_checkpointing=true or --set weights=bf16 need less: finished "
                "steps are kept"
            )
        if isinstance(cause, MemoryError) or NO_MEMORY.search(str(cause)):
            said = f" ({shown(str(cause))})" if str(cause) else ""
            return f"not enough memory{said}; close other programs or raise the limit (`ulimit -v`) and {AGAIN}"
        if isinstance(cause, OSError) and NO_SCRATCH in str(cause):
            return (
                "no folder for temporary files can be written; set TMPDIR to one that can (in a container `--tmpfs "
                f"/tmp`) and {AGAIN}"
            )
        if isinstance(cause, BlockingIOError) and cause.strerror == os.strerror(errno.EAGAIN):  # of a fork
            return (
                f"no other process can be started ({cause.strerror}); close other programs or raise the limit "
                f"(`ulimit -u`) and {AGAIN}"
            )
        of_socket = isinstance(cause, OSError) and cause.errno in OF_SOCKETS and cause.filename is None
        if isinstance(cause, OSError) and cause.errno in REFUSALS and not of_socket:
            return f"{cause.filename or 'disk'}: {cause.strerror}{REFUSALS[cause.errno]}"
        if "too many open files" in str(cause).lower():  # safetensors' words for it are no OSError
            return f"{shown(str(cause))}{REFUSALS[errno.EMFILE]}"
        cause = cause.__cause__ or cause.__context__
    return None


def passes_through(problem: BaseException) -> bool:
    """Whether an error goes on as it is through what turns a library's into ours: it has its line already."""
    return isinstance(problem, TrspError) or machine_reason(problem) is not None


def shown(value: object) -> str:
    """A value for an error's line: its repr, with the middle left out of what is long or deep."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def one_line(problem: BaseException | str) -> str:
    """All that a library says as one line; the exception's class where it says nothing."""
    said = " ".join(str(problem).split())
    return said if said or isinstance(problem, str) else type(problem).__name__


def no_command(line: str) -> str:
    """A line of text that GitHub's runner does not act on: to it `##[` begins a command wherever it stands in one.

    One that begins with `::` is a command too; what is printed here begins with a word of ours.
    """
    return line.replace("##[", "## [")


def first_line(problem: BaseException) -> str:
    """The same of the first line alone, at most 300 characters: for libraries that go on for pages."""
    lines = str(problem).strip().splitlines()
    return one_line(lines[0] if lines else problem)[:300]


def named(problem: BaseException) -> str:
    """Class and line of what nobody foresaw, whose words alone say little; of the line at most 300 characters."""
    kind, line = type(problem).__name__, one_line(problem)[:300]
    return kind if line == kind else f"{kind}: {line}"


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest valid word, or an empty string."""
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def redacted(text: str) -> str:
    """The text without what looks like a secret, or is the value of an environment variable that is named like one."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    for value in secret_variables().values():
        text = text.replace(value, "***")
    return text


def secret_variables() -> dict[str, str]:
    """The environment's variables that are named like a secret, but for those that hold a setting or a path."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_SECRET and SECRET_VARIABLE.search(name) and not _is_path(value)
    }


def _is_path(value: str) -> bool:
    """Whether a value leads somewhere from the root, as the path of a file with a secret does; a key in base64 may
    begin with a slash too, and names nothing that is there."""
    return value.startswith("/") and os.path.exists(f"/{value.lstrip('/').partition('/')[0]}")  # noqa: PTH110
