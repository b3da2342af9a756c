"""What families of models call their parts: one entry each, and nothing else knows a name.

What a part *is* shows in what it does (`usage`, `recognise`, `experts`): that decides. Names stand
in where a model's code does not show it, tell other programs which part is meant, and never
overrule what has been tried. So a model of no entry here is quantized, packed and run like any
other; `DEFAULT` has the names that most of transformers' decoders use.

A family of its own is an entry in `FAMILIES`, by `model_type` (docs/add-a-family.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Fused queries, keys and values, and DeepSeek's compressed ones.
_READ_LATER = ("qkv_proj", "query_key_value", "c_attn", "kv_a_proj_with_mqa", "kv_b_proj")


@dataclass(frozen=True)
class Stacks:
    """Parameters that hold all experts of a layer: `joined` gate and up, or `up` alone; `down`."""

    joined: str = "gate_up_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Gguf:
    """llama.cpp's `architecture`, and whether it rotates neighbours in a head, as of Llama.

    `names`: part of a name -> what the gguf package knows it by, which are transformers' names.
    """

    architecture: str
    rotates_neighbours: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Last parts of linears' names, where it does not say otherwise.

    attention      queries, keys, values, and what reads the heads
    ffn_inputs     linears that make what the FFN's last one reads
    ffn_output     the FFN's last linear
    also_shared    more groups of a module's linears that read one input
    read_later     linears whose outputs later tokens read, beside keys and values
    routers        regular expression of parts of names: whatever lies there decides where tokens go
    gates          names of routers, where the shape is one of a router too
    experts        how a layer's experts are called, if they are 3-D parameters
    stored_names   part of a name -> what checkpoints call it; None: not known, so that quantized
                   experts are not exported
    gguf           None: llama.cpp's ways with it are not known
    vllm_names     part of a name, dots and all -> what vLLM's own class of the model calls it
    native_step    transformers' `<native_step>ForCausalLM`, if the native step knows its formulas
    """

    attention: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    ffn_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    ffn_output: str = "down_proj"
    also_shared: tuple[tuple[str, ...], ...] = ()
    read_later: frozenset[str] = frozenset(_READ_LATER)
    routers: str = r".*(router|indexer).*|gating(_network)?|shared_expert_gate"
    gates: frozenset[str] = frozenset({"gate"})
    experts: Stacks = field(default_factory=Stacks)
    stored_names: Mapping[str, str] | None = None
    gguf: Gguf | None = None
    vllm_names: Mapping[str, str] = field(default_factory=dict)
    native_step: str | None = None

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Groups of a module's linears that read one input, the names in the order of a unit's."""
        return self.attention[:3], self.ffn_inputs, *self.also_shared

    def shared_with(self, leaf: str) -> tuple[str, ...]:
        """The group that a linear of this name is in; () for none."""
        return next((group for group in self.shared_inputs if leaf in group), ())

    def is_read_later(self, leaf: str) -> bool:
        """Whether later tokens read the outputs of a linear of this name."""
        return leaf in self.attention[1:3] or leaf in self.read_later

    def stored_name(self, name: str) -> str:
        """What checkpoints, which other loaders read, call what transformers calls `name`."""
        return _replaced(name, self.stored_names or {})

    def gguf_name(self, name: str) -> str:
        """What the gguf package knows `name` by."""
        return name if self.gguf is None else _replaced(name, self.gguf.names)


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


DEFAULT = Family()
FAMILIES: dict[str, Family] = {
    "llama": Family(gguf=Gguf("llama", True), native_step="Llama"),
    "mistral": Family(gguf=Gguf("llama", True), native_step="Mistral"),
    "mixtral": Family(
        stored_names={
            ".mlp.": ".block_sparse_moe.",
            ".gate_proj": ".w1",
            ".up_proj": ".w3",
            ".down_proj": ".w2",
        },
        gguf=Gguf("llama", True),
        vllm_names={".mlp.": ".block_sparse_moe."},
    ),
    "qwen2": Family(gguf=Gguf("qwen2"), native_step="Qwen2"),
    "qwen3": Family(gguf=Gguf("qwen3"), native_step="Qwen3"),
    "qwen3_moe": Family(stored_names={}, gguf=Gguf("qwen3moe")),
}


def family_of(config: Any) -> Family:
    """The entry of a configuration's `model_type`, or what most models have in common."""
    return FAMILIES.get(getattr(config, "model_type", ""), DEFAULT)


def name_from_vllm(name: str) -> str:
    """What transformers calls the module that vLLM's own class of a model calls `name`."""
    for family in FAMILIES.values():
        for ours, theirs in family.vllm_names.items():
            name = f"{name}.".replace(theirs, ours)[:-1]
    return name


def known_stacks() -> Iterator[Stacks]:
    """Every family's names of experts: which a module has shows in its parameters."""
    yield from dict.fromkeys([DEFAULT.experts, *(f.experts for f in FAMILIES.values())])
