"""The command line of `python -m mixbits.quantize`: its options are the fields of `Settings`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..command import Parser, typed
from ..formats.schemes import SCHEME_NAMES
from .kinds import DatasetName, datasets
from .rules import settled
from .settings import GROUPS, KNOWN, Settings, spelt

_EXAMPLES = f"""\
examples:
  python -m mixbits.quantize --demo
      everything in one go, on the bundled model: nothing is downloaded
  python -m mixbits.quantize ./Llama-3.1-8B --effort quick
      a first look in minutes, without any text
  python -m mixbits.quantize ./Llama-3.1-8B --avg-bits 4.5 --dataset text.txt --out llama-4.5
      4 and 8 bits mixed at 4.5 bits per weight, scales counted
  python -m mixbits.quantize ./Llama-3.1-8B --size 4.2GB --schemes W2A16,W4A16,W8A16 \\
      --scores llama-4.5/scores.json --solve-only --out plans
      another budget; works when the scores hold these schemes
  python -m mixbits.quantize ./Llama-3.1-8B --avg-bits 5.5 --keep '*.down_proj=W8A16G64' --fuse \\
      --dataset text.jsonl --tasks lambada_openai,hellaswag,piqa,winogrande,mmlu --out llama-5.5
  python -m mixbits.quantize ./Llama-3.1-8B --plan llama-5.5/plan.json --eval-nsamples 0 \\
      --rounding search --out llama-edited
      a plan of your own; unscored, and rounded without error compensation, it needs no text
  python -m mixbits.quantize ./Llama-3.1-8B --max-kl 0.05 --granularity slab --dataset text.txt \\
      --curve --diagnose --out llama-good
      the smallest model of that quality, what every budget buys, and whether to trust it all

schemes: {SCHEME_NAMES}
exit codes: 0 done, 2 wrong usage or input, 1 failure
"""


def _add(group: Any, name: str) -> None:
    """The option of one setting."""
    how, default = KNOWN[name].metadata, KNOWN[name].default
    help = how["help"]
    options: dict[str, Any] = {"help": help and help.replace("%(default)s", str(default))}
    for key in ("choices", "metavar", "const"):
        if key in how:
            options[key] = how[key]
    if how.get("kind") is datasets:
        options["type"] = DatasetName
    if "const" in how:
        options["nargs"] = "?"
    if how.get("is_positional"):
        group.add_argument(name, nargs="?", **options)
        return
    if how.get("is_tristate"):
        options["action"] = argparse.BooleanOptionalAction
    elif "off" in how:
        options |= {"dest": name, "action": "store_false"}
    elif default is False:
        options["action"] = "store_true"
    elif how.get("is_repeatable"):
        options["action"] = "append"
    group.add_argument(how.get("off", spelt(name)), **options)


def make_parser() -> argparse.ArgumentParser:
    """Of all settings, as text and without defaults: `rules.settled` makes of it what it is."""
    parser = Parser(
        prog="python -m mixbits.quantize",
        description="Quantize a language model to mixed precision, pack it, and score it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for settings in GROUPS:
        group = parser.add_argument_group(settings.__doc__)
        sets: dict[str, Any] = {}
        for name in settings.__annotations__:
            one_of = KNOWN[name].metadata.get("one_of")
            if one_of and one_of not in sets:
                sets[one_of] = group.add_mutually_exclusive_group()
            _add(sets[one_of] if one_of else group, name)
    return parser


def given(argv: list[str] | None = None) -> dict[str, Any]:
    """The settings that were typed, as text. Raises UsageError for options that there are not."""
    found = vars(make_parser().parse_args(argv))
    return {name: value for name, value in found.items() if name in KNOWN}


def parse_arguments(argv: list[str] | None = None) -> Settings:
    """Parse and check. Raises UsageError; `command` is what was typed."""
    return settled(given(argv), typed("mixbits.quantize", argv))


def typed_as(settings: Mapping[str, Any]) -> str:
    """The command that asks for what was given in Python."""
    words: list[str] = []
    for name, value in settings.items():
        if name not in KNOWN or value is None or value == KNOWN[name].default:
            continue
        how = KNOWN[name].metadata
        if how.get("is_positional"):
            words.insert(0, str(value))
        elif isinstance(value, bool):
            words.append(how.get("off") or spelt(f"no_{name}" if value is False else name))
        elif isinstance(value, (list, tuple)) and how.get("is_repeatable"):
            words += [word for one in value for word in (spelt(name), str(one))]
        else:
            several = isinstance(value, (list, tuple))
            words += [spelt(name), ",".join(map(str, value)) if several else str(value)]
    return typed("mixbits.quantize", words)
