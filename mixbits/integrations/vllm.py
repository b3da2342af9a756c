"""Packed models in vLLM: a plugin that vLLM finds by its entry point (`vllm.general_plugins`).

vLLM fuses q, k and v, and gate and up, into one layer, and cuts layers among GPUs. Linears that are
fused may have been packed in different schemes, so that a fused layer keeps a tensor for each of
them: the loader sees one parameter of bytes, which knows where each begins.

Rows are cut anywhere. Columns are cut for down_proj and o_proj with tensor parallelism: at whole
groups only, and not through slabs, whose columns lie in an order of their own, nor where something
is of a whole row: planes of codes, or a scale of weights or of a token.

Experts are linears of their own, through which tokens are led one expert after the other: any mix
of schemes, at the pace of a loop that asks the host where tokens go. CUDA graphs cannot record it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.model_executor.utils import set_weight_attrs

from ..checkpoint.transformers_quantizer import MixbitsConfig
from ..errors import UsageError
from ..formats.arrange import check_order
from ..formats.pack import recipe_spec
from ..formats.schemes import LEFT_ALONE, ROW, Assignment, Recipe, Scheme
from ..model.experts import EXPERT_PROJECTIONS, ExpertsLoop, GatedActivation
from ..model.families import FAMILIES, name_from_vllm
from ..ops import packed_matmuls_unchecked
from ..runtime.linear import PackedLinear
from ..runtime.swap import Experts

_ALIGNMENT = 64  # bytes: kernels read whole vectors


@dataclass(frozen=True)
class Place:
    """Where the tensor of one linear lies in a parameter of bytes, and whether it may be cast."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    casts: bool

    @property
    def end(self) -> int:
        return self.offset + self.dtype.itemsize * int(torch.Size(self.shape).numel())


