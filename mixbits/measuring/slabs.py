"""What the methods of measuring share: what is scored, and scores per slab of 32 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..formats.arrange import Arrangement
from ..formats.schemes import MX_GROUP, Scheme
from ..model.layout import LinearInfo
from ..model.streaming import Progress, StreamedModel
from ..progress import BACKWARD, steps

SlabScores = dict[str, dict[str, list[float]]]  # linear -> scheme -> score per 32-column slab
Arrangements: TypeAlias = Mapping[str, Arrangement]  # linear -> how its columns are arranged


@dataclass(frozen=True)
class Task:
    """What a method of measuring is to score, and with what.

    `batches` are token ids [B, S]; `progress` is told of every call of a block. `arrangements` has
    the linears whose columns are ordered or rotated: slabs are of these.
    """

    model: StreamedModel
    linears: Sequence[LinearInfo]
    schemes: Sequence[Scheme]
    batches: Sequence[Tensor]
    seed: int
    progress: Progress
    arrangements: Arrangements = field(default_factory=dict)


def slab_sums(columns: Tensor) -> Tensor:
    """float64 [..., K] -> [..., slabs]: sums over 32 columns, the last slab may be short."""
    pad = -columns.shape[-1] % MX_GROUP
    padded = torch.nn.functional.pad(columns, (0, pad))
    return padded.unflatten(-1, (-1, MX_GROUP)).sum(-1)


def progress_of(model: StreamedModel, sequences: int, calls: int) -> Progress:
    """For `calls` calls while every sequence is differentiated through all blocks."""
    return steps(calls, BACKWARD * sequences * len(model.blocks) / max(1, calls))
