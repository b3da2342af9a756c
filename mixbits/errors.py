"""What went wrong with what a user gave, in one sentence that a terminal can show."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST = 1000  # characters of an error


_JOINERS = "\u200c\u200d"  # of Persian letters, and of emoji


class UsageError(ValueError):
    """Bad input from the user: the command line prints it as one sentence and exits with 2.

    It names files, tensors and values, which may be another's: on one line, without what a terminal
    would obey, and not for pages.
    """

    def __init__(self, sentence: str) -> None:
        if not sentence.isprintable():
            sentence = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)
        long = len(sentence) > _LONGEST
        half = _LONGEST // 2
        super().__init__(f"{sentence[:half]} ... {sentence[-half:]}" if long else sentence)


def first_line(error: BaseException, limit: int = 160) -> str:
    """What another library's error says, short enough to stand inside one sentence of ours."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    line = printable(said[0])
    if len(line) <= limit:
        return line
    cut = line[: limit - 3]
    whole, space, _ = cut.rpartition(" ")
    return (whole if space and len(whole) > limit // 2 else cut).rstrip(" ,;:(") + "..."


def printable(value: object) -> str:
    """Text of others on one line, without what a terminal would obey instead of show.

    Line ends and tabs become spaces, other control and direction characters a replacement mark.
    """
    return "".join(
        c if c.isprintable() or c in _JOINERS else " " if c.isspace() else "\ufffd"
        for c in str(value)
    )


@contextmanager
def plain_errors(what: str | Callable[[str], str]) -> Iterator[None]:
    """Whatever others' code, or their files, raise in the block becomes a UsageError.

    It says `what`, and why; or what the function `what` makes of why. Kinds of errors are dozens,
    and few are documented. But where the block leads to code of ours that fails (a quantizer, say,
    that transformers calls), that is a fault of ours: it passes as it is, to be seen as one.
    """
    try:
        yield
    except UsageError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of tokenizers: no Exception
        if not (isinstance(error, Exception) or is_panic) or _is_own_fault(error):
            raise
        why = first_line(error)
        raise UsageError(what(why) if callable(what) else f"{what}: {why}") from error


# What is called like a function of the language: what it raises is the fault of who called it.
_TOOLS = {"torch", "numpy", "safetensors", "pydantic", *sys.stdlib_module_names}


# Kinds that a mistake in a program raises. Of other kinds what is read is as likely the cause.
_MISTAKES = (TypeError, AttributeError, NameError, AssertionError)


def _is_own_fault(error: BaseException) -> bool:
    """Whether code of ours made a mistake that a block of `plain_errors` had called, at any depth.

    That is, whether it was ours that ran last but for tools. What the block itself calls is
    others' by declaration.
    """
    if not isinstance(error, _MISTAKES):
        return False
    called = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][2:]  # below the block
    names = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in called]
    last = next((name for name in reversed(names) if name not in _TOOLS), None)
    return last == __name__.partition(".")[0]
