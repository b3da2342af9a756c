"""report.json: what a run was asked for, did, and came to, as types.

`mixbits.pipeline.diagnose.report` makes it, terminal, card and page show it. What is not known has
no key: a run that measures less says less, and so do reports of older versions. A figure may also
be None, which is how JSON has what is no number (the standard error of one sequence). Keys are
written in the order in which they were given, and keys that no field is of are kept: what is read
and written again is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from ..formats.schemas import check
from ..measuring.scores import VERSION, dump, read_json

Number = int | float
Figure = Number | None


class Part(BaseModel):
    """An object of report.json."""

    model_config = ConfigDict(strict=True, extra="allow")
    _given: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _remember_order(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        part = read(data)
        if isinstance(data, Mapping):
            part._given = tuple(data)
        return part

    @model_serializer(mode="wrap")
    def _in_order(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found = write(self)
        return {key: found[key] for key in (*self._given, *found) if key in found}

    @classmethod
    def of(cls, data: Mapping[str, Any], where: object = "report.json") -> Self:
        """From what JSON has of it. Raises UsageError, with `where`, for values of other types."""
        return check(cls, dict(data), where)

    def data(self) -> dict[str, Any]:
        """What JSON has of it: the keys that were given or set."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Source(Part):
    """The original model: its name, a folder's last part only, and the hash of its weights."""

    name: str | None = None
    sha256: str | None = None
    folded: bool | None = None  # it was quantized in a rotated basis


class Environment(Part):
    """Versions, machine and backends, as `mixbits.report.clock.environment` gives them."""

    mixbits: str | None = None
    torch: str | None = None


class Text(Part):
    """Sequences of a text: of calibration, of the gate, or held out."""

    source: str | None = None
    datasets: int | None = None  # that they were taken from in turn, if several
    nsamples: int | None = None
    seqlen: int | None = None


class Reached(Part):
    """What the plan comes to, in both ways of counting, and in bytes of the weight files."""

    avg_bits: Figure = None
    avg_bits_without_scales: Figure = None
    predicted_bytes: int | None = None


class LeftAlone(Part):
    """Tensors of one class that are not quantized, for one reason; `share` of all weights."""

    kind: str = Field("", alias="class")
    why: str = ""
    tensors: int = 0
    weights: int = 0
    share: Figure = None


class Rounding(Text):
    """How weights were rounded, and with which text if any."""

    method: str | None = None
    iterations: int | None = None  # of signround
    distilled: int | None = None  # steps
    correction: Figure = None
    lost_groups: int | None = None  # of NVFP4, too small beside the largest weight
    notes: list[str] = []


class Candidate(Part):
    """A plan as the gate measured it; all but the best are `behind` it, give or take `interval`.

    KL in nats per token; the interval is half the width of a 95 % confidence interval.
    """

    name: str = ""
    kl: Figure = None
    kl_stderr: Figure = None
    behind: Figure = None
    interval: Figure = None


class Gate(Text):
    candidates: list[Candidate] = []


class Tried(Part):
    avg_bits: Figure = None
    kl: Figure = None


class Search(Part):
    """For the smallest model of a quality: its limit, and what was rounded and measured."""

    max_kl: Figure = None
    kl: Figure = None
    tolerance: Figure = None  # bits per weight
    measured: list[Tried] = []


class Pair(Part):
    """A unit alone in one scheme: its predicted loss, and the KL that was measured."""

    unit: str = ""
    scheme: str = ""
    predicted: Figure = None
    measured: Figure = None


class Stability(Part):
    """How far plans of either half of the calibration text agree, as shares."""

    same_units: Figure = None
    same_bits: Figure = None
    excess_loss: list[Figure] = []


class Swap(Part):
    """A unit's next change: `bits` and `loss` are what it adds, or takes where below 0."""

    unit: str = ""
    before: str = ""
    after: str = ""
    bits: Number
    loss: Number


class Baseline(Part):
    """A plan by its name, as a point beside the curve."""

    name: str = ""
    avg_bits: Figure = None
    predicted_loss: Figure = None


