"""One new token of one sequence through a whole model, in one call of the native CPU library.

transformers runs a step as some five hundred small torch operations around the linears. For a
model whose every part is known here (Llama, Mistral, Qwen2, Qwen3; linears packed in any schemes,
or left alone) the library does all of them in one go, rounds where they do, and appends keys and
values to the cache in place.

`use_token_step` puts itself before the `forward` of a model. Whatever is not one plain step of
such a model goes on to the model's own `forward`, as if nothing had been there; only its cache
grows in place, too.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable
from itertools import repeat
from operator import contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import ops
from ..backends import cpu
from ..backends.choice import requested_backend
from ..formats import checks
from ..formats.pack import packed_spec
from ..model.families import family_of
from . import attention
from .cache import growing_layers
from .linear import PackedLinear, Segment, content_of

_NAME = "_mixbits_token_step"


class UnknownPart(Exception):
    """A model has a part that the native step does not know."""


def _require(condition: object, what: str) -> None:
    if not condition:
        raise UnknownPart(what)


class Angles:
    """cos and sin of a model's own rotary embedding, for many positions at a time.

    Those of most kinds depend on the position only. The others change with what they are asked:
    every step asks a copy that belongs to its thread, as several may step through one model.
    """

    _BY_POSITION = ("default", "linear", "llama3", "yarn")

    def __init__(self, rotary: Any, like: Tensor) -> None:
        self._rotary, self._like = rotary, like[:0]
        self._thread = threading.local()
        self.count = 256 if rotary.rope_type in self._BY_POSITION else 1
        self._block: tuple[object, Tensor, Tensor] | None = None
        self.width = self._make(self._own_rotary(), 0)[0].shape[-1]

    def _make(self, rotary: Any, block: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(self.count)[None] + block * self.count
        cos, sin = rotary(self._like, positions)
        return cos.contiguous(), sin.contiguous()

    def at(self, position: int) -> tuple[Tensor, Tensor, int]:
        """cos and sin [1, positions, head width], and how many bytes in a position's row begins.

        They are the caller's to keep while it reads them: another thread may have others made.
        """
        number, row = divmod(position, self.count)
        if self.count == 1:
            return *self._make(self._own_rotary(), number), 0
        rotary = self._rotary
        key = number, rotary.attention_scaling, content_of(rotary.inv_freq)
        block = self._block
        if block is None or block[0] != key:
            block = self._block = (key, *self._make(rotary, number))
        _, cos, sin = block
        return cos, sin, row * self.width * cos.element_size()

    def _own_rotary(self) -> Any:
        key = content_of(self._rotary.original_inv_freq)
        own: tuple[object, Any] | None = getattr(self._thread, "rotary", None)
        if own is None or own[0] != key:
            own = self._thread.rotary = (key, copy.deepcopy(self._rotary))
        return own[1]


class NativeModel:
    """A model as the native library sees it, and what must not change for that to hold.

    Raises UnknownPart for a model that is not made of known parts alone.
    """

    def __init__(self, model: Any) -> None:
        self.family = family_of(model.config)
        kind = self.family.native_step
        _require(kind is not None, "the model")
        assert kind is not None
        self.prefix = f"transformers.models.{kind.lower()}.modeling_{kind.lower()}.{kind}"
        self._require_class(model, "ForCausalLM")
        self.dtype = model.model.embed_tokens.weight.dtype
        _require(self.dtype in cpu.DTYPE_NUMBERS, "the dtype")
        self.changes = PackedLinear.changes
        # Of all that must stay: dictionaries, keys, and the objects that are there.
        self.owners: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.objects: list[Any] = []
        self.parameters: list[Tensor] = []
        self.storages: list[Any] = []  # were they freed, a mistake here would read anything
        self.bound = self._describe(model)
        self.addresses = [tensor.data_ptr() for tensor in self.parameters]
        modules = list(model.modules())
        for module in modules:
            self._keep(module._modules, *module._modules)
        inner = modules[1:]
        self.own = [vars(m) for m in inner]
        # Layers and attentions act otherwise while they are trained; no other module here does.
        self.modes = [vars(m) for x in model.model.layers for m in (x, x.self_attn)]
        self.hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]

    def _keep(self, owner: dict[str, Any], *names: str) -> None:
        self.owners += repeat(owner, len(names))
        self.names += names
        self.objects += [owner[name] for name in names]

    # --- what the model is ---------------------------------------------------------------------

    def _require_class(self, module: object, suffix: str) -> None:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        _require(name == self.prefix + suffix, suffix)

    def _describe(self, model: Any) -> Any:
        config, inner = model.config, model.model
        for module, suffix in ((inner, "Model"), (inner.rotary_emb, "RotaryEmbedding")):
            self._require_class(module, suffix)
        embedding = inner.embed_tokens
        _require(type(embedding) is nn.Embedding and embedding.max_norm is None, "the embedding")
        _require(getattr(config, "sliding_window", None) is None, "a sliding window")
        _require(len(inner.layers) == config.num_hidden_layers, "some layers only")
        attentions = [layer.self_attn for layer in inner.layers]
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        self.width = attentions[0].head_dim
        self.shape = 2 * (((1, keys), self.width, self.dtype, "cpu"),)
        _require(self.width % 2 == 0, "heads of odd width")
        _require(heads % keys == 0, "groups of unequal size")
        _require(
            {(a.head_dim, a.scaling) for a in attentions} == {(self.width, self.width**-0.5)},
            "the scaling",
        )
        sizes = (config.hidden_size, config.intermediate_size, keys, heads // keys, self.width)
        self._tensor(embedding._parameters, "weight", (embedding.num_embeddings, sizes[0]))
        self.embeddings = embedding.weight
        self.angles = self._angles(inner.rotary_emb)
        self.vocab = model.lm_head.out_features
        _require(model.lm_head.bias is None, "the head's bias")
        return cpu.step_model(
            [self._layer_norms(layer, config) for layer in inner.layers],
            [self._layer_linears(layer, sizes) for layer in inner.layers],
            self._norm(inner.norm, config, config.hidden_size),
            self._linear(model.lm_head, (self.vocab, config.hidden_size)),
            sizes,
            config.rms_norm_eps,
            self.dtype,
        )

    def _angles(self, rotary: Any) -> Angles:
        angles = Angles(rotary, self.embeddings)
        _require(angles.width == self.width, "a partial rotation")
        return angles

    def embedding_address(self, token: int) -> int:
        row_bytes = self.embeddings.shape[1] * self.embeddings.element_size()
        return int(self.embeddings.data_ptr()) + token * row_bytes

    def _layer_norms(self, layer: Any, config: Any) -> list[int]:
        self._require_class(layer, "DecoderLayer")
        self._require_class(layer.self_attn, "Attention")
        self._require_class(layer.mlp, "MLP")
        _require(type(layer.mlp.act_fn) is type(ACT2FN["silu"]), "an activation")
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        _require((heads[0] is None) == (heads[1] is None), "the norms of heads")
        pointers = [self._norm(norm, config, config.hidden_size) for norm in norms]
        return pointers + [0 if n is None else self._norm(n, config, self.width) for n in heads]

    def _norm(self, norm: Any, config: Any, size: int) -> int:
        self._require_class(norm, "RMSNorm")
        _require(norm.variance_epsilon == config.rms_norm_eps, "a norm's epsilon")
        return self._tensor(norm._parameters, "weight", (size,))

    def _layer_linears(self, layer: Any, sizes: tuple[int, ...]) -> list[list[int]]:
        hidden, inner, keys, group, width = sizes
        queries = keys * group * width
        shapes = [(queries, hidden), *2 * [(keys * width, hidden)], (hidden, queries)]
        shapes += [*2 * [(inner, hidden)], (hidden, inner)]
        family = self.family
        linears = [getattr(layer.self_attn, name) for name in family.attention]
        linears += [getattr(layer.mlp, name) for name in (*family.ffn_inputs, family.ffn_output)]
        return [self._linear(*entry) for entry in zip(linears, shapes, strict=True)]

    def _linear(self, linear: Any, shape: tuple[int, int]) -> list[int]:
        """A linear [N, K] in the numbers of `backends.cpu.step_model`."""
        _require((linear.out_features, linear.in_features) == shape, "a linear's shape")
        has_bias = linear.bias is not None
        bias = self._tensor(linear._parameters, "bias", shape[:1]) if has_bias else 0
        if type(linear) is nn.Linear:
            self._tensor(linear._parameters, "weight", shape)
            return [bias, 0, *cpu.plain_numbers(linear.weight)]
        _require(type(linear) is PackedLinear, "a linear's class")
        if linear.has_segments:
            self._order(linear)
            _require(all(type(part) is Segment for part in linear.parts), "a linear's class")
        _require(linear.backend in (None, "cpu"), "a linear's backend")
        try:  # what is wrong is said where a linear is called
            linear.checked(torch.device("cpu"))
        except (TypeError, ValueError) as error:
            raise UnknownPart("a linear's tensors") from error
        for part in linear.parts:
            for name in packed_spec(part.format, *shape):
                self._keep(part._buffers, name)
                tensor = part.get_buffer(name)
                self.parameters.append(tensor)
                self._buffer(tensor)
        used = {*ops.weights_of([linear.operand]), *ops.activations_of([linear.operand])}
        _require(all(map(cpu.holds, used)), "a linear's format")
        numbers = cpu.linear_numbers(linear.operand)
        return [bias, int(linear.int8_activations), *numbers]

    def _order(self, linear: PackedLinear) -> None:
        self._keep(vars(linear) if linear.order is None else linear._buffers, "order")
        if linear.order is not None:
            self.parameters.append(linear.order)
            self._buffer(linear.order)

    def _tensor(self, owner: dict[str, Any], name: str, shape: tuple[int, ...]) -> int:
        """The address of a tensor that must have this shape and the model's dtype."""
        tensor = owner[name]
        _require((tensor.shape, tensor.dtype) == (shape, self.dtype), f"a {name}")
        self._keep(owner, name)
        self.parameters.append(tensor)
        return self._buffer(tensor)

    def _buffer(self, tensor: Tensor) -> int:
        is_there = tensor.device.type == "cpu" and checks.is_in_memory(tensor)
        _require(is_there, "a tensor's memory")
        checks.keep_size([tensor])
        self.storages.append(tensor.untyped_storage())
        return int(tensor.data_ptr())

    # --- whether it still is ---------------------------------------------------------------------

    # A model has thousands of these objects, and every step asks about all of them: `map` and the
    # functions of `operator` take a fraction of the time of a loop in Python.

    def is_current(self) -> bool:
        """Whether the model's modules, tensors and settings are those that were described."""
        try:
            found = map(getitem, self.owners, self.names)
            return (
                PackedLinear.changes == self.changes
                and all(map(is_, found, self.objects))
                and list(map(Tensor.data_ptr, self.parameters)) == self.addresses
            )
        except KeyError:
            return False

    def is_observed(self) -> bool:
        """Whether somebody listens to the modules, has replaced their call, or trains them."""
        return (
            any(self.hooks)
            or any(map(contains, self.own, repeat("forward")))
            or any(map(getitem, self.modes, repeat("training")))
        )

    def needs_gradient(self) -> bool:
        return any(tensor.requires_grad for tensor in self.parameters)


