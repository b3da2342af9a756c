"""Find the parts of a transformers causal language model that can be quantized.

A *linear* is one [N, K] weight: an `nn.Linear` or GPT-2's `Conv1D` in a decoder block, the head, or
one slice of the 3-D parameters in which transformers 5 holds a block's experts. Slices get the
names that they have in most checkpoints: `model.layers.0.mlp.experts.7.gate_proj`.

A *unit* is what the allocation decides on: one linear, or several that must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from .formats import UsageError

CausalLM: TypeAlias = Any  # a transformers model; its methods come from untyped mixins

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EXPERT_NAME = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<projection>\w+)")
# Routers decide, in a few rows, where a token goes: too small to be worth bits, too fragile.
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class LinearInfo:
    """One quantizable weight [out_features, in_features]; `block` is None for the head."""

    name: str
    out_features: int
    in_features: int
    block: int | None
    is_expert: bool = False

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def stack(self) -> str:
        """`a.experts.gate_proj` for that of any expert; the name of any other linear."""
        if not self.is_expert:
            return self.name
        module, _, projection = split_expert_name(self.name)
        return f"{module}.{projection}"


@dataclass(frozen=True)
class Unit:
    """What takes one scheme: linears that must agree, in the model's order."""

    name: str
    linears: tuple[LinearInfo, ...]


def is_router(name: str) -> bool:
    """Whether a module of this name decides where tokens go."""
    return name.rpartition(".")[2] in _ROUTERS


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds experts as gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    gate_up = getattr(module, "gate_up_proj", None)
    down = getattr(module, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return False
    has_bias = getattr(module, "gate_up_proj_bias", None) is not None
    if gate_up.dim() != 3 or down.dim() != 3 or has_bias or not hasattr(module, "act_fn"):
        return False
    hidden, intermediate = down.shape[1:]
    return gate_up.shape == (down.shape[0], 2 * intermediate, hidden)


def expert_slice(module: Any, expert: int, projection: str) -> Tensor:
    """The [N, K] view of one expert's projection in the 3-D parameters of `module`."""
    weight: Tensor
    if projection == "down_proj":
        weight = module.down_proj[expert]
    else:
        gate, up = module.gate_up_proj[expert].chunk(2, dim=0)
        weight = gate if projection == "gate_proj" else up
    return weight


def split_expert_name(name: str) -> tuple[str, int, str]:
    """`a.b.experts.7.gate_proj` -> (`a.b.experts`, 7, `gate_proj`)."""
    match = _EXPERT_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"not the name of an expert's linear: {name}")
    return match["module"], int(match["expert"]), match["projection"]


