"""What the command lines share: whatever goes wrong is one sentence, and `--traceback` the rest."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .errors import UsageError, first_line, printable
from .progress import printed


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing its usage: one sentence, as for any other bad input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--traceback", action="store_true", help="of an error, also print where it came from"
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message + self._meant(message))

    def _meant(self, message: str) -> str:
        """The options that unknown ones are like."""
        if not message.startswith("unrecognized arguments"):
            return ""
        words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        near = [difflib.get_close_matches(word, self._option_string_actions, 1) for word in words]
        found = dict.fromkeys(name for names in near for name in names)
        return f" ({', '.join(found)}?)" if found else " (--help has them all)"


def typed(module: str, argv: Sequence[str] | None = None) -> str:
    """What was typed, as a shell takes it."""
    words = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", "-m", module, *words])


def passive_threads() -> None:
    """Let threads that wait sleep, where the environment says nothing: spinning starves others.

    For commands, before torch is imported; whoever imports mixbits keeps the process as it is.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def exit_code(run: Callable[[], object], argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 when done, 2 for wrong usage or input, 1 when stopped; errors to stderr.

    What a model's code or a library raises and nobody has foreseen is one sentence too; with
    `--traceback` among `argv` (the command line's own by default) all of it is printed.
    """
    try:
        with printed():
            run()
        return 0
    except SystemExit as error:  # of a signal
        if notes := _notes(error):
            print(f"stopped{notes}", file=sys.stderr)
        raise
    except KeyboardInterrupt as error:
        print(f"stopped; no output is half written{_notes(error)}", file=sys.stderr)
        return 1
    except Exception as error:  # whatever it is, one sentence of it; --traceback has the rest
        if "--traceback" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        print(f"error: {printable(_sentence(error) + _notes(error))}", file=sys.stderr)
        return 2


def _notes(error: BaseException) -> str:
    """What to do about it, where whoever saw the error pass has said so."""
    return "".join(f"; {first_line(note, 5000)}" for note in getattr(error, "__notes__", ()))


def _sentence(error: Exception) -> str:
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}"
    kind, said = type(error).__name__, first_line(error)
    what = kind if said == kind else f"{kind}: {said}"
    return f"the model, a file of it, or mixbits itself failed: {what} (--traceback says where)"


def quiet() -> None:
    """Our own progress bars only; warnings of loaders that our checks make superfluous."""
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(transformers|lm_eval|datasets|torch).*")
