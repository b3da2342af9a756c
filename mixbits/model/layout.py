"""Find the parts of a transformers causal language model that can be quantized.

A *linear* is one [N, K] weight: an `nn.Linear` or GPT-2's `Conv1D` in a decoder block, the head, or
one slice of the 3-D parameters in which transformers 5 holds a block's experts. Slices get the
names that they have in most checkpoints: `model.layers.0.mlp.experts.7.gate_proj`. What each part
is shows in what it does (`mixbits.model.recognise`, `experts`, `usage`); the rest is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .experts import Layout, expert_count, expert_slice, layout_of
from .families import DEFAULT, Family, family_of
from .recognise import (
    Routers,
    expert_counts,
    expert_lists,
    folds,
    holds_stacks,
    is_conv1d,
    is_router_name,
    linear_weight,
    shared_parameters,
    why_not_plain,
)
from .usage import Usage, usage_of

CausalLM: TypeAlias = Any  # a transformers model; its methods come from untyped mixins

_EXPERT_NAME = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<projection>\w+)")
_ROUTERS = "they decide, in a few rows, where tokens go"


@dataclass(frozen=True)
class LinearInfo:
    """One quantizable weight [out_features, in_features]; `block` is None for the head.

    is_expert   a slice of 3-D parameters
    among       the list of modules, each of which may see some tokens only, that it is in
    makers      linears into whose rows an order of its columns folds, all of them or none
    remembered  later tokens read its output, as keys or values
    shared      last parts of the names of all linears of its module that read its input; or ()
    ffn_output  it is the last linear of an FFN: what it reads, others have made number by number
    """

    name: str
    out_features: int
    in_features: int
    block: int | None
    is_expert: bool = False
    among: str | None = None
    makers: tuple[str, ...] = ()
    remembered: bool = False
    shared: tuple[str, ...] = ()
    ffn_output: bool = False

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

    @property
    def peers(self) -> str | None:
        """The same for the linears of all experts that stand for each other; None for no expert."""
        if self.is_expert or self.among is None:
            return self.stack if self.is_expert else None
        return f"{self.among}.*.{self.name[len(self.among) + 1 :].partition('.')[2]}"


@dataclass(frozen=True)
class LeftAlone:
    """A parameter with two dimensions or more in a decoder block that is not quantized.

    `kind` is the class that holds it, `why` completes "they are left as they are:".
    """

    name: str
    kind: str
    why: str
    numel: int
    is_router: bool = False


@dataclass(frozen=True)
class Survey:
    """All of a model's linears, in its order, and what else its decoder blocks hold."""

    linears: list[LinearInfo]
    left: list[LeftAlone]


def split_expert_name(name: str) -> tuple[str, int, str]:
    """`a.b.experts.7.gate_proj` -> (`a.b.experts`, 7, `gate_proj`)."""
    match = _EXPERT_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"not the name of an expert's linear: {name}")
    return match["module"], int(match["expert"]), match["projection"]


def expert_parent(name: str) -> str | None:
    """What would be the experts module of a linear of this name, or None."""
    match = _EXPERT_NAME.fullmatch(name)
    return match["module"] if match else None


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


def check_layout(model: nn.Module, linears: Iterable[LinearInfo], target: str) -> None:
    """Raises UsageError for a linear that other tools expect to be stored as [K, N]."""
    names = [info.name for info in linears if not info.is_expert]
    found = [name for name in names if is_conv1d(model.get_submodule(name))]
    if found:
        raise UsageError(f"{target} takes nn.Linear only: got Conv1D ({found[0]})")


