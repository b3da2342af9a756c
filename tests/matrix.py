"""The matrix: what each way to run a backend makes of each operation with each format.

A test that compares some of its cells takes the fixture `matrix` and says so where it does:

    with matrix.cell("cpu", isa, "dequantize", fmt):
        assert_same_bits(...)

A cell is `equal` to the slow twin (mixbits.formats.reference, compensate) within what its operation
says, or `refused` in a sentence, or the `twin` itself does it, where a backend has no code of its
own. The summary of a run prints how many are which; a run of everything, or of `pytest -m matrix`,
fails where a cell of a way that there is here was looked at by no test.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mixbits.backends import cpu, cuda
from mixbits.formats.schemes import Format

ISAS = ["avx512bf16", "avx512vnni", "avx2", "scalar"]
OPERATIONS = [
    "fake_quantize",
    "quantize_pack",
    "dequantize",  # what is packed from hard rows, of odd shapes
    "every code and scale",  # dequantized
    "fisher_statistics",
    "gradient_statistics",
    "square_sums",
    "compensate_group",
    "packed_matmul",  # with the weight in the format
    "activations",  # of a product
]
MARK = "matrix"
KINDS = ["equal", "refused", "twin"]
WRITE = "MIXBITS_TEST_MATRIX"  # a file for the cells of this run, which another run's test reads
Cell = tuple[str, str, str, str]  # backend, way, operation, format


def format_id(fmt: Format) -> str:
    if fmt.scale == "e8m0":
        return f"{fmt.element}-{fmt.scale_mode}"
    if fmt.scale != "float16":
        return f"{fmt.element}-{fmt.scale}{fmt.tensor_scale}"
    return f"{fmt.element}-g{fmt.group_size}-{'sym' if fmt.symmetric else 'asym'}"


def ways() -> dict[tuple[str, str], str | None]:
    """(backend, way) -> None, or why its cells cannot be looked at here."""
    here = cpu.available_isas()
    found = {("cpu", i): None if i in here else f"this CPU has no {i}" for i in ISAS}
    if why := cpu.why_unavailable():
        found = dict.fromkeys(found, why)
    found["cuda", "emulated"] = None if shutil.which("g++") else "g++ is not on the PATH"
    found["cuda", "GPU"] = cuda.why_unavailable()
    triton_here = importlib.util.find_spec("triton") is not None
    found["triton", "interpreted"] = None if triton_here else "triton is not installed"
    found["triton", "GPU"] = None if torch.cuda.is_available() else "no CUDA device"
    return found


class Matrix:
    """What one test says of cells: it goes with the test's report."""

    def __init__(self, item: pytest.Item) -> None:
        self._said = item.user_properties

    @contextmanager
    def cell(
        self,
        backend: str,
        way: str,
        operations: str | Sequence[str],
        fmt: Format,
        kind: str = "equal",
    ) -> Iterator[None]:
        """The block compares these cells with the twin, or sees them refused (`kind`)."""
        name = format_id(fmt)
        operations = [operations] if isinstance(operations, str) else list(operations)
        assert operations and set(operations) <= set(OPERATIONS) and kind in KINDS
        try:
            yield
        except BaseException as error:
            error.add_note(f"cells: {backend} {way} {' '.join(operations)} {name}")
            raise
        self._said += [(MARK, [backend, way, one, name, kind]) for one in operations]

    def take_over(self, path: Path) -> None:
        """What another run wrote."""
        self._said += [(MARK, said) for said in json.loads(path.read_text())]


class Summary:
    """A plugin: gathers what tests said, prints the counts, and fails a whole run that lacks some.

    `formats` are the names of all formats.
    """

    def __init__(self, formats: Sequence[str], write: str | None) -> None:
        self.formats, self.write = formats, write
        self.cells: dict[Cell, str] = {}
        self.problems: list[str] = []
        self.printed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, said in report.user_properties:
                if name == MARK:
                    cell: Cell = tuple(said[:4])
                    if self.cells.setdefault(cell, said[4]) != said[4]:
                        self.problems.append(f"{' '.join(cell)}: {self.cells[cell]} and {said[4]}")

    def lines(self, whole: bool) -> Iterator[str]:
        """One for each way and operation, and for each way that is not here.

        A run of a part of the tests says nothing of what the others would look at.
        """
        for (backend, way), why in ways().items():
            done = {c: kind for c, kind in self.cells.items() if c[:2] == (backend, way)}
            if not done and why is not None:
                number = len(OPERATIONS) * len(self.formats)
                yield f"{backend:7}{way:12}{number} cells not run here: {why}"
                continue
            for operation in OPERATIONS:
                found = {c[3]: kind for c, kind in done.items() if c[2] == operation}
                counts = [f"{list(found.values()).count(kind)} {kind}" for kind in KINDS]
                if not found and not whole:
                    continue
                missing = [name for name in self.formats if name not in found and whole]
                counts += [f"{len(missing)} MISSING: {' '.join(missing)[:200]}"] if missing else []
                self.problems += [f"{backend} {way} {operation}"] if missing else []
                yield f"{backend:7}{way:12}{operation:22}{', '.join(counts)}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.write:
            said = [[*cell, kind] for cell, kind in self.cells.items()]
            Path(self.write).write_text(json.dumps(said))
        self.printed = list(self.lines(is_whole(session))) if self.cells else []
        if self.problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.printed:
            terminalreporter.section(f"formats ({len(self.formats)}) x operations x backends")
            for line in self.printed:
                terminalreporter.line(line)
            for problem in self.problems:
                terminalreporter.line(f"no test, or two answers: {problem}", red=True)


def is_whole(session: pytest.Session) -> bool:
    """Whether the run had every test that says something of a cell."""
    option = session.config.option
    by_testpaths = session.config.args_source is pytest.Config.ArgsSource.TESTPATHS
    narrowed = option.keyword or option.markexpr not in ("", MARK) or getattr(option, "lf", False)
    return by_testpaths and not narrowed and not session.shouldstop and not session.shouldfail
