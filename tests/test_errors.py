"""What others raise is a sentence; a fault of ours is seen as one, and so is what led to it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mixbits
from mixbits.command import exit_code
from mixbits.errors import UsageError, plain_errors
from mixbits.formats.pack import check_finite
from mixbits.formats.reference import unpack_codes
from mixbits.model.layout import split_expert_name
from mixbits.model.replaced import replaced

PACKAGE = Path(mixbits.__file__).parent


def fail() -> None:
    raise KeyError("theirs")


class PanicException(BaseException):  # of the name that tokenizers' has
    pass


def panic() -> None:
    raise PanicException("a panic")


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        (fail, "'theirs'"),
        (panic, "a panic"),
        (lambda: torch.zeros(2) @ torch.zeros(3), "inconsistent tensor size"),
        (lambda: json.loads("{"), "Expecting property name"),
        (lambda: np.zeros(2).reshape(3), "cannot reshape"),
    ],
    ids=["another's function", "a panic", "torch", "json", "numpy"],
)
@pytest.mark.parametrize("what", ["it fails", "it fails: {} here".format], ids=["text", "function"])
def test_others_errors_are_sentences(
    what: str | Callable[[str], str], theirs: Callable[[], object], why: str
) -> None:
    with pytest.raises(UsageError, match=f"^it fails: .*{why}") as caught, plain_errors(what):
        theirs()
    assert caught.value.__cause__ is not None
    assert str(caught.value).endswith(" here") is callable(what)


def test_ours_pass_as_they_are() -> None:
    with pytest.raises(UsageError, match="not the name of an expert"), plain_errors("x"):
        split_expert_name("no expert")  # of a value: the file that has it is as likely the cause
    with pytest.raises(AttributeError), plain_errors("x"):
        check_finite("w", None)  # type: ignore[arg-type]
    with pytest.raises(TypeError), plain_errors("x"):  # of torch, a tool that ours holds wrong
        unpack_codes(torch.zeros(4, dtype=torch.uint8), 4, "8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^weights must be finite"), plain_errors("x"):
        check_finite("w", torch.tensor([torch.nan]))
    with pytest.raises(KeyboardInterrupt), plain_errors("x"):
        raise KeyboardInterrupt


def test_theirs_within_ours_within_theirs_are_theirs() -> None:
    # Ours calls what is not ours, as a quantizer's hook calls a model.
    hooked = replaced(torch, "isfinite", lambda _: fail())
    with pytest.raises(UsageError, match=r"^x: 'theirs'"), plain_errors("x"), hooked:
        check_finite("w", torch.ones(1))


def test_a_traceback_has_the_whole_chain(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        with plain_errors("it fails"):
            fail()

    assert exit_code(run, []) == 2
    said = capsys.readouterr().err
    assert said == "error: it fails: 'theirs'\n"
    assert exit_code(run, ["--traceback"]) == 2
    shown = capsys.readouterr().err
    assert "KeyError: 'theirs'" in shown
    assert "in fail" in shown
    assert shown.endswith(said)


def handlers() -> list[tuple[str, ast.ExceptHandler]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", node))
    return found


def test_broad_handlers_hide_nothing() -> None:
    """Each of them raises what it caught again, or prints its traceback."""
    broad = {None, "Exception", "BaseException"}
    for place, handler in handlers():
        if (ast.unparse(handler.type) if handler.type else None) in broad:
            inside = list(ast.walk(handler))
            again = any(isinstance(node, ast.Raise) and node.exc is None for node in inside)
            names = {ast.unparse(node.func) for node in inside if isinstance(node, ast.Call)}
            assert again or names & {"traceback.print_exc", "_failure"}, place


def test_no_cause_is_hidden() -> None:
    for place, handler in handlers():
        for node in ast.walk(handler):
            if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Constant):
                pytest.fail(f"from None: {place}")
