"""Errors that a user can cause: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

EXIT_CODE = 2
INTERRUPTED = 130
"""Exit code of a program that Ctrl-C has ended, as a shell reports it."""
MAX_CHARACTERS = 1000  # of a message; a value or a file may have any number
MAX_WORD_CHARACTERS = 300  # of a message: enough for a path

_NOT_WRITTEN = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
_NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP}
_NO_ROOM = {errno.EDQUOT, errno.EFBIG, errno.ENOSPC}
_REMEDIES = dict.fromkeys(_NO_PATH, "give another path") | dict.fromkeys(_NO_ROOM, "make room, or give another folder")
_NO_MEMORY = "out of memory|not enough memory|can't allocate memory|overflow|negative dimension|invalid memory size"
_NUMPY_CUT = r"\d+ requested and \d+ written"
"""numpy's message when ``tofile`` could not write all of an array."""
_TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream")
"""Parts of torch's messages when ``torch.save`` could not write."""


class UserError(Exception):
    """An error that the user can correct.

    The message is one line that names the flag or file, the offending value and the remedy.
    """


class PeerError(UserError):
    """A user's error that another rank has found and printed."""


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a program that ends with ``error``."""
    if isinstance(error, UserError):
        return EXIT_CODE
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def shortened(value: object, max_length: int = 200) -> str:
    """Return the text of a value on one line, with its middle cut out if it has more than ``max_length`` characters.

    Both ends are kept, because a message begins with the problem and ends with the remedy.
    """
    text = " ".join(str(value).split())
    if len(text) <= max_length:
        return text
    end = max_length // 3
    return f"{text[: max_length - end - 5]} ... {text[-end:]}"


def print_error(error: UserError) -> None:
    """Print the error's one line on standard error; if that fails, only the exit code reports the error."""
    words = (shortened(word, MAX_WORD_CHARACTERS) for word in str(error).split())
    # In one call of write: other ranks print on the same screen.
    with contextlib.suppress(OSError):
        print(f"error: {shortened(' '.join(words), MAX_CHARACTERS)}\n", file=sys.stderr, end="", flush=True)


def flush_output() -> None:
    """Flush stdout and stderr, before the process ends without cleanup; what cannot be written is lost."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


@contextlib.contextmanager
def reported_lack_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn failures of Python and torch to allocate something into a user's error.

    Args:
        what: what is allocated, in words.
        remedy: what to do instead.

    Raises:
        UserError: there is too little memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError, TypeError) as error:
        if not isinstance(error, MemoryError) and re.search(_NO_MEMORY, str(error), re.IGNORECASE) is None:
            raise
        reason = shortened(str(error).partition("\n")[0]) or "it cannot be allocated"
        raise UserError(f"the {what} needs more memory than there is ({reason}); {remedy}") from None


def write_failure_reason(error: Exception) -> str | None:
    """Return why a file could not be written, if that is what an error of the system, torch or safetensors means."""
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, RuntimeError) and any(writer in str(error) for writer in _TORCH_WRITERS):
        return "a file could not be written to its end"  # torch gives no reason
    if isinstance(error, OSError) and re.fullmatch(_NUMPY_CUT, str(error)):
        return "a file could not be written to its end"  # numpy gives no reason either
    # The message of libraries written in Rust: safetensors, and tokenizers, which raises a plain Exception.
    return shortened(error) if re.search(r"\(os error \d+\)", str(error)) else None


@contextlib.contextmanager
def reported_write_failure(flag: str, folder: str) -> Iterator[None]:
    """Turn failures to write a flag's folder into a user's error that names both.

    Raises:
        UserError: a file could not be written.
    """
    try:
        yield
    except Exception as error:
        reason = write_failure_reason(error)
        if reason is None:
            raise
        raise UserError(f"{flag} {folder}: cannot be written ({reason}); make room, or give another folder") from None


@contextlib.contextmanager
def renamed_flags(names: Mapping[str, str]) -> Iterator[None]:
    """Replace names of flags in users' errors by the names that the user's command has for them.

    Args:
        names: the command's names, by those that the code in the block uses.

    Raises:
        UserError: the block raised one.
    """
    try:
        yield
    except UserError as error:
        pattern = "|".join(rf"(?<![\w-]){name}(?![\w-])" for name in names)
        raise UserError(re.sub(pattern, lambda match: names[match[0]], str(error))) from None


def as_user_error(error: BaseException, argv: Sequence[str] | None = None) -> BaseException:
    """Convert an error that the user can correct to a :class:`UserError`; return any other unchanged.

    The user can correct these: a file or folder that a flag names, or something in it, cannot be used; too many files
    are open; a worker of a data loader was killed, mostly for lack of memory.

    Args:
        argv: the command line; by default this process's.
    """
    if isinstance(error, (OSError, RuntimeError)) and os.strerror(errno.EMFILE) in str(error):
        return UserError(
            f"{os.strerror(errno.EMFILE)}: more than ulimit -n {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} allows; "
            "raise it, or give fewer --num-workers"
        )
    if isinstance(error, OSError) and isinstance(path := error.filename2 or error.filename, (str, bytes)):
        path = os.fsdecode(path)
        flag, reason = _flag_of(path, sys.argv[1:] if argv is None else argv), error.strerror
        if os.path.islink(path) and not os.path.exists(path):
            reason = "a link that leads nowhere"
        if flag or error.errno in _NO_PATH:
            remedy = _REMEDIES.get(error.errno or 0, "check what is there, or give another path")
            return UserError(f"{flag}{shortened(path)}: {reason}; {remedy}")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib before Python 3.13
        return UserError(f"{shortened(error)}; give another path")
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
        return UserError(
            f"--num-workers: {shortened(error)}; give fewer workers or more memory, and start the run again"
        )
    return error


def _flag_of(path: str, argv: Sequence[str]) -> str:
    """Return the flag that names ``path`` or a folder above it, followed by a space; an empty text if none does."""
    absolute, flag, found = os.path.abspath(path), "", ("", "")
    for word in argv:
        flag, _, value = word.partition("=") if word.startswith("--") else (flag, "", word)
        folder, name = os.path.split(named := os.path.abspath(value))
        # A dataset is named without its suffixes, and what a file is made of is kept next to it.
        below = rf"{re.escape(os.path.join(folder, ''))}\.?{re.escape(name)}($|[/_.])"
        if value and re.match(below, absolute) and len(named) > len(found[1]):
            found = f"{flag} ".lstrip(), named
    return found[0]


def discard_output(stream: TextIO) -> None:
    """Discard what a stream has not written yet, and what is written to it from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_cli(main: Callable[[], None]) -> None:
    """Run the ``main`` of a command of one process, turning a :class:`UserError` into its line and exit code.

    A full disk, a folder that is not writable and a path that is too long are user errors too. After Ctrl-C, or when
    the program that reads its output has ended, it ends without a message.

    Programs of several ranks start through ``megatron_dwm.cli.launch`` instead.
    """
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # as in ``| head``; Python would fail again when it ends
        discard_output(sys.stdout)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        known = as_user_error(error)
        if known is error and (reason := write_failure_reason(error)) is not None:
            known = UserError(f"{reason}; make room, or give another folder")
        if not isinstance(known, UserError):
            raise
        print_error(known)
        raise SystemExit(EXIT_CODE) from None
