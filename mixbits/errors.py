"""What went wrong with what a user gave, in one sentence that a terminal can show."""

from __future__ import annotations

from collections.abc import Iterator
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
def plain_errors(what: str) -> Iterator[None]:
    """Whatever another's code or file raises becomes a UsageError: `what`, and why."""
    try:
        yield
    except UsageError:
        raise
    except BaseException as error:  # dozens of kinds; a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UsageError(f"{what}: {first_line(error)}") from error
