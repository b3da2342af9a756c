"""Writes the questions of the bundled lm-eval task ``stdlib_next_line``.

    python benchmarks/tools/make_demo_task.py

A question shows a dozen consecutive lines of a held-out standard-library file and four lines that
might come next: the one that does, and three others from elsewhere in the same file with about
the same indentation and length.  So neither the file's subject nor the layout of a line gives the
answer away; what helps is to have understood the lines above.

Blank and very short lines, lines that the context already shows and near-duplicates of another
choice are left out.  The choice is deterministic for one Python version; the bundled file was
written with CPython 3.11.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mixbits import demo

CONTEXT_LINES = 12
MIN_CHARACTERS = 12  # of a line, without its indentation
MAX_CHARACTERS = 1200  # of a context, so that it fits the model's window whatever it holds


@dataclass
class Question:
    """One question: where it is from, the lines above, the candidates, the index of the right."""

    file: str
    line: int
    context: str
    choices: list[str]
    answer: int


def main() -> None:
    """Write the jsonl file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=demo.TASKS_DIR / "stdlib_next_line.jsonl")
    parser.add_argument("--count", type=int, default=300, help="questions to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = [json.dumps(asdict(q), ensure_ascii=False) for q in questions(args.count, args.seed)]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"{len(lines)} questions, {args.out.stat().st_size:,} bytes")


def questions(count: int, seed: int) -> list[Question]:
    """The first `count` good questions among the lines of all held-out files, shuffled."""
    rng = random.Random(seed)
    sources = {_name(path): _lines(path) for path in demo.held_out_files()}
    places = [
        (name, at) for name, lines in sources.items() for at in range(CONTEXT_LINES, len(lines))
    ]
    rng.shuffle(places)
    found: list[Question] = []
    taken: dict[str, list[int]] = {}
    for name, at in places:
        # Contexts that overlap would make the questions less independent than their number.
        if any(abs(at - other) <= CONTEXT_LINES for other in taken.get(name, [])):
            continue
        question = _question(name, sources[name], at, rng)
        if question:
            found.append(question)
            taken.setdefault(name, []).append(at)
        if len(found) == count:
            break
    return found


def _question(name: str, lines: list[str], at: int, rng: random.Random) -> Question | None:
    """The question whose answer is lines[at], if the line and three distractors are good."""
    context, right = lines[at - CONTEXT_LINES : at], lines[at]
    text = "\n".join(context).strip("\n")
    if not _usable(right, context) or not context[-1].strip() or len(text) > MAX_CHARACTERS:
        return None
    others = [line for line in lines if _usable(line, context) and _similar_layout(line, right)]
    rng.shuffle(others)
    choices = [right]
    for line in others:
        if not any(_near_duplicate(line, choice) for choice in choices):
            choices.append(line)
        if len(choices) == 4:
            rng.shuffle(choices)
            return Question(name, at + 1, text, choices, choices.index(right))
    return None


def _usable(line: str, context: list[str]) -> bool:
    return len(line.strip()) >= MIN_CHARACTERS and line not in context


def _similar_layout(line: str, right: str) -> bool:
    """About the same indentation, and a length within a third."""
    shorter, longer = sorted((len(line.strip()), len(right.strip())))
    return abs(_indent(line) - _indent(right)) <= 4 and 3 * longer <= 4 * shorter


def _near_duplicate(line: str, other: str) -> bool:
    return SequenceMatcher(None, line.strip(), other.strip(), autojunk=False).ratio() > 0.7


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _lines(path: Path) -> list[str]:
    return [line.rstrip() for line in path.read_text(encoding="utf-8").split("\n")]


def _name(path: Path) -> str:
    """``argparse.py`` or ``json/decoder.py``, the same on every machine."""
    is_module = path.stem in demo.HELD_OUT
    return path.name if is_module else f"{path.parent.name}/{path.name}"


if __name__ == "__main__":
    main()