class _Surveyor:
    """Looks through a model's decoder blocks."""

    def __init__(self, model: CausalLM, by_use: bool) -> None:
        self.prefix, self.blocks = decoder_blocks(model)
        self.names = [f"{self.prefix}.{index}" for index in range(len(self.blocks))]
        self.shared = shared_parameters(model)
        text_config = model.config.get_text_config()
        self.counts, self.family = expert_counts(text_config), family_of(text_config)
        self.usage, self.by_use = Usage(), by_use
        if by_use:
            plain = [
                name
                for prefix, block in zip(self.names, self.blocks, strict=True)
                for name, module in block.named_modules(prefix=prefix)
                if linear_weight(module) is not None and self._strange(name, module) is None
            ]
            self.usage = usage_of(model, self.names, plain)
            if any(self._is_called_last(name) for name in plain):
                self.usage.made = {
                    n: m for n, m in self.usage.made.items() if self._is_called_last(n)
                }

    def _is_called_last(self, name: str) -> bool:
        """Whether a linear has the name of an FFN's last one; where none has, its use tells."""
        return name.rpartition(".")[2] == self.family.ffn_output

    def _strange(self, name: str, module: nn.Module) -> str | None:
        """Why something that holds a weight like a linear's is left alone; not if by its use."""
        if (why := why_not_plain(module)) is not None:
            return why
        if any(f"{name}.{own}" in self.shared for own, _ in module.named_parameters()):
            return "their weights are shared with other modules"
        return None

    def look(self) -> Survey:
        survey, seen = Survey([], []), set[int]()
        for index, block in enumerate(self.blocks):
            prefix = self.names[index]
            whys, infos = self._linears(index, block)
            survey.linears.extend(infos)
            whole = {info.name for info in infos if not info.is_expert}
            whole |= {split_expert_name(info.name)[0] for info in infos if info.is_expert}
            for name, module in block.named_modules(prefix=prefix):
                why = whys.get(name) or self._why_no_linear(name.removeprefix(f"{prefix}."), module)
                for own, value in module._parameters.items():
                    if value is None or value.dim() < 2 or name in whole or id(value) in seen:
                        continue
                    seen.add(id(value))
                    kind, is_router = type(module).__name__, why == _ROUTERS
                    one = LeftAlone(f"{name}.{own}", kind, why, value.numel(), is_router)
                    survey.left.append(one)
        return survey

    def _linears(self, index: int, block: nn.Module) -> tuple[dict[str, str], list[LinearInfo]]:
        """Why linears of a block are left alone, and those that are not."""
        prefix, usage = self.names[index], self.usage
        modules = dict(block.named_modules(prefix=prefix))
        lists = expert_lists(block, prefix)
        routers = Routers(block, prefix, self.counts, usage.scoring, usage.selecting, self.family)
        whys: dict[str, str] = {}
        for name, module in modules.items():
            if linear_weight(module) is None:
                continue
            if name in routers:
                whys[name] = _ROUTERS
            elif (why := self._strange(name, module)) is not None:
                whys[name] = why
            elif name in usage.read:
                whys[name] = "their weights are used by other code than their own product"
        plain = {n for n, m in modules.items() if linear_weight(m) is not None and n not in whys}
        found: list[LinearInfo] = []
        for name, module in modules.items():
            if name in plain:
                found.append(self._plain(name, module, index, lists, modules, plain))
            elif (layout := layout_of(module)) is not None:
                found += expert_linears(name, module, layout, index)
        return whys, found

    def _plain(
        self,
        name: str,
        module: nn.Module,
        index: int,
        lists: Sequence[str],
        modules: Mapping[str, nn.Module],
        plain: Collection[str],
    ) -> LinearInfo:
        weight = linear_weight(module)
        assert weight is not None
        leaf = name.rpartition(".")[2]
        return LinearInfo(
            name,
            weight.shape[0],
            weight.shape[1],
            index,
            among=next((held for held in lists if name.startswith(f"{held}.")), None),
            makers=tuple(self._makers(name, modules, plain)),
            remembered=name in self.usage.remembered or self.family.is_read_later(leaf),
            shared=self._shared(name, plain),
            ffn_output=name in self.usage.made or self._is_called_last(name),
        )

    def _shared(self, name: str, plain: Collection[str]) -> tuple[str, ...]:
        """The group of `LinearInfo.shared`: as it was seen; by names, where that was not."""
        parent, _, leaf = name.rpartition(".")
        named = self.family.shared_with(leaf)
        if name not in self.usage.called:
            return named
        seen = next((group for group in self.usage.shared if name in group), (name,))
        found = [one.rpartition(".")[2] for one in seen if one in plain]
        if set(found) == {other for other in named if f"{parent}.{other}" in plain}:
            return named
        return tuple(found) if len(found) > 1 else ()

    def _makers(
        self, name: str, modules: Mapping[str, nn.Module], plain: Collection[str]
    ) -> list[str]:
        """The linears into whose rows an order of a linear's columns folds; [] where it does not.

        Those that were seen to make its input, or are called so; that it folds is tried.
        """
        parent, _, leaf = name.rpartition(".")
        if not self.by_use or name in self.usage.outside:
            return []
        makers = list(self.usage.made.get(name, ()))
        if not makers and self._is_called_last(name):
            named = (f"{parent}.{maker}" for maker in self.family.ffn_inputs)
            makers = [maker for maker in named if maker in modules]
        parts = (name, *makers)
        if not makers or any(n not in plain or is_conv1d(modules[n]) for n in parts):
            return []
        leaves = [maker.rpartition(".")[2] for maker in makers]
        return makers if folds(modules[parent], leaf, leaves) else []

    def _why_no_linear(self, name: str, module: nn.Module) -> str:
        """Why a parameter is left alone that is no linear's; `name` begins in the block."""
        if is_router_name(name, self.family):
            return _ROUTERS
        is_expert = holds_stacks(module) or "expert" in type(module).__name__.lower()
        return "their formula is not known" if is_expert else "they are no linears"


