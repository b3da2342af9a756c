"""What the documents say: commands that their modules parse, options and links that exist."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mixbits
from mixbits.export.__main__ import make_parser as export_parser
from mixbits.pipeline.options import make_parser, parse_arguments
from mixbits.serve import make_parser as serve_parser

ROOT = Path(mixbits.__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python3? -m ((?:mixbits|benchmarks)(?:\.\w+)+)([^&|\n]*)")
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


class _Parsed(BaseException):
    """The arguments were understood: nothing needs to run."""


def parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module's own parser read `arguments`, and stop. Raises where it refuses them."""
    if module == "mixbits.quantize":
        settings = parse_arguments(arguments)  # with its checks of what goes together
        assert settings.demo == ("--demo" in arguments) != (settings.model in arguments)
        return
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: object, **named: object) -> None:
        parse_args(parser, *given, **named)
        raise _Parsed

    name = "mixbits.export.__main__" if module == "mixbits.export" else module
    main = importlib.import_module(name).main
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(_Parsed):
        main()


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Modules and arguments of a document: lines of its blocks, and spans that have arguments."""
    for block in FENCE.findall(text):
        for module, rest in COMMAND.findall(block.replace("\\\n", " ")):
            yield module, shlex.split(rest, comments=True)
    for span in SPAN.findall(FENCE.sub("", text)):
        for module, rest in COMMAND.findall(span.replace("\n", " ")):
            if rest.strip():
                yield module, shlex.split(rest)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
TEXTS["--help"] = f"```\n{make_parser().epilog}\n```"
FOUND = [(name, *command) for name, text in TEXTS.items() for command in commands(text)]


@pytest.mark.parametrize(
    ("document", "module", "arguments"),
    FOUND,
    ids=[" ".join([name, module, *arguments[:3]]) for name, module, arguments in FOUND],
)
def test_commands_parse(document, module, arguments, monkeypatch):
    parse(module, arguments, monkeypatch)


def test_commands_are_found():
    """A document or two have none; a pattern that found nothing would pass everything."""
    silent = set(TEXTS) - {name for name, *_ in FOUND}
    assert silent == {"docs/README.md", "docs/python.md"}


@pytest.mark.parametrize(
    "command",
    ["quantize ./model --avg-bit-budget 4", "export DIR --out x", "info --matmull 1x1"],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    [(module, arguments)] = commands(f"```\npython -m mixbits.{command}  # so\n```\n")
    with pytest.raises((ValueError, SystemExit, pytest.fail.Exception)):
        parse(module, arguments, monkeypatch)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_modules_exist(path):
    for module in re.findall(r"python3? -m ((?:mixbits|benchmarks)(?:\.\w+)+)", path.read_text()):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_options_exist(path):
    """Options that the prose names are of quantize, export or serve, or of the page's commands."""
    text = path.read_text()
    parsers = (make_parser(), export_parser(), serve_parser())
    known = {option for parser in parsers for option in parser._option_string_actions}
    known |= {word for *_, arguments in commands(text) for word in arguments}
    for span in SPAN.findall(FENCE.sub("", text)):
        if span.startswith("--"):
            assert span.split()[0] in known, span


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_every_page_is_in_the_list():
    listed = (ROOT / "docs" / "README.md").read_text()
    assert len(PAGES) > 1
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in listed, page.name


def test_environment_variables_are_in_the_table():
    """Those that Python or the scripts read, and no others."""
    folders = [ROOT / name for name in ("mixbits", "kernels", "tests", "benchmarks")]
    files = [path for folder in folders for kind in ("*.py", "*.sh") for path in folder.rglob(kind)]
    text = "\n".join(path.read_text() for path in [*files, ROOT / "setup.py"])
    read = re.findall(r'"(MIXBITS_[A-Z_]+)"|\b(MIXBITS_[A-Z_]+)=', text)
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Environment variables")[2]
    told = set(re.findall(r"^\| `(MIXBITS_[A-Z_]+)`", table, re.MULTILINE))
    assert told == {quoted or assigned for quoted, assigned in read}
