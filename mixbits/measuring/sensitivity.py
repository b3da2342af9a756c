"""How much the model's predictions suffer when one linear is stored in one format.

There are three methods, whose modules have their formulas:

    fisher      the second order of the KL divergence, at the model as it is; the default
    deltaloss   the first order of the cross entropy, at the quantized model
    weight      the relative squared error of the weight, without text

All are sums over input columns, so that the score of every 32-column slab comes with that of the
linear. Columns that suffer alike can be put beside each other first: `fisher.sorted_columns` finds
their order, and `measure` takes it, since the blocks that share a scale are others then.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from ..errors import UsageError
from ..formats.schemes import Scheme
from ..model.layout import LinearInfo
from ..model.streaming import StreamedModel
from .deltaloss import measure_deltaloss
from .fisher import measure_fisher
from .slabs import Arrangements, SlabScores, Task, progress_of
from .weight import measure_weight

_MEASURES = {
    "fisher": measure_fisher,
    "deltaloss": measure_deltaloss,
    "weight": measure_weight,
}
METHODS = tuple(_MEASURES)


def measure(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    schemes: Sequence[Scheme],
    ids: Tensor,
    method: str = "fisher",
    batch_size: int = 8,
    seed: int = 0,
    arrangements: Arrangements = MappingProxyType({}),
) -> SlabScores:
    """Score every scheme on every linear with calibration tokens ids [sequences, length].

    `arrangements` has the linears whose columns are ordered or rotated; slabs are of these.
    Returns {linear: {scheme: [score of each 32-column slab]}}; a linear's score is the sum.
    `fisher` is in nats per token, `deltaloss` in nats of the batches' mean losses, added up;
    `weight` takes no tokens and has no unit.
    Raises UsageError for an unknown method, or where the model's loss is not finite.
    """
    if method not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}: got {method!r}")
    if arrangements and method != "fisher":
        raise UsageError(
            f"{method} scores columns as they come: ordered or rotated ones need fisher"
        )
    if method == "fisher":  # a sum over tokens, however they are batched: what fits in memory
        batch_size = min(batch_size, model.tokens_at_once() // ids.shape[1] or batch_size)
    batches = list(ids.split(batch_size)) if method != "weight" else []
    passes = sum(s.weight is not None for s in schemes) if method == "deltaloss" else 1
    calls = 2 * passes * len(batches) * len(model.blocks)
    progress = progress_of(model, passes * len(ids), calls)
    task = Task(model, linears, schemes, batches, seed, progress, arrangements)
    scores = _MEASURES[method](task)
    for name, by_scheme in scores.items():
        for scheme_name, slabs in by_scheme.items():
            if not all(s == s and abs(s) != float("inf") for s in slabs):
                raise UsageError(
                    f"scores must be finite: got NaN or infinity for {scheme_name} ({name}); "
                    "the model itself overflows on the calibration text"
                )
    return scores
