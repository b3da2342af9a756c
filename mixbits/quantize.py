"""`python -m mixbits.quantize`: measure, allocate, pack, run and score a model.

The command line of `mixbits.quantize_model`; the stages stand in `mixbits.pipeline.process`.
"""

from __future__ import annotations

import os
import sys

from .command import exit_code
from .pipeline import early
from .pipeline.options import parse_arguments


def _command(argv: list[str] | None) -> None:
    settings = parse_arguments(argv)
    early.check(settings)  # before torch is imported: a wrong option should be told at once
    from .files.system import ended_by_signals
    from .pipeline import process, telling
    from .progress import say
    from .report.tables import quiet

    quiet()
    with ended_by_signals():
        run, lines = process.start(settings)
        if settings.dry_run:
            telling.sizes(run)
        for line in lines:
            say(f"  {line}")
        if not settings.dry_run:
            process.quantize(run)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve shared cores
    return exit_code(lambda: _command(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
