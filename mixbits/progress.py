"""One bar for a whole run, with the time that is left, and the lines beside it.

On a terminal the bar is drawn there; without one, lines tell of it; in Python whoever asks is told
(`watch`). Lines (`say`) are messages of the logger `mixbits`, which commands print (`printed`).

Work is counted in forwards of one decoder block with one sequence: what a stage will take follows
from the arguments (`planned_work`), and what is done is told by whoever does it (`steps`). Seconds
per unit of work are those of the stage that runs, or of the run where it has only begun: so the
first batch is enough for an estimate, and no duration is built in.

Functions that are called from Python show nothing: `steps` and `part` tell a `Progress` that has
been opened (`Progress.stage`), and nobody else.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from .errors import printable

EVERY = 30.0  # seconds between two lines without a terminal; then twice as long
BACKWARD = 4  # a forward, and the forward and backward of it, of twice the cost
REDRAWN = 0.2  # seconds between two drawings

T = TypeVar("T")
Advance = Callable[..., None]  # (steps = 1)
Watch = Callable[[float, str], None]  # the share of the work that is done, and a line of text
_open: ContextVar[Progress | None] = ContextVar("progress", default=None)  # of this thread
logger = logging.getLogger("mixbits")


def duration(seconds: float, digits: int = 1) -> str:
    """For people: `8.3 s`, `2 min 5 s`, `1 h 10 min`."""
    if seconds < 59.5:
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class Progress:
    """What is done of a run, and what that says of the rest.

    `work` has the stages in their order. `stream` gets the bar if it is a terminal; else lines go
    to stdout, beside those of the stages. `clock` gives seconds.
    """

    def __init__(
        self,
        work: Mapping[str, float],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        watch: Watch | None = None,
    ) -> None:
        self.work, self.done = dict(work), dict.fromkeys(work, 0.0)
        self.seconds = dict.fromkeys(work, 0.0)  # of stages that are over, and have worked
        self.stream, self.clock = sys.stderr if stream is None else stream, clock
        self.begun = self.entered = clock()
        self.name, self.part = "", ""
        self.rounds = 1  # of what runs, this one and those to come (`numbered`)
        self.bar: Any = None
        self.watch = watch
        self.drawn, self.said, self.patience = 0.0, self.begun, EVERY

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """While a stage runs: `steps` and `part` are of it."""
        token = _open.set(self)
        self.name, self.entered = name, self.clock()
        self.work.setdefault(name, 0.0)
        self.done.setdefault(name, 0.0)
        try:
            yield
        finally:
            _open.reset(token)
            self._close()
            self.work[name] = self.done[name]  # over, whatever was expected
            if self.done[name]:
                self.seconds[name] = self.clock() - self.entered
            self.name = self.part = ""

    def expect(self, work: float) -> None:
        """The stage that runs has at least so much ahead of it."""
        self.work[self.name] = max(self.work[self.name], self.done[self.name] + work)

    def expect_only(self, work: float) -> None:
        """The stage that runs has so much ahead of it in this round and each to come."""
        self.work[self.name] = self.done[self.name] + work * self.rounds

    def advance(self, work: float) -> None:
        """So much more is done."""
        self.done[self.name] += work
        self.work[self.name] = max(self.work[self.name], self.done[self.name])
        self.show()

    def share(self) -> float:
        """Of the run's work, what is done."""
        return sum(self.done.values()) / (sum(self.work.values()) or 1.0)

    def left(self) -> float | None:
        """Seconds until the end; None before anything is known."""
        here = self.clock() - self.entered if self.done.get(self.name) else 0.0
        done, seconds = sum(self.done.values()), sum(self.seconds.values()) + here
        if not done or not seconds:
            return None
        pace = seconds / done
        own = here / self.done[self.name] if here else pace
        of_stage = self.work.get(self.name, 0.0) - self.done.get(self.name, 0.0)
        return of_stage * own + (sum(self.work.values()) - done - of_stage) * pace

    def text(self) -> str:
        """`43 %, about 1 min 20 s left, 1 min 2 s so far: round, candidate 2 of 5`."""
        left = self.left()
        what = ", ".join(filter(None, (self.name, self.part)))
        rest = f"about {duration(left, 0)} left, " if left is not None else ""
        so_far = duration(self.clock() - self.begun, 0)
        return f"{100 * self.share():.0f} %, {rest}{so_far} so far: {what}"

    def show(self, at_once: bool = False) -> None:
        """Draw the bar anew, or say a line, if it is time to."""
        now = self.clock()
        if self.watch is not None:
            if at_once or now - self.drawn >= REDRAWN:
                self.drawn = now
                self.watch(self.share(), self.text())
            return
        if not self.stream.isatty():
            if now - self.said >= self.patience:
                self.said, self.patience = now, 2 * self.patience
                say(f"      {self.text()}")
            return
        if not at_once and now - self.drawn < REDRAWN:
            return
        self.drawn = now
        if self.bar is None:
            form = "      {bar:16} {desc}"
            self.bar = tqdm(total=1.0, file=self.stream, leave=False, bar_format=form)
        self.bar.n = min(1.0, self.share())
        self.bar.set_description_str(self.text())

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def say(text: str) -> None:
    """Lines of the logger `mixbits`, whatever is in them: see `errors.printable`."""
    logger.info("\n".join(map(printable, text.split("\n"))))


