"""Imports point one way, and the packages lie where other packages cannot be hidden by them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mixbits

PACKAGE = Path(mixbits.__file__).parent
ROOT = PACKAGE.parent
# From the top down: a module imports only from lines below its own.
LAYERS = [
    {"quantize", "info", "serve", "lm_eval", "export", "integrations"},
    {"findings", "feasibility", "server"},
    {"stages"},
    {"report_html", "card", "coverage"},
    {"report_plan"},
    {"report", "gate", "refine"},
    {"evaluate"},
    {"loading"},
    {"transformers_quantizer"},
    {"unpacking"},
    {"stock"},
    {"checkpoint", "graphs", "decode", "pages"},
    {"plan", "rounded", "distill"},
    {"scores"},
    {"sensitivity"},
    {"probing"},
    {"source", "calibration", "fake", "signround"},
    {"streaming"},
    {"linear", "kept"},
    {"nearest"},
    {"weights"},
    {"layouts"},
    {"stored"},
    {"ops"},
    {"gradients"},
    {"backends"},
    {"checks", "folding", "scale_range", "rounding"},
    {"pack", "compensate"},
    {"reference"},
    {"model", "attention", "cache", "staging"},
    {"recognise", "usage"},
    {"experts"},
    {"twin"},
    {"early"},
    {"options", "arrange", "recipes", "atomic"},
    {"quality"},
    {"curve", "diagnostics", "report_style", "report_pieces"},
    {"charts"},
    {"allocate"},
    {"knapsack"},
    {"demo", "manifest"},
    {"companions", "model_files", "hub_data"},
    {"targets", "command", "schemas", "progress", "verdict", "system", "chats"},
    {"files"},
    {"formats"},
    {"errors"},
]
LEVEL = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}
NATIVE = {"_cpu", "_cuda", "kernels"}


def imports(path: Path) -> set[str]:
    """Parts of mixbits that a file imports, by first name, and other packages with a dot before.

    What only a type checker sees is no dependency.
    """
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "mixbits" if node.level == depth else ""
            parts = [part for part in (base, node.module or "") if part]
            if node.level and node.level < depth:
                continue  # inside its own folder
            names = [
                ".".join([*parts, a.name]) if parts == ["mixbits"] else ".".join(parts)
                for a in node.names
            ]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            found.add(rest.partition(".")[0] if head == "mixbits" and rest else f".{head}")
    return found - {"__version__"}


FILES = sorted(PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    name = owner(path)
    if name == "__init__":
        assert not {n for n in imports(path) if not n.startswith(".")}
        return
    own = {n for n in imports(path) if not n.startswith(".")} - {name} - NATIVE
    assert own <= set(LEVEL), f"not in LAYERS: {own - set(LEVEL)}"
    allowed = {n for n in LEVEL if LEVEL[n] < LEVEL[name] or {n, name} <= LAYERS[3]}
    assert own <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_backends_know_the_native_code(path: Path) -> None:
    if owner(path) not in {"ops", "backends"}:
        assert not imports(path) & (NATIVE | {".triton", ".mixbits"})


def test_the_knapsack_and_the_formats_need_no_torch() -> None:
    pure = "allocate", "knapsack", "diagnostics", "quality", "formats", "targets"
    for name in (*pure, "curve", "options"):
        assert not imports(PACKAGE / f"{name}.py") & {".torch", ".transformers"}
    for name in pure:
        calls = ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")))
        assert not {n.id for n in calls if isinstance(n, ast.Name)} & {"open", "Path", "print"}


def test_no_package_of_ours_hides_the_kernels_package() -> None:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("installed without its sources")
    assert (ROOT / "kernels" / "triton").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("statement", ["import mixbits", "from mixbits import allocate, options"])
def test_importing_is_cheap(statement: str) -> None:
    code = f"{statement}; import sys; print({{'torch', 'transformers'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_names_of_the_root_are_found_where_they_are_said_to_be() -> None:
    for name in mixbits.__all__:
        assert getattr(mixbits, name)
    assert not hasattr(mixbits, "nothing_of_this_name")
    assert not callable(getattr(mixbits, "quantize", None))