class TokenStep:
    """What stands before a model's `forward`. A copy of a model gets one of its own."""

    def __init__(self) -> None:
        self._native: NativeModel | None = None
        self._is_unknown = False

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenStep:
        return TokenStep()

    def __reduce__(self) -> Any:
        return TokenStep, ()

    def native(self, model: Any) -> NativeModel | None:
        """A model as it is now, or None. One that is unknown is not tried again."""
        if self._native is not None and not self._native.is_current():
            self._native = None
        if self._native is None and not self._is_unknown:
            try:
                self._native = NativeModel(model)
            except (UnknownPart, AttributeError):
                self._is_unknown = True
        return self._native

    def __call__(
        self,
        model: Any,
        input_ids: Any = None,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        logits_to_keep: Any = 0,
        return_dict: Any = None,
        tokenizer: Any = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | None:
        """The result of a step, or None for the model to find it.

        `generate` hands the tokenizer that it looks for stop strings with to every step: no part
        of a model that is known here reads it.
        """
        if torch.compiler.is_compiling() or type(input_ids) is not Tensor:
            return None
        if input_ids.shape[-1] != 1:
            self._is_unknown = False  # a prompt: the model may be another by now
            return None
        layers = growing_layers(past_key_values)
        if not layers or input_ids.shape != (1, 1) or any(map(_is_given, others.values())):
            return None
        keeps_last = type(logits_to_keep) is int and logits_to_keep in (0, 1)
        if use_cache is False or return_dict is False or not keeps_last:
            return None
        if not _is_plain(model):
            return None
        native = self.native(model)
        if native is None or native.is_observed():
            return None
        if torch.is_grad_enabled() and (
            native.needs_gradient() or any(layer.needs_gradient() for layer in layers)
        ):
            return None
        length = layers[0].get_seq_length()
        if not _is_all_ones(attention_mask, length + 1) or not _is_ready(native, layers, length):
            return None
        token, position = int(input_ids), _position(position_ids, length)
        if not 0 <= token < len(native.embeddings) or position < 0:
            return None
        logits = _run(native, token, position, layers, length)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def _is_given(argument: object) -> bool:
    return argument is not None and argument is not False


def _is_plain(model: Any) -> bool:
    """Whether nothing but the next token's logits is asked for, from the kernels of the CPU."""
    config = model.config
    return (
        not model.training
        and config._attn_implementation in ("sdpa", attention.NAME)
        and not (config.output_attentions or config.output_hidden_states)
        and config.use_cache is not False
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._get_tracing_state()
        and ops.choose_backend("cpu", requested_backend(None)) == "cpu"
    )


def _is_all_ones(mask: Any, length: int) -> bool:
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.shape == (1, length) and bool(mask.all())


def _position(position_ids: Any, length: int) -> int:
    """The position of the new token; -1 if it is not one number."""
    if position_ids is None:
        return length
    is_one = isinstance(position_ids, Tensor) and position_ids.shape == (1, 1)
    return int(position_ids) if is_one and not position_ids.is_floating_point() else -1


def _is_ready(native: NativeModel, layers: list[Any], length: int) -> bool:
    """Whether every layer has room for one more token, behind `length` tokens of this model."""
    return length > 0 and all(
        layer.get_seq_length() == length and layer.make_room(1).kind == native.shape
        for layer in layers
    )


def _run(native: NativeModel, token: int, position: int, layers: list[Any], length: int) -> Tensor:
    """Logits [1, 1, vocab] of what follows a token; the caches hold it from then on."""
    logits = torch.empty((1, 1, native.vocab), dtype=native.dtype)
    caches = [number for layer in layers for number in layer.make_room(1).address]
    cos, sin, start = native.angles.at(position)
    inputs = (native.embedding_address(token), cos.data_ptr() + start, sin.data_ptr() + start)
    cpu.token_step(native.bound, *inputs, logits, length, caches)
    for layer in layers:
        layer.grow(1)
    return logits


@functools.cache
def _forward_of(cls: Any) -> Callable[..., Any]:
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = vars(self)[_NAME](self, *args, **kwargs) if len(args) < 2 else None
        return original(self, *args, **kwargs) if out is None else out

    return forward


def use_token_step(model: Any) -> None:
    """Let a model of transformers take the native step where it can; others are left alone."""
    if cpu.why_unavailable() is None:
        cls: Any = type(model)
        setattr(model, _NAME, TokenStep())
        model.forward = types.MethodType(_forward_of(cls), model)
