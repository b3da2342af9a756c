"""Imports point one way, and the packages lie where other packages cannot be hidden by them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mixbits

PACKAGE = Path(mixbits.__file__).parent
ROOT = PACKAGE.parent
# From the roof down: a room imports from floors below its own, and from nowhere else.
FLOORS = [
    {"quantize", "serve", "lm_eval", "info", "integrations"},
    {"api"},
    {"pipeline"},
    {"export", "server"},
    {"report", "checkpoint"},
    {"planning", "runtime"},
    {"measuring", "rounding"},
    {"source", "ops"},
    {"backends"},
    {"formats", "model"},
    {"files", "command"},
    {"progress"},
    {"errors", "demo", "_registration"},
]
FLOOR = {name: len(FLOORS) - i for i, names in enumerate(FLOORS) for name in names}
NATIVE = {"_cpu", "_cuda", "kernels"}


def imports(path: Path) -> set[str]:
    """Modules of mixbits that a file imports, without `mixbits.`; others with a dot before.

    What only a type checker sees is no dependency.
    """
    package = path.relative_to(PACKAGE).parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            start = ["mixbits", *above] if node.level else []
            start += [node.module] if node.module else []
            names = [".".join([*start, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            found.add(rest if head == "mixbits" and rest else f".{head}")
    return found - {"__version__"}


def rooms(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path) if not name.startswith(".")}


FILES = sorted(PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = owner(path)
    seen = rooms(path) - {room} - NATIVE
    if room == "__init__":
        assert seen == {"_registration"}
        return
    assert {room, *seen} <= set(FLOOR), f"on no floor: {({room} | seen) - set(FLOOR)}"
    assert not {name for name in seen if FLOOR[name] >= FLOOR[room]}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_backends_know_the_native_code(path: Path) -> None:
    if owner(path) not in {"ops", "backends"}:
        assert not (rooms(path) | imports(path)) & (NATIVE | {".triton", ".mixbits"})


def test_the_knapsack_and_the_formats_need_no_torch() -> None:
    pure = "planning/allocate", "planning/knapsack", "planning/stability", "planning/smallest"
    pure += "formats/schemes", "export/targets"
    for name in (*pure, "planning/curve", "report/charts", "pipeline/options"):
        assert not imports(PACKAGE / f"{name}.py") & {".torch", ".transformers"}
    for name in pure:
        calls = ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")))
        assert not {n.id for n in calls if isinstance(n, ast.Name)} & {"open", "Path", "print"}


def test_no_package_of_ours_hides_the_kernels_package() -> None:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("installed without its sources")
    assert (ROOT / "kernels" / "triton").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "statement", ["import mixbits", "from mixbits.pipeline import options, early"]
)
def test_importing_is_cheap(statement: str) -> None:
    code = f"{statement}; import sys; print({{'torch', 'transformers'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_importing_the_commands_changes_nothing_of_the_process() -> None:
    code = """if True:
        import os, signal
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        before = dict(os.environ), [signal.getsignal(n) for n in numbers]
        from mixbits import api, info, lm_eval, quantize, serve
        from mixbits.export import __main__
        print(before == (dict(os.environ), [signal.getsignal(n) for n in numbers]))"""
    bare = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=bare)
    assert out.stdout == "True\n"


def test_the_names_of_the_root_are_found_where_they_are_said_to_be() -> None:
    for name in mixbits.__all__:
        assert getattr(mixbits, name)
    assert not hasattr(mixbits, "nothing_of_this_name")
    assert not callable(getattr(mixbits, "quantize", None))