class ShardedParameter(BasevLLMParameter):
    """Tensors of the linears that a layer fuses, one behind the other; uint8 [bytes].

    `places` maps a linear's number in the layer, or an expert and the name of a shard, to its
    tensor, of this GPU's part.
    """

    def __init__(self, data: Tensor, places: Mapping[Any, Place], weight_loader: Any) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.places = places

    def shard(self, number: Any) -> Tensor:
        place = self.places[number]
        part = self.data[place.offset : place.end]
        return part.view(place.dtype).view(place.shape)

    def _load(self, loaded: Tensor, number: Any, dim: int, rank: int) -> None:
        target, casts = self.shard(number), self.places[number].casts
        if loaded.dim() == 2:  # an order of columns is the same everywhere
            loaded = loaded.narrow(dim, rank * target.shape[dim], target.shape[dim])
        if loaded.shape != target.shape or not (casts or loaded.dtype == target.dtype):
            raise UsageError(
                f"a tensor must be {target.dtype} {list(target.shape)}: "
                f"got {loaded.dtype} {list(loaded.shape)}"
            )
        target.copy_(loaded)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._load(loaded_weight, 0, 0, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._load(loaded_weight, 0, 1, self.tp_rank)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._load(loaded_weight, kwargs["shard_id"], 0, self.tp_rank)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        number = self._shard_id_as_int(kwargs["shard_id"])
        rank = self.tp_rank if number == 0 else self.tp_rank // kwargs["num_heads"]
        self._load(loaded_weight, number, 0, rank)


def _load_replicated(param: ShardedParameter, loaded_weight: Tensor) -> None:
    """A layer that no GPU has a part of."""
    param._load(loaded_weight, 0, 0, 0)


def tensor_spec(
    recipe: Recipe, rows: int, columns: int, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape of what a linear stores; `dtype` is that of one left alone."""
    if not recipe.packed:
        return {"weight": (dtype, (rows, columns))}
    return recipe_spec(recipe, rows, columns)


def _spans_columns(scheme: Scheme) -> str | None:
    """What of a linear is of all its columns together, if anything."""
    fmt, inputs = scheme.format, scheme.activation
    if len(fmt.planes) > 1:
        return f"codes of {fmt.bits} bits lie in planes of whole rows"
    if fmt.group_size == ROW:
        return "its scales are of whole rows"
    if inputs is not None and (inputs.group_size == ROW or inputs.tensor_scale == "row"):
        return "its activations have a scale for a whole token"
    return None


def check_cut(prefix: str, recipe: Recipe, columns: int, part: int) -> None:
    """Raise UsageError if `part` of `columns` of a linear cannot be on a GPU of their own."""
    if part == columns or not recipe.packed:
        return
    if recipe.scheme is None:
        raise UsageError(
            "slabs and rotated columns cannot be cut by tensor parallelism: got "
            f"{part} of {columns} columns on a GPU ({prefix}); quantize with --target vllm"
        )
    fmt = recipe.scheme.format
    if (why := _spans_columns(recipe.scheme)) is not None:
        raise UsageError(
            f"{recipe.name} cannot be cut by tensor parallelism, for {why}: got {part} of "
            f"{columns} columns on a GPU ({prefix})"
        )
    whole = part % max(fmt.group_size, 32) == 0
    if not whole or (not fmt.symmetric and part // fmt.group_size * fmt.bits % 8):
        raise UsageError(
            f"a GPU must have whole groups of {fmt.group_size} columns, and whole bytes of zero "
            f"points: got {part} of {columns} columns ({prefix})"
        )


def _register(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Under a dotted name, as checkpoints have it."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in layer._modules:
            layer.add_module(part, nn.Module())
        layer = layer.get_submodule(part)
    layer.register_parameter(leaf, parameter)


def _module(recipe: Recipe, rows: int, columns: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The linear that stored tensors make."""
    if not recipe.packed:
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        return linear
    if (order := tensors.get("order")) is not None:
        check_order(order, columns)
    return PackedLinear(columns, rows, recipe, device="meta").fill(tensors)


@register_weight_loader_v2_supported_method
class MixbitsLinearMethod(LinearMethodBase):
    """Creates, fills and multiplies a layer of one or more fused linears."""

    def __init__(self, prefix: str, recipes: Sequence[Recipe]) -> None:
        self.prefix, self.recipes = prefix, recipes

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if len(output_partition_sizes) != len(self.recipes):
            raise UsageError(
                f"{self.prefix} is made of {len(output_partition_sizes)} linears in vLLM, and of "
                f"{len(self.recipes)} in the checkpoint"
            )
        loader = extra_weight_attrs["weight_loader"]
        if isinstance(layer, ReplicatedLinear):
            loader = _load_replicated
        places: dict[str, dict[int, Place]] = {}
        sizes: dict[str, int] = {}
        for number, (recipe, rows) in enumerate(
            zip(self.recipes, output_partition_sizes, strict=True)
        ):
            check_cut(self.prefix, recipe, input_size, input_size_per_partition)
            spec = tensor_spec(recipe, rows, input_size_per_partition, params_dtype)
            for name, (dtype, shape) in spec.items():
                place = Place(sizes.get(name, 0), dtype, shape, casts=not recipe.packed)
                places.setdefault(name, {})[number] = place
                sizes[name] = place.end + -place.end % _ALIGNMENT
        for name, found in places.items():
            data = torch.empty(sizes[name], dtype=torch.uint8)
            _register(layer, name, ShardedParameter(data, places=found, weight_loader=loader))
        layer.mixbits_shape = output_partition_sizes, input_size_per_partition

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make linears of what was loaded; the tensors stay where they are."""
        if "packed" in layer._modules:
            return
        rows, columns = layer.mixbits_shape
        stored = dict(layer.named_parameters())
        sharded = {n: p for n, p in stored.items() if isinstance(p, ShardedParameter)}
        linears = []
        for number, (recipe, size) in enumerate(zip(self.recipes, rows, strict=True)):
            own = {n: p.shard(number) for n, p in sharded.items() if number in p.places}
            linears.append(_module(recipe, size, columns, own))
        for name in sharded:
            path, _, leaf = name.rpartition(".")
            delattr(layer.get_submodule(path), leaf)
        layer.packed = nn.ModuleList(linears)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., sum of rows], in x's dtype."""
        linears = layer.packed
        rows = x.reshape(-1, x.shape[-1])
        if all(isinstance(linear, PackedLinear) for linear in linears):
            outs = packed_matmuls_unchecked(rows, [linear.operand for linear in linears])
        else:
            outs = [linear(rows) for linear in linears]
        y = (outs[0] if len(outs) == 1 else torch.cat(outs, -1)).reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class MixbitsHeadMethod(LinearMethodBase):
    """The output head: its loader cuts rows of a plain parameter, and fills up the vocabulary."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        spec = recipe_spec(self.recipe, sum(output_partition_sizes), input_size)
        for name, (dtype, shape) in spec.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            rows = {"output_dim": 0} if len(shape) == 2 else {}
            set_weight_attrs(parameter, {**rows, **extra_weight_attrs})
            _register(layer, name, parameter)
        layer.mixbits_shape = sum(output_partition_sizes), input_size

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make a linear of what was loaded."""
        if "packed" in layer._modules:
            return
        rows, columns = layer.mixbits_shape
        own = {}
        for name in recipe_spec(self.recipe, rows, columns):
            path, _, leaf = name.rpartition(".")
            own[name] = layer.get_parameter(name).data
            delattr(layer.get_submodule(path), leaf)
        layer.packed = _module(self.recipe, rows, columns, own)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.packed(x)
        return y if bias is None else y + bias


_SHARDS = dict(zip(("w1", "w3", "w2"), EXPERT_PROJECTIONS, strict=True))  # vLLM's names of them
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}


class MixbitsExpertsMethod(FusedMoEMethodBase):
    """Creates, fills and runs the experts of a layer that this GPU has, or has a part of.

    `recipes` are those of `<expert>.<projection>`.
    """

    def __init__(self, moe: Any, prefix: str, recipes: Mapping[str, Recipe]) -> None:
        super().__init__(moe)
        self.prefix, self.recipes = prefix, recipes

    def maybe_roundup_sizes(self, hidden_size: int, intermediate: int, *_: Any) -> tuple[int, int]:
        return hidden_size, intermediate

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def _check(self, layer: Any) -> None:
        """Raise UsageError for what the loop over experts does not do."""
        if layer.activation.value not in _ACTIVATIONS or layer.swiglu_limit is not None:
            raise UsageError(f"experts must use silu or gelu: got {layer.activation.value}")
        if self.moe.has_bias or layer.apply_router_weight_on_input:
            raise UsageError(f"experts with biases or weighted inputs do not run ({self.prefix})")
        mode = get_current_vllm_config().compilation_config.cudagraph_mode
        if mode not in (None, CUDAGraphMode.NONE):
            raise UsageError(
                "packed experts ask the host where tokens go, which CUDA graphs cannot record: "
                f"pass enforce_eager=True, got cudagraph_mode {mode.name}"
            )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._check(layer)
        part, whole = intermediate_size_per_partition, self.moe.intermediate_size
        layer.mixbits_linears = {}
        places: dict[str, dict[Any, Place]] = {}
        sizes: dict[str, int] = {}
        for expert in range(extra_weight_attrs["global_num_experts"]):
            local = layer._map_global_expert_id_to_local_expert_id(expert)
            for shard, projection in _SHARDS.items():
                recipe, is_down = self.recipes[f"{expert}.{projection}"], shard == "w2"
                shape = (hidden_size, part) if is_down else (part, hidden_size)
                if is_down:
                    check_cut(f"{self.prefix}.{expert}.{projection}", recipe, whole, part)
                if local >= 0:
                    layer.mixbits_linears[local, shard] = recipe, shape
                for name, (dtype, size) in tensor_spec(recipe, *shape, params_dtype).items():
                    stored = name if recipe.packed else "weight_plain"
                    full = f"{'w2' if is_down else 'w13'}_{stored}"
                    found = places.setdefault(full, {})  # vLLM asks for it even if none is here
                    if local >= 0:
                        place = Place(sizes.get(full, 0), dtype, size, casts=not recipe.packed)
                        found[local, shard] = place
                        sizes[full] = place.end + -place.end % _ALIGNMENT
        for name, found in places.items():
            data = torch.empty(sizes.get(name, 0), dtype=torch.uint8)
            parameter = ShardedParameter(data, places=found, weight_loader=_expert_loader(layer))
            layer._parameters[name] = parameter  # dots of segments and all: vLLM asks for it so

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make linears of what was loaded; the tensors stay where they are."""
        if "packed" in layer._modules:
            return
        stored = {n: p for n, p in layer._parameters.items() if isinstance(p, ShardedParameter)}
        linears = {}
        for key, (recipe, (rows, columns)) in layer.mixbits_linears.items():
            own = {
                name.partition("_")[2]: parameter.shard(key)
                for name, parameter in stored.items()
                if key in parameter.places
            }
            if not recipe.packed:
                own = {"weight": own["weight_plain"]}
            linears[f"{key[0]}.{_SHARDS[key[1]]}"] = _module(recipe, rows, columns, own)
        for name in stored:
            del layer._parameters[name]
        activation = GatedActivation(_ACTIVATIONS[layer.activation.value])
        count = len(linears) // len(_SHARDS)
        layer.packed = Experts(ExpertsLoop(count, activation), linears)

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """x [T, K], of every token's experts topk_ids [T, k] -> [T, K]."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        here = (topk_ids >= 0) & (topk_ids < layer.packed.num_experts)
        y: Tensor = layer.packed(x, topk_ids.where(here, layer.packed.num_experts), topk_weights)
        return y


def _expert_loader(layer: Any) -> Any:
    """What vLLM calls with each tensor of each expert; whether the expert is here."""

    def load(
        param: ShardedParameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local < 0:
            return False
        dim = 1 if shard_id == "w2" else 0
        param._load(loaded_weight, (local, shard_id), dim, layer.moe_config.tp_rank)
        return True

    return load


def _take_names_of_transformers() -> None:
    """Let vLLM's Mixtral, which expects those of Mistral's checkpoints, load them."""
    from vllm.model_executor.models.mixtral import MixtralModel

    family = FAMILIES["mixtral"]
    renamed: Any = MixtralModel.hf_to_vllm_mapper.orig_to_new_substr
    renamed |= family.vllm_names
    renamed[f".experts.{family.experts.joined}"] = ".experts.w13"
    renamed[f".experts.{family.experts.down}"] = ".experts.w2"


class MixbitsVllmConfig(QuantizationConfig):
    """`quantization_config` of a packed folder, as vLLM wants to ask for it."""

    def __init__(self, recipes: Assignment) -> None:
        super().__init__()
        self.recipes = recipes

    def get_name(self) -> str:
        return "mixbits"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MixbitsVllmConfig:
        """Raises UsageError for a layout that is not ours, or tensors that only we make plain."""
        if names := (config.get("stored") or {}).get("tensors"):
            raise UsageError(
                "weights that a plan leaves as the source has quantized them cannot be loaded into "
                f"vLLM: got {len(names)} such tensors ({names[0]})"
            )
        return cls(MixbitsConfig(**config).recipes())

    def _experts(self, layer: Any, prefix: str) -> MixbitsExpertsMethod | None:
        if any(theirs in f"{prefix}." for theirs in FAMILIES["mixtral"].vllm_names.values()):
            _take_names_of_transformers()
        prefix = name_from_vllm(prefix)
        names = [f"{e}.{p}" for e in range(layer.global_num_experts) for p in _SHARDS.values()]
        recipes = {name: self.recipes.get(f"{prefix}.{name}", LEFT_ALONE) for name in names}
        if not any(recipe.packed for recipe in recipes.values()):
            return None
        return MixbitsExpertsMethod(layer.moe_config, prefix, recipes)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if isinstance(layer, ParallelLMHead):
            recipe = self.recipes.get(prefix)
            return None if recipe is None else MixbitsHeadMethod(recipe)
        if not isinstance(layer, LinearBase):
            return None
        parent, dot, leaf = name_from_vllm(prefix).rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        recipes = [self.recipes.get(f"{parent}{dot}{part}", LEFT_ALONE) for part in parts]
        if not any(recipe.packed for recipe in recipes):
            return UnquantizedLinearMethod()
        return MixbitsLinearMethod(prefix, recipes)


def register() -> None:
    """The entry point: called in every process of vLLM, perhaps more than once."""
    register_quantization_config("mixbits")(MixbitsVllmConfig)
