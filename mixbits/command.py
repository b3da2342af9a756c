"""What the command lines share: bad input is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from .formats import UsageError


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing its usage: one sentence, as for any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def exit_code(run: Callable[[], object]) -> int:
    """Run a command: 0 when done, 2 for wrong usage or input, 1 when stopped; errors to stderr."""
    try:
        run()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no output is half written", file=sys.stderr)
        return 1
    return 0
