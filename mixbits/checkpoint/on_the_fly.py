"""Quantize a 16-bit model while transformers loads it: the way that users of other quantizers know.

    config = mixbits.MixbitsConfig(schemes=["MXFP4", "MXFP8"], avg_bits=4.5)
    model = AutoModelForCausalLM.from_pretrained(SOURCE, quantization_config=config)

There is no calibration text, so nothing is measured and nothing is mixed: every linear takes the
same scheme, the largest of those asked for that fits the budget, and is rounded to nearest. What
`python -m mixbits.quantize` makes of the same budget is better. The result is a packed model like
any that was loaded: it generates, and `save_pretrained` writes what `mixbits.load` reads.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..formats.menus import expanded
from ..formats.pack import check_finite
from ..formats.schemes import Assignment, Recipe, Scheme, parse_scheme
from ..model.layout import CausalLM, LinearInfo, Survey, output_head, survey
from ..planning.plan import average_bits, out_of_range, shown
from ..runtime.linear import PackedLinear
from ..runtime.swap import swap_linears
from ..source.weights import Files, Weights
from .folder import TensorSpec, tied_copies
from .stock import Stock

LEAST_SHARE = 0.5  # of the decoder blocks' weights; with less, a budget is not true of the model
_log = logging.getLogger(__name__)


def parse_schemes(names: Sequence[str], modes: Sequence[Any]) -> list[Scheme]:
    """Schemes to choose from; `modes` are those of MX scales, of weights and of activations.

    Raises UsageError for none, for an unknown one, and for BF16, which packs nothing.
    """
    schemes = [parse_scheme(name, *modes) for name in expanded(names)]
    plain = [scheme.name for scheme in schemes if not scheme.packed]
    if plain or not schemes:
        raise UsageError(f"schemes must name schemes that pack weights: got {plain or 'none'}")
    return schemes


def largest_that_fits(
    linears: Sequence[LinearInfo], schemes: Sequence[Scheme], avg_bits: float
) -> Scheme:
    """The scheme of most bits of which all linears together take at most `avg_bits` per weight.

    Everything that is stored for them counts. Raises UsageError where none does, and for more than
    the largest takes, of which nothing would come.
    """
    names = [info.name for info in linears]
    bits = {s: average_bits(linears, dict.fromkeys(names, Recipe.plain(s))) for s in schemes}
    # A hair more, so that 4.25 bits of a size that is no power of two still buy 4.25 bits.
    fitting = [s for s in schemes if bits[s] <= avg_bits * (1 + 1e-9)]
    if not fitting:
        least = shown(min(bits.values()))
        offered = ", ".join(scheme.name for scheme in schemes)
        raise UsageError(
            f"avg_bits must be at least {least:g}, for one of {offered} in all linears: "
            f"got {avg_bits:g}"
        )
    if avg_bits > shown(max(bits.values())):
        raise out_of_range("avg_bits", min(bits.values()), max(bits.values()), avg_bits)
    return max(fitting, key=bits.__getitem__)


@dataclass
class OnTheFly:
    """A model on its way: checked and planned by its shapes, packed when its weights are there."""

    weights: Weights
    linears: list[LinearInfo]
    scheme: Scheme
    tied: set[str]  # names of tensors that share others' storage, as config.json says
    recipes: Assignment = field(init=False)

    def __post_init__(self) -> None:
        self.recipes = dict.fromkeys((i.name for i in self.linears), Recipe.plain(self.scheme))

    @property
    def stock(self) -> Stock:
        """As of a packed folder: beside the model is what its class does not take."""
        files = self.weights.files
        beside = [
            TensorSpec(n, *files.headers[n], as_stored=True) for n in self.weights.carried_parts
        ]
        return Stock(beside, self.recipes, files, None)

    @torch.no_grad()
    def pack(self, model: CausalLM) -> None:
        """Put packed linears in the place of those that hold weights, one after the other.

        Raises UsageError for a model that is not on one device as a whole, and for weights that
        cannot be packed, or are not finite.
        """
        _check_in_memory(model)
        _untie(model, self.tied - tied_copies(model))

        def make(name: str, weight: Any, bias: nn.Parameter | None) -> nn.Module:
            return PackedLinear.from_weight(weight, self.recipes[name], bias, name)

        swap_linears(model, list(self.recipes), make)  # which looks at what it packs
        for name, tensor in model.state_dict().items():
            check_finite(name, tensor)
        _log.warning(
            "quantized without data: all %d linears in %s, %.4f bits per weight, rounded to "
            "nearest; python -m mixbits.quantize measures which linear needs which scheme",
            len(self.linears),
            self.scheme.name,
            average_bits(self.linears, self.recipes),
        )


def prepare(
    model: CausalLM, files: Sequence[Path], schemes: Sequence[Scheme], avg_bits: float
) -> OnTheFly:
    """What is going to be packed of a model that has shapes only, `files` being its weight files.

    Raises UsageError for a budget out of reach, and for a source that is not plain and whole: a
    class that is a part of it, tensors that are missing, codes without a scale.
    """
    kinds = model.config.architectures or [type(model).__name__]
    if type(model).__name__ not in kinds:
        raise UsageError(
            f"a model is quantized as a whole: load it as {kinds[0]}, not as {type(model).__name__}"
        )
    weights = Weights(model, Files(files), None, model.dtype)
    _check_complete(model, weights, files[0].parent)
    with torch.device("cpu"):  # transformers builds models on the meta device
        found = survey(model)
    _check_share(found)
    scheme = largest_that_fits(found.linears, schemes, avg_bits)
    return OnTheFly(weights, found.linears, scheme, tied_copies(model))


def _check_complete(model: CausalLM, weights: Weights, folder: Path) -> None:
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    missing = [n for n in weights.missing() if n not in tied_copies(model)]
    missing = [n for n in missing if not any(pattern.search(n) for pattern in ignored)]
    if missing:
        raise UsageError(
            f"weights are missing: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} "
            f"({folder})"
        )


def _check_share(found: Survey) -> None:
    ours, others = (sum(one.numel for one in kind) for kind in (found.linears, found.left))
    if ours < LEAST_SHARE * (ours + others):
        first = found.left[0]
        raise UsageError(
            "avg_bits must speak of at least half of the weights in the decoder blocks: got "
            f"{ours / (ours + others):.0%}, for the others are left as they are, such as "
            f"{first.name} of {first.kind}: {first.why}"
        )


def _untie(model: CausalLM, apart: Collection[str]) -> None:
    """Let the configuration say what transformers has found: tensors `apart` that it says are tied.

    Only a head has an option for that. Raises UsageError for others.
    """
    others = sorted(name for name in apart if name != f"{output_head(model)[0]}.weight")
    if others:
        raise UsageError(
            f"{type(model).__name__} shares {others[0]} with another tensor: got other values of "
            f"each ({model.name_or_path})"
        )
    if apart:
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = False


def _check_in_memory(model: nn.Module) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors) or any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise UsageError(
            "a model must be on one device to be quantized while it is loaded: give another "
            "device_map, or use python -m mixbits.quantize"
        )
