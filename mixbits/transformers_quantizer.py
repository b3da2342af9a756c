"""Let transformers load a packed checkpoint: `from_pretrained`, once this module is imported.

transformers builds the model without storage, asks the quantizer to put packed linears where
the configuration names them, and then fills every buffer from the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .formats import Recipe, UsageError
from .linear import packed_linear, share_inputs, swap_linears
from .pack import LAYOUT
from .recipes import parse_recipe


@register_quantization_config("mixbits")
class MixbitsConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json. `modules` maps linears to recipes, as described."""

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        layout: int = 1,
        weight_scale_mode: str = "floor",
        act_scale_mode: str = "floor",
        **provenance: Any,
    ) -> None:
        self.quant_method = "mixbits"  # type: ignore[assignment]
        self.layout = layout
        self.weight_scale_mode, self.act_scale_mode = weight_scale_mode, act_scale_mode
        provenance.pop("quant_method", None)
        for key, value in provenance.items():
            setattr(self, key, value)
        self.modules = modules or {}

    def recipes(self) -> dict[str, Recipe]:
        """Linear -> recipe; the order of a linear's columns is in the weight files."""
        modes: Any = (self.weight_scale_mode, self.act_scale_mode)
        return {name: parse_recipe(text, *modes) for name, text in self.modules.items()}


@register_quantizer("mixbits")
class MixbitsQuantizer(HfQuantizer):
    """Puts `PackedLinear` and `Experts` into a model that transformers is about to fill."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        _check_layout(config.layout)
        recipes = config.recipes()

        def make(name: str, weight: Any, bias: nn.Parameter | None) -> nn.Module:
            return packed_linear(weight, recipes[name], bias)

        try:
            swap_linears(model, list(recipes), make)
        except (AttributeError, AssertionError) as error:
            raise UsageError(
                f"quantization_config names a linear that the model lacks: {error}"
            ) from None

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        share_inputs(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _check_layout(layout: object) -> None:
    if layout != LAYOUT:
        raise UsageError(f"this mixbits reads checkpoints of layout {LAYOUT}: got {layout}")


def read_config(folder: Path) -> MixbitsConfig:
    """The quantization_config of a checkpoint folder. Raises UsageError if it is none of ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {folder / 'config.json'}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder / 'config.json'} is not JSON: {error}") from None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != "mixbits":
        raise UsageError(
            f"{folder} is no mixbits checkpoint: config.json has no quant_method mixbits"
        )
    _check_layout(found.get("layout"))
    modules = found.get("modules")
    if not isinstance(modules, dict):
        raise UsageError(f"modules of quantization_config must name schemes ({folder})")
    return MixbitsConfig(**found)
