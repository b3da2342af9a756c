"""`python -m mixbits.quantize`: measure, allocate, pack, run and score a model.

The command line of `mixbits.quantize_model`; the stages stand in `mixbits.pipeline.process`.
"""

from __future__ import annotations

import sys

from .api import quantize_model
from .command import exit_code, passive_threads, typed
from .files.system import ended_by_signals
from .pipeline.options import given


def _command(argv: list[str] | None) -> None:
    command = typed("mixbits.quantize", argv)
    with ended_by_signals():
        quantize_model(**given(argv), command=command, progress=None, quiet=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    passive_threads()
    return exit_code(lambda: _command(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
