"""What other engines can hold: asked before a model is quantized for one, and when it is exported.

    compressed-tensors  MXFP4, MXFP8 (with activations, whose scales follow `even`, or without);
                        W4A16, W8A16
    vllm                reads compressed-tensors; fused linears (q/k/v, gate/up) take one scheme
    auto-round          MXFP4, MXFP8 with activations, whose scales follow `floor`; or integers;
                        not both in one folder
    gguf                MXFP4 as MXFP4, symmetric integers as Q4_0 and Q8_0, exactly: their scales
                        are float16 too. Activations are llama.cpp's own affair

All want whole groups in a row, but gguf's groups are of 32, into which ours divide. Experts are
free in auto-round only; elsewhere some of a layer's, or all, take one scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..errors import UsageError
from ..formats.schemes import (
    BF16,
    LEFT_ALONE,
    MX_GROUP,
    Assignment,
    Recipe,
    ScaleMode,
    Scheme,
    parse_scheme,
)

if TYPE_CHECKING:
    from ..model.layout import LinearInfo

DEFAULT_SCHEMES = ("W4A16G64", "W8A16G64")
_SHOWN = 3  # linears that an error names
_MX_AND_INT = "MXFP4, MXFP8, each also with A16; W4A16, W8A16"


@dataclass(frozen=True)
class Target:
    """`act_scale_mode` is how activations are rounded there; None: not as MX at all.

    `fuse`: linears that are multiplied in one call take one scheme. `experts`: so do those of a
    layer, all of their linears, or projection by projection. `holds` is for error messages.
    `defaults` are schemes to choose from where none are asked for, the first that fit.
    """

    name: str
    holds: str
    act_scale_mode: ScaleMode | None = None
    fuse: bool = False
    experts: Literal["layer", "projection"] | None = "layer"
    defaults: tuple[tuple[str, ...], ...] = (DEFAULT_SCHEMES, ("W4A16G32", "W8A16G32"))

    def obstacle(self, recipe: Recipe, rows: int, columns: int) -> str | None:
        """Why a [rows, columns] weight cannot be held as it is; None where it can."""
        scheme = recipe.scheme
        if scheme is None:
            return "is rotated" if recipe.rotated else "is divided into slabs"
        return self.obstacle_of(scheme, rows, columns)

    def obstacle_of(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        """The same of a [rows, columns] weight in one scheme."""
        fmt = scheme.weight
        if fmt is None:
            return None
        if scheme.name not in self._schemes():
            return f"is {scheme.name}"
        width = MX_GROUP if self.name == "gguf" else fmt.group_size
        if columns % width:
            return f"has {columns} columns, which groups of {width} do not divide"
        if self.name == "auto-round" and rows % 32:
            return f"has {rows} rows, which 32 does not divide"
        if scheme.activation is not None and self.act_scale_mode is not None:
            mode = scheme.activation.scale_mode
            if mode != self.act_scale_mode:
                return f"rounds activations in scale mode {mode}, not {self.act_scale_mode}"
        return None

    def _schemes(self) -> set[str]:
        groups = ("", "G32", "G64")
        if self.name == "gguf":
            ints = {f"W{bits}A16{g}" for bits in (2, 4, 8) for g in groups}
            return {"MXFP4", "MXFP4A16"} | ints
        bits = (2, 4, 8) if self.name == "auto-round" else (4, 8)
        ints = {f"W{b}A16{g}{asym}" for b in bits for g in groups for asym in ("", "ASYM")}
        weight_only = set() if self.name == "auto-round" else {"MXFP4A16", "MXFP8A16"}
        return {"MXFP4", "MXFP8"} | weight_only | ints

    def substitute(self, recipe: Recipe, rows: int, columns: int) -> Scheme:
        """What to round a weight to that cannot be held: 8 bits where possible, else 16."""
        schemes = [scheme for scheme, _ in recipe.parts(columns)]
        if self.act_scale_mode is not None and recipe.scheme is not None:
            same = _in_mode(recipe.scheme, self.act_scale_mode)
            if self.obstacle_of(same, rows, columns) is None:
                return same
        quantized_inputs = all(s.activation is not None for s in schemes)
        names = ["MXFP8"] if quantized_inputs else []
        names += ["MXFP8A16"] if any(s.weight and s.weight.is_float for s in schemes) else []
        for name in (*names, "W8A16G32"):
            scheme = parse_scheme(name, act_scale_mode=self.act_scale_mode or "even")
            if self.obstacle_of(scheme, rows, columns) is None:
                return scheme
        return BF16


def _in_mode(scheme: Scheme, mode: ScaleMode) -> Scheme:
    if scheme.activation is None:
        return scheme
    return replace(scheme, activation=replace(scheme.activation, scale_mode=mode))


TARGETS = {
    target.name: target
    for target in (
        Target("compressed-tensors", _MX_AND_INT, "even"),
        Target("vllm", _MX_AND_INT, "even", fuse=True),
        Target("auto-round", "MXFP4, MXFP8; or W2A16, W4A16, W8A16", "floor", experts=None),
        Target(
            "gguf",
            "MXFP4, MXFP4A16; symmetric W2A16, W4A16, W8A16",
            experts="projection",
            defaults=(("MXFP4A16", "W8A16G32"),),
        ),
    )
}


def default_schemes(target: Target | None, linears: Sequence[LinearInfo]) -> tuple[str, ...]:
    """What to choose from where nothing is asked for: the first that the target holds everywhere.

    Or that it holds more of the linears in than in the others.
    """
    if target is None:
        return DEFAULT_SCHEMES
    return min(target.defaults, key=lambda names: len(_obstructed(target, linears, names)))


def _obstructed(
    target: Target, linears: Sequence[LinearInfo], names: Sequence[str]
) -> list[LinearInfo]:
    """The linears that a target cannot hold in each of the schemes called `names`."""
    schemes = [parse_scheme(name, act_scale_mode=target.act_scale_mode or "even") for name in names]
    return [
        info
        for info in linears
        if any(target.obstacle_of(s, info.out_features, info.in_features) for s in schemes)
    ]


def advice(target: Target, linears: Sequence[LinearInfo]) -> str:
    """Options with which a target holds a model of such linears."""
    names = default_schemes(target, linears)
    left = [i.stack if i.is_expert else i.name for i in _obstructed(target, linears, names)]
    patterns = dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in left)
    words = [f"--schemes {','.join(names)}", *(f"--ignore '{pattern}'" for pattern in patterns)]
    return " ".join(words)


@dataclass(frozen=True)
class Fit:
    """What a target holds in the place of a recipe, and `why` it is another; None: the same."""

    scheme: Scheme
    why: str | None = None


def _some(reasons: Mapping[str, str]) -> str:
    """The first few linears with their reasons, and how many more there are."""
    shown = [f"{name} {why}" for name, why in list(reasons.items())[:_SHOWN]]
    more = len(reasons) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def fit(
    target: Target, linears: Sequence[LinearInfo], assignment: Assignment, lossy: bool = False
) -> dict[str, Fit]:
    """Linear -> what the target holds of it, for the packed ones.

    Raises UsageError that names the linears that it cannot hold: all such, or with `lossy` those
    for which there is no substitute.
    """
    fits, obstacles = {}, {}
    for info in linears:
        recipe = assignment.get(info.name, LEFT_ALONE)
        if not recipe.packed:
            continue
        why = target.obstacle(recipe, info.out_features, info.in_features)
        if why is None and recipe.scheme is not None:
            fits[info.name] = Fit(recipe.scheme)
        elif why is not None:
            obstacles[info.name] = why
            other = target.substitute(recipe, info.out_features, info.in_features)
            fits[info.name] = Fit(other, why)
    obstacles |= _agree(linears, assignment, target, fits)
    if obstacles and not lossy:
        count = sum(found.why is not None for found in fits.values())
        raise UsageError(
            f"{target.name} cannot hold {count} of {len(fits)} linears: "
            f"{_some(obstacles)}; it holds whole groups of {target.holds} "
            "(python -m mixbits.export converts the others with --lossy)"
        )
    check_together(target, [found.scheme for found in fits.values()])
    return fits


def _agree(
    linears: Sequence[LinearInfo], assignment: Assignment, target: Target, fits: dict[str, Fit]
) -> dict[str, str]:
    """Give experts that must agree the widest of their schemes, or 16 bits where it does not fit.

    Returns what they are together, with the reason, where they had several.
    """
    groups: dict[str, list[LinearInfo]] = {}
    for info in linears:
        if info.is_expert and target.experts:
            name = info.stack if target.experts == "projection" else info.stack.rpartition(".")[0]
            groups.setdefault(name, []).append(info)
    obstacles = {}
    for name, members in groups.items():
        schemes = [fits[i.name].scheme if i.name in fits else BF16 for i in members]
        # A GGUF has no activations' schemes.
        if len({s.weight if target.name == "gguf" else s for s in schemes}) == 1:
            continue
        taken = sorted({assignment.get(i.name, LEFT_ALONE).name for i in members})
        obstacles[name] = f"takes one scheme for all experts, not {', '.join(taken)}"
        widest = max(schemes, key=lambda s: s.weight.bits if s.weight else 16)
        shapes = {(i.out_features, i.in_features) for i in members}
        fitting = all(target.obstacle_of(widest, *shape) is None for shape in shapes)
        other = widest if fitting else BF16
        fits |= {i.name: Fit(other, obstacles[name]) for i in members if i.name in fits}
    return obstacles


def check_together(target: Target, schemes: Sequence[Scheme]) -> None:
    """Raise UsageError for schemes that one folder cannot hold beside each other."""
    first = {s.weight.is_float: s.name for s in reversed(schemes) if s.weight is not None}
    if target.name == "auto-round" and len(first) > 1:
        raise UsageError(
            f"auto-round holds MX formats or integers in a folder: got {first[True]} and "
            f"{first[False]}"
        )


def check_fused(target: Target, groups: Sequence[Sequence[str]], assignment: Assignment) -> None:
    """Raise UsageError where linears that are multiplied in one call take several schemes."""
    if not target.fuse:
        return
    for names in groups:
        schemes = {assignment.get(name, LEFT_ALONE).name for name in names}
        if len(schemes) > 1:
            raise UsageError(
                f"{target.name} needs one scheme for linears that it fuses: "
                f"{', '.join(names)} take {', '.join(sorted(schemes))} (see --fuse)"
            )
