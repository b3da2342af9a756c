"""The queue: jobs run one after the other, in the order in which they came.

This is where several sequences could go through the model together: what submits jobs, and what
runs one, know nothing of each other.
"""

from __future__ import annotations

import sys
import threading
import traceback
from queue import SimpleQueue
from typing import Protocol

from .jobs import Failed, Job


class Runner(Protocol):
    def run(self, job: Job) -> None: ...


class Worker:
    """A thread of its own for the model. It is a daemon: no job keeps the process alive."""

    def __init__(self, engine: Runner) -> None:
        self._engine = engine
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self, seconds: float) -> None:
        """End after the job that runs; wait for that, but not for ever."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.is_cancelled:
                continue
            try:
                self._engine.run(job)
            except Exception as error:  # whatever a model or a tokenizer raises
                traceback.print_exc(file=sys.stderr)
                kind = type(error).__name__
                job.emit(Failed(f"the model failed on this request ({kind}); the log says where"))