class _Printer(logging.Handler):
    """Lines to stdout, beside the bar; warnings to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        progress = _open.get()
        if progress is not None and progress.bar is not None:
            progress.bar.clear()
        stream = sys.stdout if record.levelno <= logging.INFO else sys.stderr
        print(record.getMessage(), file=stream, flush=True)


@contextmanager
def printed() -> Iterator[None]:
    """What `say` says is printed: for commands."""
    handler, before = _Printer(), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def steps(total: float, cost: float = 1.0, is_all: bool = False) -> Advance:
    """Work in `total` steps, each of `cost` forwards of a block; call what it gives after a step.

    `is_all`: this is what the stage, or the round of it, has ahead, whatever was guessed before.
    Without an open `Progress` nothing is shown.
    """
    progress = _open.get()
    if progress is None:
        return lambda count=1.0: None
    (progress.expect_only if is_all else progress.expect)(total * cost)
    progress.show()
    return lambda count=1.0: progress.advance(count * cost)


@contextmanager
def part(name: str) -> Iterator[None]:
    """What runs in here is called `name`, such as candidate 2 of 5."""
    progress = _open.get()
    if progress is None:
        yield
        return
    before, progress.part = progress.part, name
    progress.show(at_once=True)
    try:
        yield
    finally:
        progress.part = before


def numbered(things: Sequence[T], what: str) -> Iterator[T]:
    """Each of `things` in turn, called `what` 1 of n; the work ahead is as of those before."""
    for index, thing in enumerate(things):
        progress = _open.get()
        before = progress.done[progress.name] if progress else 0.0
        if progress is not None:
            progress.rounds = len(things) - index
        with part(f"{what} {index + 1} of {len(things)}"):
            yield thing
        if progress is not None:  # now it is known what one takes
            took = progress.done[progress.name] - before
            ahead = took * (len(things) - index - 1)
            progress.rounds = 1
            progress.work[progress.name] = progress.done[progress.name] + ahead


class Bar:
    """Watches a run's progress as a bar of `tqdm.auto`: in a notebook, or on stderr."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, share: float, line: str) -> None:
        """So much is done, and what there is to tell of it."""
        if self.bar is None:
            from tqdm.auto import tqdm as auto

            self.bar = auto(total=1.0, bar_format="{bar:16} {desc}")
        self.bar.n = min(1.0, share)
        self.bar.set_description_str(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
