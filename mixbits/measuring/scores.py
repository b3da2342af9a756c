"""scores.json: the result of the measurement, readable, reusable, and hashed.

    {"mixbits_scores": 1, "method", "unit", "model": {"name", "sha256"}, "calibration": {...},
     "weight_scale_mode", "act_scale_mode",
     "linears": {name: {"shape": [N, K], "scores": {scheme: total},
                        "slabs": {scheme: [per 32 columns]},
                        "order": [columns], "rotated": true}},
     "sha256": of all of the above}

`order` and `rotated` are there where the columns were arranged; slabs are of arranged columns.
`folded` beside the model's hash says that the model was measured in a rotated basis.
It costs minutes to hours to make and milliseconds to use: every budget, strategy and grouping is
allocated from the same file. Numbers carry nine digits; equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import UsageError
from ..files.io import DATA_BYTES, read_object, write_text
from ..formats.arrange import Arrangement
from ..formats.schemas import ScoresFile, check
from ..formats.schemes import MX_GROUP, Scheme, has_scale_mode
from ..model.layout import LinearInfo
from .slabs import Arrangements, SlabScores

VERSION = 1
UNITS = {
    "fisher": "nats per token",
    "deltaloss": "nats, summed over batches",
    "weight": "relative squared error",
}


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """A JSON object with the key `kind` (its version). Raises UsageError otherwise."""
    data = read_object(path, DATA_BYTES)
    if type(data.get(kind)) is not int or data[kind] != VERSION:
        raise UsageError(f"{path} must hold {kind!r}: {VERSION}: got {data.get(kind)!r:.60}")
    return data


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def dump(data: dict[str, Any]) -> str:
    """JSON for people: indented, lists of numbers on one line, null for what is no number."""
    lists: list[str] = []

    def fold(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fold(v) for k, v in value.items()}
        if isinstance(value, list) and all(_is_number(x) for x in value):
            lists.append(json.dumps(value))
            return f"\0{len(lists) - 1}"
        if isinstance(value, float) and not math.isfinite(value):
            return None  # JSON has no NaN, such as the standard error of one sequence
        return [fold(v) for v in value] if isinstance(value, list) else value

    text = json.dumps(fold(data), indent=1, ensure_ascii=False)
    return re.sub(r'"\\u0000(\d+)"', lambda match: lists[int(match[1])], text) + "\n"


def _digest(data: dict[str, Any]) -> str:
    content = {k: v for k, v in data.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _round(value: float) -> float:
    return float(f"{value:.9g}")


@dataclass(frozen=True)
class Scores:
    """The content of scores.json."""

    data: dict[str, Any]

    @classmethod
    def build(
        cls,
        slabs: SlabScores,
        linears: Sequence[LinearInfo],
        method: str,
        scale_modes: tuple[str, str],
        model: dict[str, Any],
        calibration: dict[str, Any],
        arrangements: Arrangements = MappingProxyType({}),
    ) -> Scores:
        """From `sensitivity.measure`; `scale_modes` are those of weights and activations."""
        rows: dict[str, dict[str, Any]] = {
            info.name: {
                "shape": [info.out_features, info.in_features],
                "scores": {s: _round(sum(v)) for s, v in slabs[info.name].items()},
                "slabs": {s: [_round(x) for x in v] for s, v in slabs[info.name].items()},
            }
            for info in linears
        }
        for name, arrangement in arrangements.items():
            if arrangement.order is not None:
                rows[name]["order"] = arrangement.order.tolist()
            if arrangement.rotated:
                rows[name]["rotated"] = True
        data: dict[str, Any] = {
            "mixbits_scores": VERSION,
            "method": method,
            "unit": UNITS[method],
            "model": model,
            "calibration": calibration,
            "weight_scale_mode": scale_modes[0],
            "act_scale_mode": scale_modes[1],
            "linears": rows,
        }
        data["sha256"] = _digest(data)
        return cls(data)

    @classmethod
    def unknown(
        cls,
        linears: Sequence[LinearInfo],
        schemes: Sequence[Scheme],
        scale_modes: tuple[str, str],
        ordered: bool,
        rotated: Collection[str] = (),
    ) -> Scores:
        """Where nothing is measured, and no scheme costs any loss: for what a budget may be.

        `ordered`: with some order of every linear's columns; `rotated` has linears that will be.
        """
        slabs = {
            i.name: {s.name: [0.0] * -(-i.in_features // MX_GROUP) for s in schemes}
            for i in linears
        }
        widths = {i.in_features for i in linears if ordered and i.in_features > 1}
        orders = {width: torch.arange(width).flip(0) for width in widths}
        arranged = {
            i.name: Arrangement(orders.get(i.in_features), i.name in rotated) for i in linears
        }
        nothing = {"name": "", "sha256": ""}
        return cls.build(slabs, linears, "weight", scale_modes, nothing, {}, arranged)

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Raises UsageError if the file is damaged or was edited, or is not what `schemas` says."""
        data = read_json(path, "mixbits_scores")
        if data.get("sha256") != _digest(data):
            raise UsageError(
                f"the hash in {path} does not match its content: it was edited or damaged"
            )
        check(ScoresFile, data, path)
        return cls(data)

    def write(self, path: Path) -> None:
        write_text(path, dump(self.data))

    def check(
        self,
        path: object,
        linears: Sequence[LinearInfo],
        schemes: Sequence[Scheme],
        scale_modes: tuple[str, str],
        model_sha256: str | None,
        prefix: Sequence[int] | None = None,
    ) -> None:
        """Raise UsageError unless the scores are of this model and cover these schemes.

        A scale mode (`scale_modes`: of weights, of activations) counts where a scheme has one.
        `prefix`: tokens that every sequence must have begun with; None: any.
        """
        if model_sha256 is not None and self.data["model"]["sha256"] != model_sha256:
            raise UsageError(f"{path} was measured on another model, {self.data['model']['name']}")
        for name, mode, used in (
            ("weight", scale_modes[0], any(has_scale_mode(s.weight) for s in schemes)),
            ("act", scale_modes[1], any(has_scale_mode(s.activation) for s in schemes)),
        ):
            measured = self.data[f"{name}_scale_mode"]
            if used and measured != mode:
                raise UsageError(
                    f"{path} was measured with scale mode {measured} of "
                    f"{'weights' if name == 'weight' else 'activations'}: got {mode}; pass "
                    f"--{name}-scale-mode {measured}, or measure again"
                )
        self._check_prefix(path, prefix)
        for info in linears:
            row = self.data["linears"].get(info.name)
            if row is None or row["shape"] != [info.out_features, info.in_features]:
                raise UsageError(
                    f"{path} has no scores for {info.name} "
                    f"[{info.out_features}, {info.in_features}]"
                )
            for scheme in schemes:
                if scheme.weight is not None and scheme.name not in row["scores"]:
                    known = ", ".join(row["scores"])
                    raise UsageError(f"{path} has no scores for {scheme.name}, only for {known}")

    def _check_prefix(self, path: object, prefix: Sequence[int] | None) -> None:
        before: list[int] = self.data["calibration"].get("prefix", [])  # older files: none
        if self.data["method"] == "weight":  # measured without text
            return
        if prefix is not None and before != list(prefix):
            told = [
                f"tokens {tokens}" if tokens else "nothing" for tokens in (before, list(prefix))
            ]
            advice = ": measure again" if before else ": measure again, or pass --no-bos"
            raise UsageError(
                f"{path} was measured on sequences that begin with {told[0]}, and texts begin with "
                f"{told[1]} here{advice}"
            )

    @property
    def schemes(self) -> list[str]:
        """Names of the schemes that all linears have scores for."""
        rows = [row["scores"] for row in self.data["linears"].values()]
        return [name for name in rows[0] if all(name in row for row in rows)] if rows else []

    def score(self, linear: str, scheme: Scheme) -> float:
        """Predicted loss of storing `linear` in `scheme`; BF16 costs nothing."""
        if scheme.weight is None:
            return 0.0
        return float(self.data["linears"][linear]["scores"][scheme.name])

    def slab_scores(self, linear: str, scheme: Scheme, slab: int) -> list[float]:
        """Predicted loss of every `slab` columns (a multiple of 32) of the arranged linear."""
        per_32: list[float] = self.data["linears"][linear]["slabs"][scheme.name]
        step = slab // MX_GROUP
        return [sum(per_32[i : i + step]) for i in range(0, len(per_32), step)]

    def order(self, linear: str) -> list[int] | None:
        """The order of the linear's columns; None: as they come."""
        found: list[int] | None = self.data["linears"][linear].get("order")
        return found

    @property
    def is_folded(self) -> bool:
        """Whether they are of the model in a rotated basis."""
        return bool(self.data["model"].get("folded", False))

    def rotated(self, linear: str) -> bool:
        return bool(self.data["linears"].get(linear, {}).get("rotated", False))
