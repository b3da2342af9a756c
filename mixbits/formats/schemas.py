"""What files of ours must hold, as pydantic models: types, bounds and lengths, named as on disk.

Whoever reads one calls `check`: files are edited by hand, damaged, or made by an enemy. Types are
strict (no text for a number, no 1.0 for 1, no NaN), and no number becomes a size before it is
bounded. Keys that a model does not list pass where they are remarks (the top of a file), and are
refused where one that is misspelt would be ignored in silence.

What needs the model that a file is about, such as whether it has a linear, is checked where that is
known: `plan`, `scores`, `stock`.
"""

from __future__ import annotations

import re
import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationError,
    model_validator,
)

from ..errors import UsageError
from ..files.io import is_plain_name
from .schemes import MAX_SEGMENTS, MX_GROUP, ScaleMode


def _name(text: str) -> str:
    if not is_plain_name(text):
        raise ValueError("must be a name, printable and of at most 1,000 characters")
    return text


# No linear has more columns: 2^20 is ten times as many as those of models of 10^12 weights.
_MOST_COLUMNS = 1 << 20
_MOST_ROWS = 1 << 26  # of a head: the vocabulary
_MOST_TOKENS = 1 << 40
_MOST_ERRORS = 100_000  # whose descriptions are made: each takes a kilobyte

M = TypeVar("M", bound=BaseModel)
Name = Annotated[str, AfterValidator(_name)]
Columns = Annotated[int, Field(ge=1, le=_MOST_COLUMNS)]
Loss = Annotated[float, Field(ge=0)]
Order = Annotated[
    list[Annotated[int, Field(ge=0, lt=_MOST_COLUMNS)]], Field(max_length=_MOST_COLUMNS)
]
Listed = Strict(False)  # of a tuple, which is a list in JSON
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Closed(_Strict):
    model_config = ConfigDict(extra="forbid")


class _Modes(_Strict):
    weight_scale_mode: ScaleMode
    act_scale_mode: ScaleMode


# ------------------------------------------------------------------------------------- plan.json


class PlanUnit(_Closed):
    """Linears that take one scheme, or whose slabs are divided among several."""

    unit: Name
    scheme: str = ""
    slabs: dict[str, str] = {}
    order: Order | None = None
    rotated: list[Name] = []
    linears: Annotated[dict[Name, Literal["all"]], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> PlanUnit:
        if ("scheme" in self.model_fields_set) == ("slabs" in self.model_fields_set):
            raise ValueError("must have either a scheme or slabs")
        if self.order is not None and not self.slabs:
            raise ValueError("must have slabs where it has an order")
        if not set(self.rotated) <= set(self.linears):
            raise ValueError("must rotate linears of its own")
        return self


class PlanFile(_Modes):
    """plan.json; `mixbits.planning.plan` says what it means."""

    strategy: str = ""
    method: str = ""
    folded: bool = False
    budget: dict[str, Any] = {}
    predicted_loss: Loss | None = None
    lower_bound: float | None = None
    slab_columns: Annotated[Columns, Field(multiple_of=MX_GROUP)] | None = None
    units: list[PlanUnit]

    @model_validator(mode="after")
    def _fits(self) -> PlanFile:
        if self.slab_columns is None and any(unit.slabs for unit in self.units):
            raise ValueError("slab_columns must be there: got units with slabs and nothing of it")
        return self


# ----------------------------------------------------------------------------------- scores.json


class ScoresRow(_Closed):
    """One linear, [N, K]: losses of each scheme, whole and per 32 columns."""

    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=_MOST_ROWS)], Columns], Listed]
    scores: dict[str, Loss]
    slabs: dict[str, list[Loss]]
    order: Order | None = None
    rotated: bool = False

    @model_validator(mode="after")
    def _fits(self) -> ScoresRow:
        columns = self.shape[1]
        count = -(-columns // MX_GROUP)
        if self.slabs.keys() != self.scores.keys():
            raise ValueError("must have slabs of the schemes that it has scores of")
        if any(len(losses) != count for losses in self.slabs.values()):
            raise ValueError(f"must have {count} slabs for each scheme")
        if self.order is not None and sorted(self.order) != list(range(columns)):
            raise ValueError(f"must have an order that holds each of {columns} columns once")
        return self


class _Measured(_Strict):
    name: str
    sha256: Sha256
    folded: bool = False


class _Calibration(_Strict):
    nsamples: Annotated[int, Field(ge=0, le=_MOST_TOKENS)]
    seqlen: Annotated[int, Field(ge=1, le=_MOST_TOKENS)]
    datasets: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] = 1
    prefix: list[Annotated[int, Field(ge=0, lt=_MOST_ROWS)]] = []


class ScoresFile(_Modes):
    """scores.json; `mixbits.measuring.scores` says what it means."""

    method: Literal["fisher", "deltaloss", "weight"]
    unit: str
    model: _Measured
    calibration: _Calibration
    linears: dict[Name, ScoresRow]
    sha256: Sha256


# --------------------------------------------------------------------------- quantization_config


class Segments(_Closed):
    """The recipe of a linear whose columns are divided, ordered or rotated."""

    segments: Annotated[
        list[Annotated[tuple[str, Columns], Listed]], Field(min_length=1, max_length=MAX_SEGMENTS)
    ]
    ordered: bool
    rotated: bool


def _form(value: Any) -> str:
    return "<name>" if isinstance(value, str) else "<segments>"


RecipeJson = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[Segments, Tag("<segments>")], Discriminator(_form)
]


class _StoredPart(_Strict):
    tensors: list[Name]
    quantization_config: dict[str, Any]


class PackedConfig(_Modes):
    """`quantization_config` of a packed folder; `mixbits.checkpoint.folder` says what it means."""

    layout: int
    modules: dict[Name, RecipeJson]
    checksum: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    dtypes: dict[Name, str] = {}
    carried: list[Name] = []
    stored: _StoredPart | None = None


# -------------------------------------------------------------------------------------- checking


def check(model: type[M], data: Any, where: object) -> M:
    """`data` as `model` has it. Raises UsageError, one sentence with `where`, if it is not so."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{_sentence(error)} ({where})") from error


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 60


def _sentence(error: ValidationError) -> str:
    """The first of the errors: where in the data, what must be there, and what is."""
    if error.error_count() > _MOST_ERRORS:
        return f"almost nothing is of the kind that it must be: got {error.error_count():,} errors"
    first = error.errors(include_url=False, include_context=False)[0]
    place = "".join(_step(step) for step in first["loc"]).removeprefix(".")
    if first["type"] == "missing":
        return f"{place} must be there: got nothing of that name"
    if first["type"] == "extra_forbidden":
        return f"{place} must be a key that is known: got one that is not"
    must = re.sub(r"^Value error, |^\w+ should ", "", first["msg"])
    must = must if must.startswith("must ") else f"must {must}"
    must = re.sub(r" or instance of \w+", "", must)
    must = must.replace("a valid dictionary", "an object").replace("a valid tuple", "a list")
    return f"{place} {must}: got {_shown.repr(first['input'])}".strip()


def _step(step: int | str) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    if step.startswith("<"):  # the tag of a union
        return ""
    return f".{step}" if re.fullmatch(r"\w{1,40}", step) else f"[{step!r:.80}]"
