"""Let transformers load a packed checkpoint, or quantize a plain one: `from_pretrained`.

transformers builds the model without storage, asks the quantizer to put packed linears where
the configuration names them, and then fills every buffer from the files. It fills what it finds,
and warns of the rest: so the files are checked before. A plain model is packed when it has been
filled, where `MixbitsConfig` asks for that (`mixbits.checkpoint.on_the_fly`).

This is imported as soon as transformers.quantizers is (see mixbits/__init__.py): of transformers,
nothing above that can be imported here but in functions.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UsageError
from ..files.io import read_object, write_text
from ..formats.arrange import check_order
from ..formats.checks import DTYPES
from ..formats.pack import LAYOUTS, layout_number
from ..formats.recipes import parse_recipe
from ..formats.schemas import PackedConfig, check
from ..formats.schemes import Recipe, Scheme
from ..model.layout import shared_inputs
from ..runtime.linear import PackedLinear, packed_linear, share_inputs
from ..runtime.swap import swap_linears
from ..source.model_files import check_folder
from ..source.source import NOT_A_FILE
from .folder import checksum, crc, kinds_of, quantization_config, require_mixbits
from .stock import Stock, check_files
from .unpacking import unpack_model

_UNSAID = "even, of a folder floor"  # the default of act_scale_mode


class MixbitsConfig(QuantizationConfigMixin):
    """What from_pretrained is to quantize to, or how a packed folder is quantized.

    To quantize a plain model while it is loaded, without data:

        MixbitsConfig(schemes=["MXFP4", "MXFP8"], avg_bits=4.5)

    schemes            what to choose from: names, or one string with commas. All linears take the
                       same one, the largest that fits the budget, rounded to nearest: which linear
                       needs which is not known without calibration (`python -m mixbits.quantize`).
    avg_bits           bits per weight of the linears, scales and zero points counted.
    weight_scale_mode  how block maxima of MX weights become powers of two, "floor" by default.
    act_scale_mode     the same of activations, "even" by default.

    All else is `quantization_config` of a packed folder's config.json: `modules` maps linears to
    recipes, as described. Raises UsageError for anything else.
    """

    def __init__(
        self,
        /,
        modules: dict[str, Any] | None = None,
        layout: int | None = None,
        weight_scale_mode: str = "floor",
        act_scale_mode: str = _UNSAID,
        checksum: str | None = None,
        *,
        schemes: str | Sequence[str] | None = None,
        avg_bits: float | None = None,
        **provenance: Any,
    ) -> None:
        self.quant_method = "mixbits"  # type: ignore[assignment]
        is_of_folder = any(given is not None for given in (modules, layout, checksum))
        if not is_of_folder and ("quant_method" not in provenance or schemes or avg_bits):
            unsaid = act_scale_mode == _UNSAID
            modes = weight_scale_mode, "even" if unsaid else act_scale_mode
            self._ask(schemes, avg_bits, modes, provenance.keys() - {"quant_method"})
            return
        for key, value in (("schemes", schemes), ("avg_bits", avg_bits)):
            if value is not None:  # of a folder, it means nothing
                provenance[key] = value
        act_scale_mode = "floor" if act_scale_mode == _UNSAID else act_scale_mode
        provenance.pop("quant_method", None)
        for key, value in provenance.items():
            if hasattr(type(self), key):  # a file must not replace a method
                raise UsageError(f"quantization_config must not have the key {key!r:.80}")
            setattr(self, key, value)
        self.layout = layout
        self.weight_scale_mode, self.act_scale_mode = weight_scale_mode, act_scale_mode
        self.modules = {} if modules is None else modules
        self.checksum = checksum

    def _ask(
        self, schemes: Any, avg_bits: Any, modes: Sequence[str], unknown: Collection[str]
    ) -> None:
        """Be what a user asks for."""
        if unknown:
            raise UsageError(
                "MixbitsConfig takes schemes, avg_bits, weight_scale_mode and act_scale_mode: got "
                f"{min(unknown)!r:.80}"
            )
        names = schemes.split(",") if isinstance(schemes, str) else schemes
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"schemes must be names of schemes: got {schemes!r:.160}")
        is_number = isinstance(avg_bits, int | float) and not isinstance(avg_bits, bool)
        if not is_number or not 0 < avg_bits <= 16:
            raise UsageError(f"avg_bits must be a number of bits, up to 16: got {avg_bits!r:.80}")
        from .on_the_fly import parse_schemes

        self.schemes = [scheme.name for scheme in parse_schemes(names, modes)]
        self.avg_bits = float(avg_bits)
        self.weight_scale_mode, self.act_scale_mode = modes

    def asked(self) -> tuple[list[Scheme], float] | None:
        """Schemes and bits per weight to quantize to; None for what a folder says of itself."""
        if not hasattr(self, "schemes") or hasattr(self, "modules"):
            return None
        from .on_the_fly import parse_schemes

        return parse_schemes(self.schemes, self._modes), self.avg_bits

    @property
    def _modes(self) -> tuple[str, str]:
        return self.weight_scale_mode, self.act_scale_mode

    def get_loading_attributes(self) -> dict[str, Any]:
        """transformers asks what of this would hold for a model that is quantized already."""
        if self.asked() is None:  # as lm-eval hands on what it has read in the folder
            return {}
        raise UsageError(
            "the model is quantized by mixbits already, and quantization_config cannot change it: "
            "pass the original, or leave quantization_config out"
        )

    def recipes(self) -> dict[str, Recipe]:
        """Linear -> recipe; the order of a linear's columns is in the weight files.

        Raises UsageError for a layout or recipes that cannot be read.
        """
        layout = getattr(self, "layout", None)  # what a user asks for has none
        if layout not in LAYOUTS:
            known = " and ".join(map(str, LAYOUTS))
            raise UsageError(
                f"this mixbits reads checkpoints of layouts {known}: got {layout!r:.60}"
            )
        check(PackedConfig, vars(self), "quantization_config of config.json")
        modes: Any = self._modes
        recipes = {name: parse_recipe(value, *modes) for name, value in self.modules.items()}
        if layout != layout_number(recipes.values()):
            raise UsageError(
                f"the schemes of quantization_config are of layout "
                f"{layout_number(recipes.values())}: got {layout!r:.60}"
            )
        plain = [name for name, recipe in recipes.items() if not recipe.packed]
        if plain:
            raise UsageError(
                f"modules of quantization_config must be packed: {plain[0]!r:.160} is not"
            )
        return recipes


class MixbitsQuantizer(HfQuantizer):
    """Puts `PackedLinear` and `Experts` into a model that transformers is about to fill.

    Or into one that it has filled, of a source that is plain.
    """

    stock: Stock
    shared_inputs: list[list[str]]
    on_the_fly: Any = None  # an OnTheFly, between the files' headers and their values

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of activations, unless packed linears cannot take it."""
        if dtype not in DTYPES:
            raise UsageError(f"dtype must be bfloat16, float16 or float32: got {dtype}")
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that sees the configuration: what refuses it without mixbits is taken away."""
        if getattr(config, "transformers_weights", None) == NOT_A_FILE:
            del config.transformers_weights
        return config

    update_tp_plan = update_attn_implementation  # transformers 5.17 asks by this name

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config: Any = self.quantization_config
        recipes = {} if self._asked else config.recipes()
        if checkpoint_files is None:
            raise UsageError("a packed model is loaded from its folder, not from a state dict")
        files = [Path(f) for f in checkpoint_files]
        if self._asked:
            from .on_the_fly import prepare

            self.on_the_fly = prepare(model, files, *self._asked)
            self.stock = self.on_the_fly.stock
            self.shared_inputs = shared_inputs(model, self.stock.recipes)
            self._expect(model)
            return
        self.stock = check_files(model, recipes, files, config.to_dict())
        recipes = dict(self.stock.recipes)

        def make(name: str, weight: Any, bias: nn.Parameter | None) -> nn.Module:
            return packed_linear(weight, recipes[name], bias)

        self.shared_inputs = shared_inputs(model, recipes)
        swap_linears(model, list(recipes), make)
        self._expect(model)

    def _expect(self, model: Any) -> None:
        """Keep transformers from warning of tensors that are beside the model, or come later."""
        left = self.stock.left
        beside = [spec.name for spec in self.stock.specs if spec.as_stored]
        later = [] if left is None else list(left.groups)
        for names, kept in (
            (beside, model._keys_to_ignore_on_load_unexpected),
            (later, model._keys_to_ignore_on_load_missing),
        ):
            kept.update(f"^{re.escape(name)}$" for name in names)

    @property
    def _asked(self) -> tuple[list[Scheme], float] | None:
        """What a plain source is to be quantized to. Raises UsageError where that is not said."""
        config: Any = self.quantization_config
        if self.pre_quantized:
            return None
        asked: tuple[list[Scheme], float] | None = config.asked()
        if asked is None:
            raise UsageError("a plain model is quantized to schemes and avg_bits: got neither")
        return asked

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.on_the_fly is not None:
            self._pack(model)
        for name, module in model.named_modules():
            order = module.order if isinstance(module, PackedLinear) else None
            if order is not None and not order.is_meta:  # on disk, where weights are offloaded
                check_order(order, module.in_features, f"{name}.order", f" ({model.name_or_path})")
        self._fill(model)
        # Files have the model's own names; those of the source stand beside them as they are. So
        # nothing is renamed back when it is saved (None would mean transformers' own rules).
        model._weight_conversions = []
        share_inputs(model, self.shared_inputs)
        count_packed(model)
        # As for `num_parameters`, a partial.
        model.save_pretrained = functools.partial(_save_pretrained, model)
        use_fast_steps(model)

    def _pack(self, model: Any) -> None:
        """Pack a plain model, which from now on is as one that was loaded packed."""
        config: Any = self.quantization_config
        self.on_the_fly.pack(model)
        facts = {
            "weight_scale_mode": config.weight_scale_mode,
            "act_scale_mode": config.act_scale_mode,
            "rounding": {"method": "rtn"},
        }
        if self.stock.specs:
            facts["carried"] = [spec.name for spec in self.stock.specs]
        said = quantization_config(self.stock.recipes, facts)
        self.quantization_config = model.config.quantization_config = MixbitsConfig(**said)
        self.on_the_fly, self.pre_quantized = None, True

    def _fill(self, model: Any) -> None:
        """Make plain what the source's own quantization has been left to."""
        left = self.stock.left
        if left is None:
            return
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        for name in left.groups:
            if state[name].is_meta:
                raise UsageError(f"weights that are stored quantized cannot be offloaded: {name}")
            # transformers 5.17 may have put codes of 8 bits there, in their own type.
            kind = state[name].dtype if state[name].dtype in DTYPES else model.config.dtype
            state[name].data = left.tensor(name).to(state[name].device, kind)

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The model's tensors and those beside them, of the types that they have by now.

        Raises UsageError for a part of a checkpoint, and where files that the model was loaded from
        are needed, and gone.
        """
        if self.stock.is_part:
            raise UsageError(
                f"{type(model).__name__} is a part of the checkpoint: to save all of it, load it "
                "with mixbits.load, or by its own class"
            )
        config: Any = self.quantization_config
        tied: Any = model.all_tied_weights_keys
        left = set() if self.stock.left is None else set(self.stock.left.groups)
        state = {n: t for n, t in model.state_dict().items() if n not in tied and n not in left}
        config.dtypes = kinds_of(state, self.stock.recipes, model.dtype)
        if not config.dtypes:
            del config.dtypes
        self._check_unchanged(model, left)
        beside = [spec.name for spec in self.stock.specs if spec.as_stored]
        state |= {name: self.stock.files.read(name) for name in beside}
        crcs = [crc(name, value) for name, value in state.items()]
        config.checksum = checksum(crcs, config.to_dict())
        return state, {}

    def _check_unchanged(self, model: Any, left: Collection[str]) -> None:
        """Raises UsageError for weights that are stored as the source's, and are so no more."""
        state = model.state_dict() if left else {}
        for name in left:
            assert self.stock.left is not None
            stored = self.stock.left.tensor(name).to(state[name].dtype)
            if not torch.equal(state[name].cpu(), stored):
                raise UsageError(
                    f"a weight that is stored as the source has quantized it must stay that: "
                    f"{name} was changed, and cannot be saved"
                )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """What `model.dequantize()` calls: the model with plain weights. Raises UsageError."""
        unpack_model(model, model.dtype if dtype is None else dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed linears are; Trainer refuses a model that has none."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


# Not by their decorators, which refuse a second time: this module may be reloaded.
AUTO_QUANTIZATION_CONFIG_MAPPING["mixbits"] = MixbitsConfig
AUTO_QUANTIZER_MAPPING["mixbits"] = MixbitsQuantizer
# Of these, transformers asks an argument that comes with a quantized model what it is for; of
# others it only warns that they have no effect.
_asked_kinds: Any = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, MixbitsConfig)
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = _asked_kinds


