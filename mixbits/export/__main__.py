"""`python -m mixbits.export DIR --format compressed-tensors|auto-round|gguf|plain --out DIR2`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command import Parser, exit_code, passive_threads, quiet
from ..errors import UsageError
from ..files.io import last_part, write_text
from ..progress import say

if TYPE_CHECKING:
    from ..files.atomic import Destination

FORMATS = ("compressed-tensors", "auto-round", "gguf", "plain")
REPORT = "mixbits-export.json"
_WORST = 5  # linears whose loss is printed; the report has them all


def make_parser() -> argparse.ArgumentParser:
    from .targets import TARGETS

    held = "; ".join(f"{name}: {TARGETS[name].says}" for name in FORMATS if name in TARGETS)
    parser = Parser(
        prog="python -m mixbits.export",
        description="Write a packed model as another engine reads it, codes carried over; or in 16 "
        "bits again (plain), for anything that loads the original.",
        epilog=f"what they hold: {held}; plain: everything. exit codes: 0 done, 2 wrong usage or "
        "input, 1 failure",
    )
    parser.add_argument(
        "model", metavar="DIR", help="a folder from mixbits.quantize, or its name on the hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a name on the hub")
    parser.add_argument("--format", choices=FORMATS, required=True, help="who reads it")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.add_argument(
        "--lossy",
        action="store_true",
        help="round again, and convert, what the format cannot hold; the loss is reported",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="instead of the model's own dtype, for what is not packed in that dtype, and for "
        "compressed-tensors' scales of integers; float32 for plain only, where nothing is rounded",
    )
    return parser


def _writer(name: str) -> Any:
    if name == "plain":
        from . import plain

        return plain
    if name == "gguf":
        from . import gguf

        return gguf
    if name == "auto-round":
        from . import auto_round

        return auto_round
    from . import compressed_tensors

    return compressed_tensors


def _report(args: argparse.Namespace, fits: Mapping[str, Any], losses: dict[str, float]) -> Any:
    """What became of every linear, for the output folder."""
    from .. import __version__

    layers = {
        name: {"scheme": fit.scheme.name, **({"because": fit.why} if fit.why else {})}
        for name, fit in fits.items()
    }
    return {
        "mixbits_version": __version__,
        "source": last_part(args.model),
        "format": args.format,
        "lossy": args.lossy,
        "linears": layers,
        "relative_errors": losses,
    }


def _print_losses(fits: Mapping[str, Any], losses: dict[str, float]) -> None:
    converted = [name for name, fit in fits.items() if fit.why]
    say(f"{len(fits)} packed linears, {len(converted)} of them converted")
    _print_worst(fits, losses, converted)


def _print_worst(
    fits: Mapping[str, Any], losses: dict[str, float], converted: Sequence[str] = ()
) -> None:
    worst = sorted(losses, key=lambda name: -losses[name])
    if not worst or losses[worst[0]] == 0:
        say("every weight stands for the same number as before")
        return
    say("relative error of a weight, worst first")
    for name in worst[:_WORST]:
        became = f" ({fits[name].why}: now {fits[name].scheme.name})" if name in converted else ""
        say(f"  {losses[name]:.2e}  {name}{became}")


def _print_plain(model: Any, losses: dict[str, float], dtype: Any) -> None:
    kind = str(dtype).removeprefix("torch.")
    say(f"{len(model.recipes)} packed linears, now plain {kind}")
    _print_worst({}, losses)
    recipes = ((recipe, model.linears[name].in_features) for name, recipe in model.recipes.items())
    if any(part.activation for recipe, columns in recipes for part, _ in recipe.parts(columns)):
        say("activations are not rounded any more, as some schemes did")


def _tell_loaders(fits: Mapping[str, Any], rounds_experts: bool) -> None:
    """What becomes of a folder of compressed-tensors in its loaders."""
    from .compressed_tensors import layout
    from .targets import TARGETS

    if rounds_experts:
        say("transformers dequantizes experts, and does not round their activations")
    schemes = {fit.scheme.name: fit.scheme for fit in fits.values() if fit.scheme.weight}
    if any(fmt.scale == "float32" for scheme in schemes.values() for fmt in scheme.formats):
        say(
            "transformers takes the scales of rows and tokens in the model's dtype: load it with "
            "dtype=torch.float32 for the same numbers"
        )
    if any(not s.format.symmetric and layout(s) == "pack-quantized" for s in schemes.values()):
        say(
            "transformers takes packed zero points where all linears are of one scheme, with "
            "quantization_config=CompressedTensorsConfig(dequantize=True), and fails without"
        )
    others = [name for name, scheme in schemes.items() if not TARGETS["vllm"].knows(scheme)]
    if others:
        say(f"vLLM does not run {', '.join(others)} as they are: --target vllm plans without")


def _fits(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What becomes of each packed linear. Raises UsageError for what the format cannot hold."""
    from ..formats.schemes import BF16
    from ..model.layout import check_layout
    from .targets import TARGETS, Fit, fit

    if args.format == "plain":
        return {name: Fit(BF16) for name in model.recipes}
    linears = list(model.linears.values())
    packed = [info for info in linears if info.name in model.recipes]
    check_layout(model.shapes, packed, args.format)
    try:
        return fit(TARGETS[args.format], linears, model.recipes, args.lossy)
    except UsageError as error:
        plan = f"; python -m mixbits.quantize --target {args.format} plans in what it holds"
        raise UsageError(f"{error}{plan}") from error


