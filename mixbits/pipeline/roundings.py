"""The ways to round a plan's weights, as values: a candidate has one.

Nearest()                  to the nearest values
Search()                   the same, with the scale of least error for each group
Gptq(correction)           with error compensation (`mixbits.rounding.gptq`)
SignRound(steps)           learned by auto-round, block by block
Distill(steps, after)      learned by the whole model, from where another way ends
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

from ..formats import scale_range
from ..formats.arrange import arrangement_of
from ..formats.pack import Rounded
from ..formats.schemes import LEFT_ALONE, Assignment
from ..measuring.text import Sequences
from ..model.layout import CausalLM, LinearInfo, weight_of
from ..model.streaming import StreamedModel, gradient_dtype
from ..rounding.distill import distill, enough_text
from ..rounding.methods import CORRECTION
from ..rounding.whole_model import round_model
from ..source.kept import NO_CODES, OwnCodes
from ..source.source import Source
from .settings import BATCH_SIZE


@dataclass(frozen=True)
class Subject:
    """A model whose `linears` are rounded, with calibration `text`; it is not changed.

    `original` is what results are compared with: where the model is folded, another one.
    `own` has the codes of linears that the source stores quantized: a plan may keep them.
    """

    source: Source
    model: CausalLM
    linears: Sequence[LinearInfo]
    text: Sequences
    own: OwnCodes = NO_CODES
    batch_size: int = BATCH_SIZE
    seed: int = 0
    device: str = "cpu"
    original: CausalLM = None

    @cached_property
    def reference(self) -> StreamedModel:
        """The original, or the model itself."""
        if self.original is None or self.original is self.model:
            return self.streamed
        return StreamedModel(self.original, device=self.device)

    @cached_property
    def streamed(self) -> StreamedModel:
        return StreamedModel(self.model, device=self.device)


@dataclass(frozen=True)
class Outcome:
    """Packed weights, and `rounding` of report.json: how they came about."""

    weights: Rounded
    told: dict[str, Any]


def lost_groups(subject: Subject, recipes: Assignment, weights: Rounded) -> int:
    """Groups of NVFP4 weights that are too small beside the largest of their tensor."""
    count = 0
    for info in subject.linears:
        recipe = recipes.get(info.name, LEFT_ALONE)
        if not any(s.weight and s.format.tensor_scale for s, _ in recipe.segments):
            continue
        arranged = arrangement_of(recipe, "cpu").weight(weight_of(subject.model, info).cpu())
        parts = recipe.parts(info.in_features)
        pieces = arranged.split([columns for _, columns in parts], 1)
        for (scheme, _), piece, packed in zip(parts, pieces, weights[info.name], strict=True):
            if scheme.format.tensor_scale:
                count += scale_range.lost_groups(piece, scheme.format, packed)
    return count


class Rounding(Protocol):
    """How a plan's weights are rounded."""

    @property
    def uses_text(self) -> bool: ...

    def describe(self) -> dict[str, Any]:
        """`rounding` of report.json, as far as it is known before."""

    def __call__(self, subject: Subject, recipes: Assignment) -> Outcome: ...


@dataclass(frozen=True)
class _Plain:
    """What `mixbits.rounding.whole_model.round_model` does by itself."""

    method: ClassVar[str]
    uses_text: ClassVar[bool] = False
    correction: float = field(default=0.0, init=False, repr=False)

    def describe(self) -> dict[str, Any]:
        return {"method": self.method}

    def __call__(self, subject: Subject, recipes: Assignment) -> Outcome:
        weights = round_model(
            subject.streamed,
            subject.linears,
            recipes,
            self.method,
            subject.text.ids,
            correction=self.correction,
            own=subject.own.rounded(recipes),
        )
        return Outcome(weights, self.describe())


@dataclass(frozen=True)
class Nearest(_Plain):
    method = "rtn"


@dataclass(frozen=True)
class Search(_Plain):
    method = "search"


@dataclass(frozen=True)
class Gptq(_Plain):
    """`correction` as of `mixbits.rounding.gptq.corrected`."""

    correction: float = CORRECTION
    method = "gptq"
    uses_text = True

    def describe(self) -> dict[str, Any]:
        return {"method": self.method, "correction": self.correction}


@dataclass(frozen=True)
class SignRound:
    """`steps` for a block."""

    steps: int
    uses_text = True

    def describe(self) -> dict[str, Any]:
        return {"method": "signround", "iterations": self.steps}

    def __call__(self, subject: Subject, recipes: Assignment) -> Outcome:
        from ..rounding.signround import tune  # auto-round is optional

        model, tokenizer = subject.source.load(), subject.source.tokenizer()
        rounded = tune(
            model,
            tokenizer,
            subject.linears,
            recipes,
            subject.text.ids,
            iterations=self.steps,
            batch_size=subject.batch_size,
            device=subject.device,
        )
        return Outcome(dict(rounded) | subject.own.rounded(recipes), self.describe())


@dataclass(frozen=True)
class Distill:
    """`steps` of a batch each, on the calibration text and more that the original has written."""

    steps: int
    after: Rounding
    uses_text = True

    def describe(self, **more: Any) -> dict[str, Any]:
        told = self.after.describe()
        return {"method": told.pop("method"), "distilled": self.steps, **more, **told}

    def __call__(self, subject: Subject, recipes: Assignment) -> Outcome:
        start = self.after(subject, recipes).weights
        source, text = subject.source, subject.text
        streamed = StreamedModel(
            subject.model, gradient_dtype(source.dtype, subject.device), subject.device
        )
        enough = enough_text(
            source.original.load().to(subject.device),
            text.ids,
            self.steps,
            batch_size=subject.batch_size,
            seed=subject.seed,
            prefix=text.prefix,
        )
        learned = distill(
            streamed,
            subject.linears,
            recipes,
            start,
            enough,
            self.steps,
            batch_size=subject.batch_size,
            seed=subject.seed,
        )
        told = self.describe(written_sequences=len(enough) - len(text.ids))
        return Outcome(dict(learned) | subject.own.rounded(recipes), told)


def plain(method: str, correction: float) -> Rounding:
    """The rounding that `--rounding` names."""
    return Gptq(correction) if method == "gptq" else {"rtn": Nearest, "search": Search}[method]()
