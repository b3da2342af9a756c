"""Linears, experts and routers of code that comes with a model: known by what they do."""

from pathlib import Path

import pytest
import torch
from small_models import IDS, distance, left, llama, names, shapes, small
from tiny import VOCAB
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mixbits.errors import UsageError
from mixbits.formats.schemes import parse_scheme
from mixbits.measuring.sensitivity import measure
from mixbits.model.layout import find_linears, survey
from mixbits.model.streaming import StreamedModel
from mixbits.model.units import make_units
from mixbits.report.coverage import Coverage
from mixbits.runtime.swap import PlainLinear, swap_linears


class GainLinear(nn.Linear):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(columns, rows, bias=False)
        self.gain = nn.Parameter(torch.ones(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


class HalvedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class SpelledLinear(nn.Linear):
    """What nn.Linear computes, in other words."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("...k,nk->...n", x, self.weight)
        return y if self.bias is None else y + self.bias


class NamedLinear(nn.Linear):
    """nn.Linear by another name."""


class Adapted(nn.Module):
    """As adapters wrap a linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(torch.zeros(4, base.in_features))
        self.weight = base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + (x @ self.down.T).sum()


DOWN = "model.layers.0.mlp.down_proj"


def replaced(make: object) -> nn.Module:
    model = llama()
    model.model.layers[0].mlp.down_proj = make(model.model.layers[0].mlp.down_proj)
    return model


STRANGE = {
    "gain": lambda old: GainLinear(64, 96),
    "halved": lambda old: HalvedLinear(96, 64, bias=False),
    "weight norm": lambda old: nn.utils.parametrizations.weight_norm(old),
    "old weight norm": lambda old: nn.utils.weight_norm(old),
    "spectral norm": lambda old: nn.utils.parametrizations.spectral_norm(old),
    "adapter": Adapted,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", STRANGE)
def test_a_linear_that_does_more_is_left_alone(name: str) -> None:
    model = replaced(STRANGE[name])
    found = survey(model)
    assert DOWN not in {i.name for i in found.linears}
    assert any(one.name.startswith(f"{DOWN}.") for one in found.left)
    assert len(found.linears) == 13


@pytest.mark.parametrize("kind", [NamedLinear, SpelledLinear])
def test_a_linear_of_another_class_that_does_the_same_is_quantized(kind: type) -> None:
    assert DOWN in names(replaced(lambda old: kind(96, 64)))


def test_hooks_and_ties_make_a_linear_more_than_that() -> None:
    model = llama()
    first, second = model.model.layers
    first.mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2)
    first.self_attn.q_proj.register_forward_pre_hook(lambda module, args: args)
    second.self_attn.v_proj.weight = second.self_attn.k_proj.weight
    second.mlp = first.mlp
    gone = ["0.mlp.up_proj", "0.self_attn.q_proj", "1.self_attn.v_proj", "1.self_attn.k_proj"]
    gone += ["0.mlp.gate_proj", "0.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.down_proj"]
    assert not {f"model.layers.{name}" for name in gone} & names(model)
    assert "model.layers.1.self_attn.o_proj" in names(model)


def test_a_weight_that_other_code_reads_is_left_alone() -> None:
    assert left(shapes("mamba"))["0.mixer.dt_proj.weight"].startswith("their weights are used by")

    model = llama()
    attention = model.model.layers[1].self_attn
    attention.__class__ = Absorbing
    assert "model.layers.1.self_attn.o_proj" not in names(model)
    assert "model.layers.0.self_attn.o_proj" in names(model)
    assert "model.layers.1.self_attn.q_proj" in names(model)  # of which it asks the dtype only


class Absorbing(LlamaAttention):
    """Multiplies with the weight of its o_proj itself, after it was called."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> object:
        out, weights = super().forward(hidden_states.to(self.q_proj.weight.dtype), **kwargs)
        return out @ self.o_proj.weight.mT, weights


class Clamped(MixtralExperts):
    """The usual names, shapes and act_fn, but another formula."""

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, slot = torch.where(index == e)
            both = nn.functional.linear(x[token], self.gate_up_proj[e])
            y = self.product(*both.chunk(2, -1))
            y = nn.functional.linear(y, self.down_proj[e]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)


class Plain(Clamped):
    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate.float()).to(up.dtype) * up


class Turned(Clamped):
    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(up) * gate


class Normed(Clamped):
    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y = self.act_fn(gate) * up
        return y / y.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()


class Identity(Plain):
    """Experts beyond the last give a token back as it is."""

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = super().forward(x, index.clamp(max=len(self.down_proj) - 1), weights)
        return out + x * (index >= len(self.down_proj)).any(-1, keepdim=True)


class Interleaved(Plain):
    """Its own way to take gate and up apart."""

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        return torch.tanh(both[..., ::2]) * both[..., 1::2]

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, slot = torch.where(index == e)
            y = self._apply_gate(nn.functional.linear(x[token], self.gate_up_proj[e]))
            y = nn.functional.linear(y, self.down_proj[e]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def with_experts(kind: type) -> nn.Module:
    model = small("mixtral")
    for layer in model.model.layers:
        own = kind(model.config).bfloat16()
        own.load_state_dict(layer.mlp.experts.state_dict())
        layer.mlp.experts = own
    return model


@pytest.mark.parametrize("kind", [Clamped, Turned, Normed, Identity])
def test_experts_of_another_formula_are_left_alone(kind: type) -> None:
    found = survey(with_experts(kind))
    assert not any(i.is_expert for i in found.linears)
    said = Coverage(found).lines(lambda one: 2 * one.numel)
    assert any(f"4 tensors of {kind.__name__}" in line and "formula" in line for line in said)
    with pytest.raises(UsageError, match=f"at least half .* got .*{kind.__name__}"):
        Coverage(found).check("a budget")
    Coverage(found, ["*.experts"]).check("a budget")


@torch.no_grad()
@pytest.mark.parametrize("kind", [Plain, Interleaved])
def test_experts_of_the_same_results_are_ours(kind: type) -> None:
    """As PlainLinears, through the one loop, they give what their own code gives."""
    model = with_experts(kind).float()
    found = [i.name for i in find_linears(model) if i.is_expert]
    assert len(found) == 24
    before = model(IDS).logits
    swap_linears(model, found, lambda name, weight, bias: PlainLinear(weight, bias))
    assert distance(model(IDS).logits, before) < 1e-5


class Mlp(nn.Module):
    """A gated MLP with something between its up and its down."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, 96) for _ in range(2))
        self.down_proj = nn.Linear(96, 64)
        self.between = between
        self.scale = nn.Parameter(torch.ones(96)) if between == "scale" else None
        self.norm = nn.LayerNorm(96) if between == "norm" else nn.Identity()
        self.register_buffer("mask", torch.ones(96) if between == "mask" else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        y = y if self.scale is None else y * self.scale
        y = y if self.mask is None else y * self.mask
        if self.between == "constant":
            y = torch.cat([y[..., :48], y[..., 48:] * 2], -1)
        elif self.between == "neighbours":
            y = y + y.roll(1, -1)
        elif self.between == "root mean square":
            y = y / y.pow(2).mean(-1, keepdim=True).sqrt()
        return self.down_proj(y)


FOLDS = {"nothing": True, "root mean square": True, "scale": False, "norm": False}
FOLDS |= {"mask": False, "constant": False, "neighbours": False}


@pytest.mark.parametrize(("between", "folded"), FOLDS.items())
def test_what_stands_between_gate_and_down_decides_on_folding(between: str, folded: bool) -> None:
    model = llama()
    model.model.layers[1].mlp = Mlp(between).bfloat16()
    makers = {i.name: i.makers for i in find_linears(model)}
    prefix = "model.layers.1.mlp"
    wanted = (f"{prefix}.gate_proj", f"{prefix}.up_proj") if folded else ()
    assert makers[f"{prefix}.down_proj"] == wanted
    assert makers[DOWN] == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


class Experts(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__(Mlp("nothing") for _ in range(6))


class Block(nn.Module):
    """Experts in a list, the first of them idle; a router of any name, and a gate of width one."""

    def __init__(self, router: str) -> None:
        super().__init__()
        self.router_name = router
        self.experts, self.shared = Experts(), Mlp("nothing")
        self.add_module(router, nn.Linear(64, 6, bias=False))
        self.weigh = nn.Linear(64, 1, bias=False)
        self.gate = nn.Linear(64, 128)  # of full width: no router
        self.squeeze = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.get_submodule(self.router_name)(x).softmax(-1)
        out = self.shared(x) * self.weigh(x).sigmoid() + self.squeeze(self.gate(x).sigmoid())
        for number in range(1, 6):
            mine = scores[..., number, None]
            out = out + self.experts[number](x) * torch.where(mine > 0.1, mine, 0.0)
        return out


@pytest.mark.parametrize("router", ["gate2", "dispatcher", "switch", "scorer", "router"])
def test_routers_and_experts_of_remote_code(router: str) -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp = Block(router).bfloat16()
    found = survey(model)
    mine = {i.name.removeprefix("model.layers.0.mlp."): i for i in found.linears}
    assert {one.name for one in found.left if ".0.mlp." in one.name} == {
        f"model.layers.0.mlp.{name}.weight" for name in (router, "weigh")
    }
    assert {"gate", "squeeze", "shared.gate_proj", "experts.0.down_proj"} <= mine.keys()
    stem = "model.layers.0.mlp.experts"
    assert mine["experts.0.down_proj"].peers == f"{stem}.*.down_proj"
    assert mine["experts.5.down_proj"].peers == f"{stem}.*.down_proj"
    assert mine["experts.0.down_proj"].among == stem
    assert mine["shared.down_proj"].peers is None


class Noisy(Block):
    """Two routers of one shape, and a shared expert of as many columns as there are experts."""

    def __init__(self) -> None:
        super().__init__("w_gate")
        self.w_noise = nn.Linear(64, 6, bias=False)
        self.shared.gate_proj, self.shared.up_proj = (nn.Linear(64, 6) for _ in range(2))
        self.shared.down_proj = nn.Linear(6, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0 * self.w_noise(x).sum()


def test_routers_are_told_from_small_shared_experts() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp = Noisy().bfloat16()
    found = survey(model)
    routers = {one.name.split(".")[-2] for one in found.left if one.is_router}
    assert routers == {"w_gate", "w_noise", "weigh"}
    assert "model.layers.1.mlp.shared.up_proj" in {i.name for i in found.linears}


def test_an_idle_expert_in_a_list_is_measured_by_its_peers(tmp_path: Path) -> None:
    model = llama().float()
    for layer in model.model.layers:
        layer.mlp = Block("dispatcher")
    linears, scheme = find_linears(model), parse_scheme("W4A16G32")
    ids = torch.arange(64).reshape(2, 32) % VOCAB
    scores = measure(StreamedModel(model), linears, [scheme], ids)
    idle = scores["model.layers.0.mlp.experts.0.up_proj"]["W4A16G32"]
    assert sum(idle) > 0


def test_keys_and_values_are_known_by_their_use() -> None:
    model = llama()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.__class__ = type("Renamed", (type(attention),), {"forward": renamed})
        attention.wk, attention.wv = attention.k_proj, attention.v_proj
        del attention.k_proj, attention.v_proj
    remembered = {i.name for i in find_linears(model) if i.remembered}
    assert remembered == {f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("wk", "wv")}


def renamed(self: nn.Module, hidden_states: torch.Tensor, *_: object, **__: object) -> object:
    q, k, v = (
        linear(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2)
        for linear in (self.q_proj, self.wk, self.wv)
    )
    y = nn.functional.scaled_dot_product_attention(q, k * 2, v, is_causal=True, enable_gqa=True)
    return self.o_proj(y.transpose(1, 2).flatten(2)), None


def test_linears_of_a_unit_read_one_input() -> None:
    infos = find_linears(shapes("llama"))
    other = [i for i in infos if i.name.endswith("k_proj")]
    changed = [type(i)(i.name, i.out_features, 32, i.block) if i in other else i for i in infos]
    for unit in make_units(changed, fuse=True, by_input=True):
        assert len({i.in_features for i in unit.linears}) == 1