def export(args: argparse.Namespace) -> None:
    """Raises UsageError; leaves a complete output folder or none."""
    from ..files.atomic import reserved

    with reserved(args.out, args.overwrite, [Path(args.model)]) as place:
        _export(args, place)


def _export(args: argparse.Namespace, place: Destination) -> None:
    import torch

    from ..formats.schemes import Recipe
    from . import readme
    from .packed import Carrier, PackedModel

    if args.dtype == "float32" and args.format != "plain":
        raise UsageError(f"--dtype float32 is for --format plain only: got {args.format}")
    model = PackedModel.open(args.model, args.revision)
    if not model.recipes:
        raise UsageError(f"no linear is packed in {args.model}")
    dtype = getattr(torch, args.dtype) if args.dtype else model.dtype
    carrier = Carrier(model, _fits(args, model), dtype, args.lossy)
    writer, carried, fits = _writer(args.format), model.carried_specs, carrier.fits
    needs = sum(s.nbytes for s in ({s.name: s for s in carried} | dict(model.specs)).values())
    if args.format == "plain":
        needs = writer.nbytes(carrier)
    with place.folder(needs) as folder:
        writer.write(folder, carrier)
        text = json.dumps(_report(args, fits, carrier.losses), indent=2) + "\n"
        write_text(folder / REPORT, text)
        held = {linear: Recipe.plain(found.scheme) for linear, found in fits.items()}
        write_text(folder / "README.md", readme.render(args.format, args.out, model, held))
    if args.format == "plain":
        _print_plain(model, carrier.losses, dtype)
    else:
        _print_losses(fits, carrier.losses)
    rounded = [name for name, found in fits.items() if found.scheme.activation]
    if args.format == "gguf" and rounded:
        say("llama.cpp rounds activations to 8 bits in a way of its own, not as the schemes say")
    if args.format == "gguf" and carried:
        megabytes = sum(spec.nbytes for spec in carried) / 1e6
        say(
            f"a GGUF holds the text model only: left out {len(carried)} tensors, "
            f"{megabytes:.1f} MB ({carried[0].name}{', ...' if len(carried) > 1 else ''})"
        )
    if args.format == "compressed-tensors":
        _tell_loaders(fits, any(model.linears[n].is_expert for n in rounded))
    say(f"written to {args.out}; how to load it is in {args.out}/README.md")


def _command(argv: list[str] | None) -> None:
    args = make_parser().parse_args(argv)
    from ..files.system import ended_by_signals

    quiet()
    with ended_by_signals():
        export(args)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    passive_threads()
    return exit_code(lambda: _command(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
