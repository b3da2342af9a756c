"""What other engines can hold: asked before a model is quantized for one, and when it is exported.

    compressed-tensors  MXFP4, NVFP4, MXFP6, MXFP8, FP8 and integers, without activations or with
                        those of MXFP4 and MXFP8 (whose scales follow `even`); FP8 and integers also
                        with those of FP8 and INT8
    vllm                reads compressed-tensors, and runs MXFP4, MXFP8, FP8, W4A16 and W8A16 of it;
                        fused linears (q/k/v, gate/up) take one scheme
    auto-round          MXFP4, MXFP8 with activations, whose scales follow `floor`; or integers;
                        not both in one folder
    gguf                MXFP4 as MXFP4, symmetric integers as Q4_0 and Q8_0, exactly: their scales
                        are float16 too. Activations are llama.cpp's own affair

All want whole groups in a row, but gguf's groups are of 32, into which ours divide. Experts are
free in auto-round only; elsewhere some of a layer's, or all, take one scheme.

vLLM gives fused linears one scale of a tensor, the largest, so that NVFP4 is not for it; what it
reads of other schemes it takes for one of those above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..errors import UsageError
from ..formats.menus import MENUS
from ..formats.schemes import (
    BF16,
    LEFT_ALONE,
    MX_GROUP,
    ROW,
    SCALES,
    Assignment,
    Format,
    Recipe,
    ScaleMode,
    Scheme,
    has_scale_mode,
    parse_scheme,
    weight_only,
)

if TYPE_CHECKING:
    from ..model.layout import LinearInfo

_SHOWN = 3  # linears that an error names

Kind: TypeAlias = tuple[str, str]  # an element and its scale
_MXFP4, _MXFP6, _MXFP8 = ("e2m1", "e8m0"), ("e2m3", "e8m0"), ("e4m3", "e8m0")
_NVFP4, _FP8, _INT8 = ("e2m1", "e4m3"), ("e4m3", "float32"), ("int8", "float32")
_MX_INPUTS = (None, _MXFP4, _MXFP8)
_ROW_INPUTS = (*_MX_INPUTS, _FP8, _INT8)  # scales of a row are exact where the weights' are float
_ALL_INPUTS = (None, *((element, name) for name, s in SCALES.items() for element in s.elements))


def _kind(fmt: Format) -> Kind:
    return fmt.element, fmt.scale


def _integers(*bits: int) -> tuple[Kind, ...]:
    return tuple((f"int{n}", "float16") for n in bits)


_IN_COMPRESSED_TENSORS = {
    **dict.fromkeys((_MXFP4, _NVFP4, _MXFP6, _MXFP8), _MX_INPUTS),
    **dict.fromkeys((_FP8, *_integers(2, 3, 4, 5, 6, 8)), _ROW_INPUTS),
}
_IN_VLLM = {
    **{kind: (None, kind) for kind in (_MXFP4, _MXFP8, _FP8)},
    **dict.fromkeys(_integers(4, 8), (None,)),
}
_IN_AUTO_ROUND = {
    **{kind: (kind,) for kind in (_MXFP4, _MXFP8)},
    **dict.fromkeys(_integers(2, 4, 8), (None,)),
}
_IN_GGUF = dict.fromkeys((_MXFP4, *_integers(2, 4, 8)), _ALL_INPUTS)
# Why compressed-tensors does not round activations as we do.
_OTHER_INPUTS = {
    _NVFP4: "needs, for a linear's inputs, a scale that was measured beforehand",
    _MXFP6: "would round activations to 6 bits by another rule there",
}


def _lost_of_experts(scheme: Scheme) -> str | None:
    """Why loaders of compressed-tensors cannot read experts, of which they know fewer tensors."""
    fmt, inputs = scheme.format, scheme.activation
    if fmt.tensor_scale:
        return "loses its scale of a tensor in experts"
    if not fmt.is_float and inputs is not None and not inputs.is_float:
        return "is not read of experts"
    return None


@dataclass(frozen=True)
class Target:
    """`holds`: kinds of weights, and the kinds of activations that each may go with; None: 16 bits.

    `says` is that for error messages. `act_scale_mode` is how activations are rounded there; None:
    not as MX at all. `fuse`: linears that are multiplied in one call take one scheme. `experts`: so
    do those of a layer, all of their linears, or projection by projection. `defaults` are schemes
    to choose from where none are asked for, the first that fit.
    """

    name: str
    holds: Mapping[Kind, Sequence[Kind | None]]
    says: str
    act_scale_mode: ScaleMode | None = None
    fuse: bool = False
    experts: Literal["layer", "projection"] | None = "layer"
    defaults: tuple[tuple[str, ...], ...] = (MENUS["portable"], ("W4A16G32", "W8A16G32"))

    def obstacle(self, recipe: Recipe, rows: int, columns: int, of_expert: bool) -> str | None:
        """Why a [rows, columns] weight cannot be held as it is; None where it can."""
        scheme = recipe.scheme
        if scheme is None:
            return "is rotated" if recipe.rotated else "is divided into slabs"
        return self.obstacle_of(scheme, rows, columns, of_expert)

    def obstacle_of(
        self, scheme: Scheme, rows: int, columns: int, of_expert: bool = False
    ) -> str | None:
        """The same of a [rows, columns] weight in one scheme."""
        if scheme.weight is None:
            return None
        if not self.knows(scheme):
            why = self._of_inputs(scheme)
            return f"is {scheme.name}" + (f", which {why}" if why else "")
        if of_expert and self.experts == "layer" and (why := _lost_of_experts(scheme)) is not None:
            return f"is {scheme.name}, which {why}"
        for width in self._widths(scheme):
            if columns % width:
                return f"has {columns} columns, which groups of {width} do not divide"
        if self.name == "auto-round" and rows % 32:
            return f"has {rows} rows, which 32 does not divide"
        inputs, mode = scheme.activation, self.act_scale_mode
        if inputs is not None and has_scale_mode(inputs) and mode not in (None, inputs.scale_mode):
            return f"rounds activations in scale mode {inputs.scale_mode}, not {mode}"
        return None

    def knows(self, scheme: Scheme) -> bool:
        """Whether it holds such weights, with such activations."""
        fmt, inputs = scheme.format, scheme.activation
        kind = None if inputs is None else _kind(inputs)
        return kind in self.holds.get(_kind(fmt), ()) and (fmt.symmetric or self.name != "gguf")

    def _of_inputs(self, scheme: Scheme) -> str | None:
        """What there is to say of activations that are in the way, and not weights."""
        inputs = scheme.activation
        if inputs is None or _kind(scheme.format) not in self.holds:
            return None
        return _OTHER_INPUTS.get(_kind(inputs)) if self.name == "compressed-tensors" else None

    def _widths(self, scheme: Scheme) -> list[int]:
        """What must divide the columns of a row."""
        if self.name == "gguf":
            return [MX_GROUP]
        formats = (scheme.weight, scheme.activation)
        return [fmt.group_size for fmt in formats if fmt and fmt.group_size != ROW]

    def substitute(
        self, recipe: Recipe, rows: int, columns: int, of_expert: bool = False
    ) -> Scheme:
        """What to round a weight to that cannot be held: 8 bits where possible, else 16.

        The same weights, if it is for their activations only.
        """
        for scheme in self._substitutes(recipe, columns):
            if self.obstacle_of(scheme, rows, columns, of_expert) is None:
                return scheme
        return BF16

    def _substitutes(self, recipe: Recipe, columns: int) -> list[Scheme]:
        """Those to try, the best first."""
        schemes, mode = [scheme for scheme, _ in recipe.parts(columns)], self.act_scale_mode
        found = []
        if recipe.scheme is not None and recipe.scheme.weight is not None:
            found += [_in_mode(recipe.scheme, mode)] if mode is not None else []
            found += [weight_only(recipe.scheme.weight)]
        names = ["MXFP8"] if all(s.activation is not None for s in schemes) else []
        names += ["MXFP8A16"] if any(s.weight and s.weight.is_float for s in schemes) else []
        names += ["W8A16G32"]
        return found + [parse_scheme(name, act_scale_mode=mode or "even") for name in names]


def _in_mode(scheme: Scheme, mode: ScaleMode) -> Scheme:
    if scheme.activation is None:
        return scheme
    return replace(scheme, activation=replace(scheme.activation, scale_mode=mode))


TARGETS = {
    target.name: target
    for target in (
        Target(
            "compressed-tensors",
            _IN_COMPRESSED_TENSORS,
            "weights in MXFP4, MXFP6, MXFP8, NVFP4, FP8 or W2 to W8, with activations in 16 bits, "
            "MXFP4 or MXFP8; those of FP8 and W2 to W8 also in FP8 or INT8",
            "even",
        ),
        Target(
            "vllm",
            _IN_VLLM,
            "MXFP4, MXFP8, FP8, each also with A16; W4A16, W8A16",
            "even",
            fuse=True,
        ),
        Target(
            "auto-round",
            _IN_AUTO_ROUND,
            "MXFP4, MXFP8; or W2A16, W4A16, W8A16",
            "floor",
            experts=None,
        ),
        Target(
            "gguf",
            _IN_GGUF,
            "MXFP4, MXFP4A16; symmetric W2A16, W4A16, W8A16",
            experts="projection",
            defaults=(("MXFP4A16", "W8A16G32"),),
        ),
    )
}


def default_schemes(target: Target, linears: Sequence[LinearInfo]) -> tuple[str, ...]:
    """What to choose from where nothing is asked for: the first that the target holds everywhere.

    Or that it holds more of the linears in than in the others.
    """
    return min(target.defaults, key=lambda names: len(_obstructed(target, linears, names)))


def _obstructed(
    target: Target, linears: Sequence[LinearInfo], names: Sequence[str]
) -> list[LinearInfo]:
    """The linears that a target cannot hold in each of the schemes called `names`."""
    schemes = [parse_scheme(name, act_scale_mode=target.act_scale_mode or "even") for name in names]
    return [
        info
        for info in linears
        if any(
            target.obstacle_of(s, info.out_features, info.in_features, info.is_expert)
            for s in schemes
        )
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
        shape = info.out_features, info.in_features
        why = target.obstacle(recipe, *shape, info.is_expert)
        if why is None and recipe.scheme is not None:
            fits[info.name] = Fit(recipe.scheme)
        elif why is not None:
            obstacles[info.name] = why
            other = target.substitute(recipe, *shape, info.is_expert)
            fits[info.name] = Fit(other, why)
    obstacles |= _agree(linears, assignment, target, fits)
    if obstacles and not lossy:
        count = sum(found.why is not None for found in fits.values())
        raise UsageError(
            f"{target.name} cannot hold {count} of {len(fits)} linears: "
            f"{_some(obstacles)}; it holds whole groups of {target.says} "
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
        fitting = all(target.obstacle_of(widest, *shape, True) is None for shape in shapes)
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