def decoder_blocks(model: CausalLM) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks. Raises UsageError where there is none."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder()  # and not a tower that sees or hears
    inside = {id(module) for module in decoder.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and id(module) in inside:
            return name, module
    raise UsageError(
        f"{type(model).__name__} has no list of {layers} decoder blocks: "
        "only decoder-only language models can be quantized"
    )


def output_head(model: CausalLM) -> tuple[str, nn.Linear]:
    """Name and module of the linear that makes logits."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return name, module
    raise UsageError(f"{type(model).__name__} has no linear output head")


def head_is_tied(model: CausalLM) -> bool:
    """Whether the head shares its weight with the embedding."""
    head = output_head(model)[1]
    return bool(head.weight is model.get_input_embeddings().weight)


def linear_weight(module: nn.Module) -> Tensor | None:
    """The [N, K] weight of a linear, of which `Conv1D` holds the transpose; None for the others."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return cast("Tensor", weight)
    return cast("Tensor", weight.T) if is_transposed(module) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's `Conv1D`, whose name is all that an optional import needs."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def check_layout(model: nn.Module, linears: Iterable[LinearInfo], target: str) -> None:
    """Raises UsageError for a linear that other tools expect to be stored as [K, N]."""
    names = [info.name for info in linears if not info.is_expert]
    found = [name for name in names if is_transposed(model.get_submodule(name))]
    if found:
        raise UsageError(f"{target} takes nn.Linear only: got Conv1D ({found[0]})")


def _linears_in(prefix: str, block: nn.Module, index: int) -> Iterator[LinearInfo]:
    for name, module in block.named_modules(prefix=prefix):
        weight = linear_weight(module)
        if weight is not None and not is_router(name):
            yield LinearInfo(name, weight.shape[0], weight.shape[1], index)
        elif is_experts(module):
            for expert in range(module.down_proj.shape[0]):
                for projection in EXPERT_PROJECTIONS:
                    rows, columns = expert_slice(module, expert, projection).shape
                    full = f"{name}.{expert}.{projection}"
                    yield LinearInfo(full, rows, columns, index, is_expert=True)


def find_linears(model: CausalLM, include_head: bool = False) -> list[LinearInfo]:
    """All quantizable linears in the model's order, the head last. Works on a meta model."""
    prefix, blocks = decoder_blocks(model)
    found = [
        info
        for index, block in enumerate(blocks)
        for info in _linears_in(f"{prefix}.{index}", block, index)
    ]
    if include_head:
        name, head = output_head(model)
        found.append(LinearInfo(name, head.out_features, head.in_features, None))
    if not found:
        raise UsageError(f"{type(model).__name__} has no linear layer that can be quantized")
    return found


def weight_of(model: nn.Module, info: LinearInfo) -> Tensor:
    """The [N, K] weight of a linear: a parameter, or a view of one."""
    if info.is_expert:
        module, expert, projection = split_expert_name(info.name)
        return expert_slice(model.get_submodule(module), expert, projection)
    weight = linear_weight(model.get_submodule(info.name))
    assert weight is not None
    return weight


def _unit_name(info: LinearInfo, fuse: bool, per_expert: bool, by_input: bool) -> str:
    parent, _, leaf = info.name.rpartition(".")
    if info.is_expert and not per_expert:
        parent = split_expert_name(info.name)[0]
        if not by_input:
            return parent
    if fuse:
        for group in FUSED_GROUPS:
            if leaf in group:
                return f"{parent}.{'+'.join(group)}"
    return f"{parent}.{leaf}"


def make_units(
    linears: Iterable[LinearInfo],
    fuse: bool = False,
    per_expert: bool = False,
    by_input: bool = False,
) -> list[Unit]:
    """Group linears into units, in the model's order.

    fuse        q/k/v agree, and gate/up, as engines that fuse them require.
    per_expert  every expert's linear is free; otherwise all experts of a block agree.
    by_input    but not their gate and up projections with their down projections, whose inputs
                are others: the linears of a unit then have as many columns.
    """
    groups: dict[str, list[LinearInfo]] = {}
    for info in linears:
        groups.setdefault(_unit_name(info, fuse, per_expert, by_input), []).append(info)
    return [Unit(name, tuple(members)) for name, members in groups.items()]


def match_units(units: Sequence[Unit], pattern: str, option: str = "--keep") -> list[int]:
    """Indices of the units that a pattern, given as `option`, names.

    A pattern is a shell wildcard over unit or linear names (`*.down_proj`), or a regular
    expression after `re:`. Raises UsageError where nothing matches.
    """

    def matches(name: str) -> bool:
        if pattern.startswith("re:"):
            return re.fullmatch(pattern[3:], name) is not None
        return fnmatchcase(name, pattern)

    try:
        found = [
            index
            for index, unit in enumerate(units)
            if matches(unit.name) or any(matches(info.name) for info in unit.linears)
        ]
    except re.error as error:
        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from None
    if not found:
        raise UsageError(f"{option} {pattern!r} matches no unit, such as {units[0].name}")
    return found


def ignore(linears: Sequence[LinearInfo], patterns: Sequence[str]) -> list[LinearInfo]:
    """The linears that no `--ignore` pattern names. Raises UsageError where none is left."""
    units = make_units(linears, per_expert=True)
    ignored = {i for pattern in patterns for i in match_units(units, pattern, "--ignore")}
    left = [info for i, unit in enumerate(units) if i not in ignored for info in unit.linears]
    if not left:
        raise UsageError(f"--ignore must leave a linear: got {' '.join(patterns)}, which name all")
    return left


def model_class(config: Any) -> Any:
    """What opens a model: the class that it says it is of, where transformers has it.

    So a model that also sees keeps what it sees with. Whatever else it says, and with code of its
    own, `AutoModelForCausalLM` decides.
    """
    import transformers

    own = getattr(config, "auto_map", None) or {}
    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        if auto in own:
            return getattr(transformers, auto)
    name = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, name, None)
    if (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and not getattr(config, "is_encoder_decoder", False)
        and isinstance(config, found.config_class or ())
        and found.can_generate()
    ):
        return found
    return transformers.AutoModelForCausalLM


def meta_model(config: Any, trust_remote_code: bool = False) -> CausalLM:
    """The model that `config` describes, with shapes and no storage."""
    found = model_class(config)
    with torch.device("meta"):
        if hasattr(found, "from_config"):
            return found.from_config(config, trust_remote_code=trust_remote_code)
        return found._from_config(config)