def expert_linears(name: str, module: Any, layout: Layout, index: int) -> Iterator[LinearInfo]:
    """All linears of an experts module called `name`, in block `index`."""
    for expert in range(expert_count(module, layout)):
        makers = tuple(f"{name}.{expert}.{p}" for p in layout.projections[:-1])
        for projection in layout.projections:
            rows, columns = expert_slice(module, expert, projection).shape
            yield LinearInfo(
                f"{name}.{expert}.{projection}",
                rows,
                columns,
                index,
                is_expert=True,
                makers=makers if projection == layout.projections[-1] else (),
                shared=DEFAULT.shared_with(projection),
                ffn_output=projection == layout.projections[-1],
            )


def survey(model: CausalLM, include_head: bool = False, by_use: bool = True) -> Survey:
    """All quantizable linears in the model's order, the head last; works on a meta model.

    `by_use` runs a copy without storage, to see what the model does with them, and tries which
    orders of columns fold; without, names alone tell what they are to each other, and `makers` and
    some of what to leave alone are missing: enough for linears that were chosen before. A head that
    is no plain linear is not among them. Raises UsageError where there is none.
    """
    found = _Surveyor(model, by_use).look()
    if include_head:
        name, head = output_head(model)
        if why_not_plain(head) is None:
            found.linears.append(LinearInfo(name, head.out_features, head.in_features, None))
    if not found.linears:
        raise UsageError(f"{type(model).__name__} has no linear layer that can be quantized")
    return found


def find_linears(
    model: CausalLM, include_head: bool = False, by_use: bool = True
) -> list[LinearInfo]:
    """The linears of `survey`."""
    return survey(model, include_head, by_use).linears


def shared_inputs(model: CausalLM, names: Collection[str]) -> list[list[str]]:
    """Which of the linears called `names` read one input of their module: groups of two or more.

    By their names, where each group of a module's linears of as many columns has one; otherwise a
    copy of the model without storage is run to see it. `model` still has its linears.
    """
    linears = [info for info in find_linears(model, by_use=False) if info.name in names]
    if not _names_tell(linears, family_of(model.config.get_text_config())):
        linears = [info for info in find_linears(model) if info.name in names]
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for info in linears:
        if info.shared:
            groups.setdefault((info.name.rpartition(".")[0], info.shared), []).append(info.name)
    return [group for group in groups.values() if len(group) > 1]


def _names_tell(linears: Iterable[LinearInfo], family: Family) -> bool:
    """Whether a module's linears of as many columns are one known group, but for those that end
    attention and FFN."""
    last = {family.attention[3], family.ffn_output}
    known: dict[tuple[str, int], tuple[str, ...]] = {}
    for info in linears:
        parent, _, leaf = info.name.rpartition(".")
        if leaf not in last:
            found = known.setdefault((parent, info.in_features), info.shared or (leaf,))
            if leaf not in found:
                return False
    return True


def weight_of(model: nn.Module, info: LinearInfo) -> Tensor:
    """The [N, K] weight of a linear: a parameter, or a view of one."""
    if info.is_expert:
        module, expert, projection = split_expert_name(info.name)
        return expert_slice(model.get_submodule(module), expert, projection)
    weight = linear_weight(model.get_submodule(info.name))
    assert weight is not None
    return weight


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
