"""Rounding that is learned: SignRound, by the auto-round package, of our plan (`--tune`).

Block by block, signed gradient descent moves every weight's rounding and every group's range to
keep the block's output (Cheng et al., arXiv 2309.05516). It takes a few hundred forward and
backward passes of each block where error compensation takes two forwards, so it is an option. What
comes back are rounded weights in float: they are packed here, and compared with what they were.

auto-round knows the MX scales of activations by the `floor` and `rceil` rules; where they follow
`even`, it tunes for `floor`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError, plain_errors
from ..formats.compensate import search
from ..formats.pack import Packed, pack
from ..formats.reference import Quantized, Scales, dequantize, encode
from ..formats.schemes import FIRST_FORMATS, LEFT_ALONE, MX_GROUP, Assignment, Format, Scheme
from ..model.layout import CausalLM, LinearInfo, weight_of
from .nearest import check_packed, pack_weight

# What the packed weight may differ by from auto-round's, of the largest in a row: its are bfloat16.
TOLERANCE = 2.0**-8

UNQUANTIZED: dict[str, Any] = {"bits": 16, "act_bits": 16}


def _data_type(fmt: Format) -> str:
    if not fmt.is_float:
        return "int"
    return "mx_fp_rceil" if fmt.scale_mode == "rceil" else "mx_fp"


def layer_option(name: str, scheme: Scheme) -> dict[str, Any]:
    """auto-round's `layer_config` entry. Raises UsageError for a scheme that it does not have."""
    fmt, activation = scheme.weight, scheme.activation
    if fmt is None:
        return UNQUANTIZED
    known = FIRST_FORMATS - {("e5m2", "e8m0")}
    alike = activation is None or activation.element == fmt.element
    if not alike or any((one.element, one.scale) not in known for one in scheme.formats):
        raise UsageError(f"{scheme.name} is not known to auto-round ({name})")
    option: dict[str, Any] = {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.symmetric}
    option |= {"data_type": _data_type(fmt), "act_bits": 16}
    if activation is not None:
        option |= {"act_bits": activation.bits, "act_group_size": activation.group_size}
        option |= {"act_data_type": _data_type(activation), "act_sym": True, "act_dynamic": True}
    return option


def _options(linears: Sequence[LinearInfo], recipes: Assignment) -> dict[str, dict[str, Any]]:
    options = {}
    for info in linears:
        recipe = recipes.get(info.name, LEFT_ALONE)
        if info.is_expert or recipe.scheme is None:
            what = "experts" if info.is_expert else "slabs and rotations"
            raise UsageError(f"--tune cannot have {what}: {info.name}")
        option = layer_option(info.name, recipe.scheme)
        if option.get("data_type", "int") != "int" and info.in_features % MX_GROUP:
            raise UsageError(
                f"--tune needs whole MX blocks of {MX_GROUP} columns: got {info.in_features} "
                f"({info.name})"
            )
        options[info.name] = option
    return options


def _codes(module: Any, weight: Tensor, fmt: Format) -> Quantized:
    """The codes of a tuned weight [N, K]: MX scales are found again, integer ones were learned."""
    if fmt.is_float:
        return search(weight, fmt)
    shape = weight.shape[0], -1
    scale = module.scale.detach().reshape(shape).to(torch.float16)
    zero_point = None if fmt.symmetric else module.zp.detach().reshape(shape).to(torch.uint8)
    scales = Scales(scale, zero_point)
    return Quantized(encode(weight, scales, fmt), *scales)


def _packed(name: str, model: nn.Module, scheme: Scheme) -> Packed:
    module: Any = model.get_submodule(name)
    module = getattr(module, "orig_layer", module)
    fmt, weight = scheme.format, module.weight.detach().float().cpu()
    codes = _codes(module, weight, fmt)
    error = (dequantize(codes, fmt) - weight).abs().amax(1)
    if bool((error > TOLERANCE * weight.abs().amax(1)).any()):
        raise UsageError(
            f"auto-round's weights must lie on the grid of {scheme.name}: got values that are off "
            f"by up to {error.max().item():.3g} ({name})"
        )
    return check_packed(name, weight, scheme, pack(codes, fmt))


def tune(
    model: CausalLM,
    tokenizer: Any,
    linears: Sequence[LinearInfo],
    recipes: Assignment,
    ids: Tensor,
    *,
    iterations: int,
    batch_size: int,
    device: str = "cpu",
) -> dict[str, list[Packed]]:
    """Round every linear that has a recipe, with token ids [sequences, length] -> its parts.

    `model` (16 bits, with its weights) is used up: what it holds afterwards is auto-round's.
    Raises UsageError where auto-round is not installed, fails, or lacks what the plan has.
    """
    options = _options(linears, recipes)
    schemes = {name: r.scheme for name, r in recipes.items() if r.scheme is not None and r.packed}
    for info in linears:  # what comes back may have lost what is too small for its scales
        if info.name in schemes:
            pack_weight(info.name, weight_of(model, info).detach(), schemes[info.name])
    try:
        from auto_round import AutoRound
    except ImportError as error:
        raise UsageError("--tune needs auto-round: pip install auto-round") from error
    if tokenizer is None:
        raise UsageError("--tune needs a tokenizer: auto-round wants one, and the model has none")
    logging.getLogger("autoround").setLevel(logging.ERROR)
    count, length = ids.shape
    with plain_errors("auto-round failed"):
        rounding: Any = AutoRound(
            model,
            tokenizer=tokenizer,
            scheme="W4A16",  # of linears that layer_config leaves out: none
            layer_config=options,
            dataset=list(ids[:, None]),
            iters=iterations,
            nsamples=count,
            seqlen=length,
            batch_size=min(batch_size, count),
            device_map=device,
            enable_torch_compile=False,
            disable_model_free=True,
        )
        tuned, _ = rounding.quantize()
    return {name: [_packed(name, tuned, scheme)] for name, scheme in schemes.items()}
