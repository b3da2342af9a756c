"""What a run says of itself as it goes, in lines; `mixbits.progress.say` takes them on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..backends.choice import choose_backend, holder
from ..formats.schemes import Recipe, Scheme, parse_scheme
from ..model.layout import LeftAlone
from ..planning.plan import Plan, average_bits
from ..progress import say
from ..report.report import Report
from ..report.tables import (
    gate_rows,
    number,
    result_rows,
    scheme_rows,
    search_line,
    size,
    table,
    task_rows,
    text_lines,
)
from ..report.verdict import lines
from ..source.folded import Folded
from ..source.folding import parameter_of
from .gate import Decision
from .run import Run
from .settings import Settings
from .texts import Text


def source(run: Run) -> None:
    """What else than plain linears in 16 bits the source holds, and schemes without kernels."""
    if run.menu:
        names = ", ".join(scheme.name for scheme in run.schemes)
        say(f"  to choose from: {names} ({run.menu}); --schemes asks for others")
    measures = not (run.settings.scores or run.settings.plan)
    if measures and run.settings.rotate is None and run.rotated:
        say(
            "  inputs of linears are rotated, 32 columns at a time, which spreads outliers before "
            "they are rounded; --rotate none leaves them"
        )
    for line in source_lines(run):
        say(f"  {line}")
    if slow := without_kernels(run.all_schemes, str(run.settings.device)):
        say(f"  {', '.join(slow)}: not all kernels are here yet; plain torch does the rest, slowly")


def without_kernels(schemes: Sequence[Scheme], device: str) -> list[str]:
    """The names of those that only the slow definition can make, or run, on a device."""
    kind = torch.device(device).type
    if choose_backend(kind, None) == "reference":
        return []
    return [s.name for s in schemes if holder(kind, None, s.formats) == "reference"]


def source_lines(run: Run) -> Iterator[str]:
    weights = run.source.weights if run.source.has_weights else None  # or config.json alone
    own, kind, itemsize = run.own, type(run.shapes).__name__, run.source.dtype.itemsize

    def nbytes(one: LeftAlone) -> int:
        if weights is None or one.name not in weights.groups:
            return one.numel * itemsize
        return weights.nbytes(one.name)

    if isinstance(run.source, Folded):
        yield from _folded_lines(run, run.source)
    yield from run.coverage.lines(nbytes)
    if weights and (parts := weights.carried_parts):
        yield (
            f"{size(weights.files.nbytes(parts))} in {len(parts)} tensors that {kind} does not "
            f"take are carried over as they are ({parts[0]}{' ...' if len(parts) > 1 else ''})"
        )
    if own.formats:
        names = ", ".join(scheme.name for scheme in own.schemes)
        yield f"{len(own.formats)} linears are stored in {names}: a plan can keep that"


def _folded_lines(run: Run, source: Folded) -> Iterator[str]:
    yield (
        "the model is folded into a rotated basis, 32 columns at a time, which nothing that runs "
        "it has to know of"
    )
    read = source.folding.read
    left = [i for i in run.linears if parameter_of(source.shapes, i) not in read]
    if left:
        leaves = ", ".join(dict.fromkeys(i.name.rpartition(".")[2] for i in left))
        yield f"inputs of {len(left)} linears are not rotated ({leaves})"
    if source.head_bytes:
        yield (
            "the head, which was tied to the embedding, has weights of its own: "
            f"{size(source.head_bytes)} more"
        )


def text(found: Text, tokenizer: Any) -> None:
    """What is to know of the text."""
    for note in found.notes:
        say(f"      {note}")
    if prefix := found.calibration.prefix:
        say(f"      every sequence begins with {tokenizer.decode(prefix)}")


def plan(run: Run, decision: Decision, report: Report) -> None:
    """What ships, and what it was compared with."""
    reached = report.reached
    if report.candidates:
        say(table(gate_rows(report.candidates)))
    say(table(scheme_rows(run.linears, decision.winner.plan.assignment)))
    say(
        f"  {number(reached.avg_bits, '.4f')} bits per weight with everything counted"
        f"{_of_how_much(run)}, {number(reached.avg_bits_without_scales, '.4f')} without scales; "
        f"weight files {size(reached.predicted_bytes or 0)}"
    )


def _of_how_much(run: Run) -> str:
    """What "everything" is, where it is not nearly all of the decoder blocks' weights."""
    share = run.coverage.share(run.linears)
    return f" (of {share:.1%} of the decoder blocks' weights)" if share < 0.99 else ""


def results(report: Report) -> None:
    """What the run came to."""
    evaluation = report.evaluation
    say("\n" + table(result_rows(report)) + "\n")
    for line in [*lines(evaluation), *text_lines(evaluation), *search_line(report)]:
        say(f"  {line}")
    if evaluation and evaluation.tasks:
        say("\n" + table(task_rows(evaluation)))
    if evaluation and evaluation.sample is not None:
        say("\n  the quantized model writes:\n")
        say("\n".join("    " + line for line in evaluation.sample.expandtabs(4).splitlines()))


def curve(settings: Settings) -> None:
    """Where the curve is."""
    if settings.curve:
        say(f"  what every budget buys is in {settings.out}/curve.svg and curve.csv")


def next_step(settings: Settings) -> None:
    """How the result comes to its target."""
    if not settings.target:
        return
    name = "compressed-tensors" if settings.target == "vllm" else settings.target
    folders = shlex.quote(str(settings.out)), shlex.quote(f"{settings.out}-{name}")
    say(
        f"  for {settings.target}: python -m mixbits.export {folders[0]} --format {name} "
        f"--out {folders[1]}"
    )


def sizes(run: Run) -> None:
    """Shapes and sizes, from config.json alone: `--dry-run`."""
    elements = sum(i.numel for i in run.linears)
    say(f"{len(run.linears)} linears in {len(run.units)} units, {elements:,} weights")
    source(run)
    kinds: dict[str, list[Any]] = {}
    for info in run.linears:
        kinds.setdefault(info.name.rpartition(".")[2], []).append(info)
    rows = [["module", "count", "out", "in"]]
    for kind, members in kinds.items():
        for shape in sorted({(i.out_features, i.in_features) for i in members}):
            count = sum((i.out_features, i.in_features) == shape for i in members)
            rows.append([kind, str(count), *map(str, shape)])
    say(table(rows) + "\n")
    rows = [["all linears in", "bits", "without scales", "weight files"]]
    for scheme in [*run.schemes, parse_scheme("BF16")]:
        everywhere = dict.fromkeys((i.name for i in run.linears), Recipe.plain(scheme))
        bits = [f"{average_bits(run.linears, everywhere, ignore):.4f}" for ignore in (False, True)]
        rows.append([scheme.name, *bits, size(run.predicted_bytes(everywhere))])
    say(table(rows))
    if run.settings.plan is not None:
        given = Plan.read(run.settings.plan, run.linears).assignment
        say("\n" + table(scheme_rows(run.linears, given)))
        say(f"  predicted size {size(run.predicted_bytes(given))}")