def _save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """As of transformers, whose config.json would lack what refuses it without mixbits."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    path = Path(save_directory) / "config.json"
    if path.is_file() and (config := read_object(path)).get("quantization_config"):
        require_mixbits(config)
        write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def count_packed(model: nn.Module) -> None:
    """Let `num_parameters` count packed weights, which are buffers, as what they stand for."""
    for part in model.modules():
        if hasattr(part, "num_parameters"):
            # A partial, which copies and pickles take along with the model; no bound method is.
            part.num_parameters = functools.partial(_num_parameters, part)  # type: ignore[assignment]


def _num_parameters(
    model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As of transformers; packed weights are never trainable, and no embeddings."""
    plain: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    packed = (m for m in model.modules() if isinstance(m, PackedLinear))
    return plain + (0 if only_trainable else sum(m.in_features * m.out_features for m in packed))


def use_fast_steps(model: Any) -> None:
    """What makes `generate` fast, for a model that is on one device as a whole."""
    kinds = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if kinds == {torch.device("cpu")}:
        from ..runtime.attention import use_grouped_attention
        from ..runtime.pages import use_large_pages
        from ..runtime.token_step import use_token_step

        use_grouped_attention(model)
        use_token_step(model)
        use_large_pages(model)
    elif len(kinds) == 1 and kinds.pop().type == "cuda":
        from ..runtime.graphs import use_graphs

        use_graphs(model)


def read_config(folder: Path) -> MixbitsConfig:
    """The quantization_config of a checkpoint folder. Raises UsageError if it is none of ours.

    And if a file is not to be read (`model_files`), or says what none of ours does (`schemas`).
    """
    check_folder(folder)
    found = read_object(folder / "config.json").get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "mixbits":
        raise UsageError(
            f"{folder} is no mixbits checkpoint: config.json has no quant_method mixbits"
        )
    try:
        config = MixbitsConfig(**found)
        config.recipes()
    except UsageError as error:
        raise UsageError(f"{error} ({folder})") from error
    return config
