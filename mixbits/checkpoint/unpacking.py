"""A packed model becomes a plain one of transformers again, in memory: `model.dequantize()`.

Afterwards it is what `python -m mixbits.export DIR --format plain` writes, without what the folder
carries along beside the model.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.experts import layout_of, make_stack
from ..model.recognise import is_conv1d
from ..runtime.linear import PackedLinear
from ..runtime.swap import Experts, PlainLinear


@torch.no_grad()
def unpack_model(model: Any, dtype: torch.dtype) -> None:
    """Put plain linears and experts of `dtype` in the place of packed ones, on their devices.

    What else is of the model's own dtype becomes `dtype` too. Activations are not rounded any more.
    Raises UsageError, with nothing changed, for weights that are not in memory as a whole.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors) or any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise UsageError(
            "a model must be on one device to be dequantized: load it without device_map, or use "
            "python -m mixbits.export DIR --format plain"
        )
    before, original = model.dtype, _original(model)
    made = {}
    for name, module in _outermost(model).items():
        there = original.get_submodule(name)
        make: Any = _fill_experts if isinstance(module, Experts) else _fill_linear
        make(there, module, dtype, name)
        made[name] = there.train(model.training)
    for name, module in made.items():
        model.set_submodule(name, module)
    for tensor in (*model.parameters(), *model.buffers()):
        if dtype != before and tensor.dtype == before:
            tensor.data = tensor.data.to(dtype)
    for part in model.modules():  # what stands before methods of the class, for packed weights
        for name in ("forward", "generate", "num_parameters", "save_pretrained"):
            part.__dict__.pop(name, None)
    del model._weight_conversions  # it is saved under published names


def _original(model: Any) -> Any:
    """The model with its own modules, without storage."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(model)._from_config(config)


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """Packed linears and experts, but none that are parts of others."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = name.startswith(tuple(f"{outer}." for outer in found))
        if isinstance(module, Experts | PackedLinear) and not inside:
            found[name] = module
    return found


def _fill_linear(made: Any, linear: PackedLinear, dtype: torch.dtype, name: str) -> None:
    weight = linear.weight.to(dtype)
    weight = weight.T.contiguous() if is_conv1d(made) else weight
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), linear.bias


def _fill_experts(made: Any, experts: Experts, dtype: torch.dtype, name: str) -> None:
    layout = layout_of(made)
    assert layout is not None

    def value(leaf: str, expert: int, projection: str) -> Tensor:
        linear: Any = experts.get_submodule(f"{expert}.{projection}")
        if leaf.endswith("_bias"):
            return linear.bias
        return linear.weight_plain if isinstance(linear, PlainLinear) else linear.weight

    device = next(t.device for t in (*experts.parameters(), *experts.buffers()))
    for leaf in layout.stacks:
        like = torch.empty(made.get_parameter(leaf).shape, dtype=dtype, device=device)
        stack = make_stack(layout, leaf, like, partial(value, leaf))
        setattr(made, leaf, nn.Parameter(stack, requires_grad=False))
    rest = [n for n, t in (*made.named_parameters(), *made.named_buffers()) if t.is_meta]
    if rest:
        raise UsageError(f"{type(made).__name__} has more than its experts: {name}.{rest[0]}")
