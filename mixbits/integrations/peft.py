"""Adapters of `peft` on packed linears: LoRA, once mixbits and peft are both imported.

    model = peft.get_peft_model(mixbits.load(DIR), peft.LoraConfig(target_modules="all-linear"))

peft looks at the class of a module for what stands before it. Imported, this tells every
`LoraConfig` of our classes, in the way that peft has for that, and counts them among "all-linear".
The adapter's own matrices are float32; packed weights stay as they are, so that nothing can be
merged into them.
"""

from __future__ import annotations

import functools
from typing import Any

import peft
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora
from torch import nn

from ..errors import UsageError
from ..runtime.linear import PackedLinear

# Of `init_lora_weights`: those that leave the weight which they stand before as it is.
INITS = (True, False, "gaussian", "orthogonal", "eva")


class LoraPackedLinear(lora.Linear):
    """LoRA before a packed linear. What would change its weight raises UsageError."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # peft warns of classes that are not its own

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        init = config.init_lora_weights
        if init not in INITS:
            raise UsageError(
                f"init_lora_weights on a packed linear must be one of "
                f"{', '.join(map(repr, INITS))}, as packed weights cannot change: got {init!r}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UsageError(
            "an adapter cannot be merged into a packed linear, whose weights are codes: keep it "
            "beside them, or merge it into the model that was quantized"
        )


def is_target(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear)


def _all_linear(original: Any) -> Any:
    @functools.wraps(original)
    def include(config: Any, model: nn.Module) -> Any:
        wanted = getattr(config, "target_modules", None)
        config = original(config, model)
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            config.target_modules |= _packed_names(model)
        return config

    return include


def _packed_names(model: Any) -> set[str]:
    """Packed linears but the head, and those that have an adapter already, as peft leaves out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tuned: Any = tuners_utils.BaseTunerLayer
    inside = {
        part
        for module in model.modules()
        if isinstance(module, tuned)
        for part in module.modules()
        if part is not module
    }
    return {
        name
        for name, module in model.named_modules()
        if is_target(module) and module is not head and module not in inside
    }


def _with_ours(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(config: Any) -> None:
        original(config)
        config._register_custom_module({PackedLinear: LoraPackedLinear})

    return post_init


_config: Any = peft.LoraConfig
if not hasattr(_config.__post_init__, "__wrapped__"):  # this module may be reloaded
    _config.__post_init__ = _with_ours(_config.__post_init__)
    tuners_utils._maybe_include_all_linear_layers = _all_linear(
        tuners_utils._maybe_include_all_linear_layers
    )