class Point(Part):
    """The best plan of a budget; `gap`: its distance from the lower bound, a share of its loss."""

    avg_bits: Figure = None
    predicted_loss: Figure = None
    gap: Figure = None
    proven: bool | None = None


class HeldOut(Text):
    """`mixbits.measuring.evaluate.compare` on a text: figures of the quantized model, with errors.

    KL in nats per token; agreement as a share of positions.
    """

    kl: Figure = None
    kl_stderr: Figure = None
    perplexity: Figure = None
    perplexity_stderr: Figure = None
    perplexity_reference: Figure = None
    perplexity_reference_stderr: Figure = None
    top1_agreement: Figure = None
    top1_agreement_stderr: Figure = None


class TextKl(Text):
    """KL of the quantized model on one of the run's texts, in nats per token."""

    text: str = ""
    kl: Figure = None
    kl_stderr: Figure = None


class Texts(Part):
    """`mixbits.report.parting.texts_compared`."""

    compared: list[TextKl] = []
    sentence: str | None = None
    advice: str | None = None


class Verdict(Part):
    """`mixbits.report.verdict.verdict`."""

    word: str | None = None
    border: str | None = None
    sentence: str | None = None
    advice: str | None = None


class Tasks(Part):
    """lm-eval's metrics of one model: task -> metric -> value, and `<metric>_stderr` where known.

    `average` is of the tasks in `averaged`, those that have an accuracy, and `documents` has that
    of each document; `limit`: the first documents of each only, a number of them or a share.
    """

    tasks: dict[str, dict[str, Figure | bool]] = {}
    average: Figure = None
    average_stderr: Figure = None
    averaged: list[str] | None = None
    documents: dict[str, list[Figure]] = {}
    limit: Figure = None


class Evaluation(Part):
    """What was scored; `scored` names the column of the scores where it is not `quantized`."""

    verdict: Verdict | None = None
    held_out: HeldOut | None = None
    texts: Texts | None = None
    tasks: Tasks | None = None
    original_tasks: Tasks | None = None
    prompt: str | None = None
    sample: str | None = None
    scored: str = "quantized"


class Stage(Part):
    """A row of `mixbits.report.clock.Clock`: sizes in bytes."""

    stage: str = ""
    seconds: Number = 0.0
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int | None = None


class Report(Part):
    """The content of report.json."""

    mixbits_report: int = VERSION
    command: str | None = None
    environment: Environment | None = None
    source: Source | None = None
    calibration: Text | None = None
    budget: dict[str, Any] | None = None
    menu: str | None = None  # why these schemes, where none were asked for
    reached: Reached = Reached()
    left_alone: list[LeftAlone] | None = None
    carried: int | None = None  # tensors that the model's class does not take
    kept: int | None = None  # linears stored as the source has them
    rounding: Rounding | None = None
    gate: Gate | None = None
    predicted_loss: Figure = None
    bytes_before: int | None = None
    search: Search | None = None
    refine: dict[str, Any] | None = None
    measured: list[Pair] | None = None
    rank_correlation: Figure = None
    stability: Stability | None = None
    linear_bits: dict[str, Number] | None = None
    upgrades: list[Swap] | None = None
    downgrades: list[Swap] | None = None
    baselines: list[Baseline] | None = None
    curve: list[Point] | None = None
    bytes_after: int | None = None
    evaluation: Evaluation | None = None
    stages: list[Stage] | None = None

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises UsageError if the file is no report, or one of a later version."""
        return cls.of(read_json(path, "mixbits_report"), path)

    def text(self) -> str:
        """The file's content."""
        return dump(self.data())

    def as_read(self) -> Report:
        """What a reader of the file has: None for what is no number."""
        return Report.of(json.loads(self.text()))

    @property
    def candidates(self) -> list[Candidate]:
        """What the gate has compared, the plan that ships first; empty without a gate."""
        return self.gate.candidates if self.gate else []

    @property
    def held_out(self) -> HeldOut | None:
        """The figures on held-out text, if there are any."""
        return self.evaluation.held_out if self.evaluation else None
