"""Scores of a run: every scheme on every linear, its columns arranged."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError
from ..formats.arrange import Arrangement
from ..measuring.fisher import sorted_columns
from ..measuring.scores import Scores
from ..measuring.sensitivity import measure as measure_sensitivity
from ..measuring.text import Sequences
from ..model.layout import CausalLM
from ..model.streaming import StreamedModel, gradient_dtype
from ..model.units import Unit
from .run import Run, check_folded


def _new_arrangements(
    run: Run, model: StreamedModel, sequences: Sequences
) -> dict[str, Arrangement]:
    """Orders of columns for slabs, and which linears are rotated."""
    settings = run.settings
    arrangements: dict[str, Arrangement] = {}
    if settings.slabs:
        readers = [unit.linears for unit in run.units if _reads_one_input(unit)]
        cheapest = min(run.schemes, key=lambda s: s.element_bits)
        arrangements = sorted_columns(
            model,
            run.linears,
            readers,
            cheapest,
            sequences.ids,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
    for name in run.rotated:
        order = arrangements[name].order if name in arrangements else None
        arrangements[name] = Arrangement(order, rotated=True)
    return arrangements


def _reads_one_input(unit: Unit) -> bool:
    """Whether all linears of a unit do; an expert's last linear reads what its own expert makes."""
    apart = [info for info in unit.linears if info.is_expert and info.ffn_output]
    return not apart or len(unit.linears) == 1


def check_known(
    run: Run,
    scores: Scores,
    where: object,
    sha256: str | None = None,
    prefix: Sequence[int] | None = None,
) -> None:
    """Raises UsageError unless scores that were measured before, `where`, are what the run needs.

    `sha256` of the model, and `prefix` of sequences: None where these are known to be the same.
    """
    scores.check(where, run.linears, run.all_schemes, run.scale_modes, sha256, prefix)
    check_folded(run, scores.is_folded, where)
    asked = run.settings.rotate
    if asked and [i.name for i in run.linears if scores.rotated(i.name)] != run.rotated:
        raise UsageError(f"{where} was measured without --rotate {asked}: measure again")
    if not run.settings.slabs:
        return
    for unit in run.units:
        if len({tuple(scores.order(info.name) or ()) for info in unit.linears}) > 1:
            raise UsageError(
                f"{where} was measured with the columns of {unit.name} in several orders, where "
                "slabs are to agree: measure again, or pass --free-slabs"
            )


def measure(run: Run, model: CausalLM, sequences: Sequences, sha256: str) -> Scores:
    """Read scores.json, or make it."""
    settings = run.settings
    if settings.scores is not None:
        scores = Scores.read(settings.scores)
        check_known(run, scores, settings.scores, sha256, sequences.prefix)
        return scores
    dtype = gradient_dtype(run.source.dtype, settings.computes_on)
    streamed = StreamedModel(model, dtype, settings.computes_on)
    arranged = _new_arrangements(run, streamed, sequences)
    return score(run, streamed, sequences, settings.method, arranged, sha256)


def score(
    run: Run,
    model: StreamedModel,
    sequences: Sequences,
    method: str,
    arranged: dict[str, Arrangement],
    sha256: str,
) -> Scores:
    """Scores of every scheme on every linear, its columns arranged."""
    settings = run.settings
    slabs = measure_sensitivity(
        model,
        run.linears,
        run.all_schemes,
        sequences.ids,
        method,
        batch_size=settings.batch_size,
        seed=settings.seed,
        arrangements=arranged,
    )
    described = {**sequences.describe(), "batch_size": settings.batch_size, "seed": settings.seed}
    for linear, scores in slabs.items():
        free = [s.name for s in run.all_schemes if run.own.is_free(linear, s)]
        scores |= {name: [0.0] * len(scores[name]) for name in free}
    name = run.describe_source(sha256)
    return Scores.build(slabs, run.linears, method, run.scale_modes, name, described, arranged)
