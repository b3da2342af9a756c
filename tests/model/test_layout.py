"""Parts of a model are recognised by what they do; the rest is left alone, and said."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from tiny import SMALL, VOCAB, read, write_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import mixbits
from mixbits.errors import UsageError
from mixbits.formats.schemes import parse_scheme
from mixbits.measuring.sensitivity import measure
from mixbits.model import experts, recognise
from mixbits.model.experts import expert_slice
from mixbits.model.layout import (
    find_linears,
    make_units,
    meta_model,
    split_expert_name,
    survey,
    weight_of,
)
from mixbits.model.streaming import StreamedModel
from mixbits.quantize import main
from mixbits.report.coverage import Coverage
from mixbits.runtime.fake import fake_quantize_model
from mixbits.runtime.linear import PackedLinear, PlainLinear, swap_linears
from mixbits.source.source import open_source

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DEEPSEEK = SIZES | LATENT | {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
DEEPSEEK |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
GEMMA3N = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}
GEMMA3N |= {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]}
GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"]}
JETMOE = {k: v for k, v in SIZES.items() if k not in ("num_attention_heads", "head_dim")}
JETMOE |= {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "aria_text": SIZES | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bitnet": SIZES,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK | {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 4},
    "falcon": {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
    "gemma3n_text": SIZES | GEMMA3N,
    "gpt2": {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_oss": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": SIZES | {"num_experts": 4, "moe_topk": 2},
    "jetmoe": JETMOE,
    "llama": SIZES,
    "llama4_text": SIZES
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    "mamba": {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16},
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {k: v for k, v in SIZES.items() if "num_key" not in k and k != "head_dim"}
    | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3_moe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def shapes(kind: str) -> nn.Module:
    return meta_model(AutoConfig.for_model(kind, **KINDS[kind]))


def small(kind: str, seed: int = 0, **more: object) -> nn.Module:
    """A model of random weights, large enough for rounding to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **KINDS[kind], **more)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.06)
                elif "bias" in name or "norm" in name:
                    parameter.uniform_(0.3, 1.7)
    return model


def left(model: nn.Module) -> dict[str, str]:
    """What is left alone in the first and second block, and why."""
    return {one.name.split(".", 2)[2]: one.why for one in survey(model).left}


ROUTERS = {
    "aria_text": ["mlp.router"],
    "deepseek_v3": ["mlp.gate"],
    "deepseek_v32": ["mlp.gate", "indexer.wq_b", "indexer.wk", "indexer.weights_proj"],
    "gemma3n_text": ["altup.modality_router"],
    "gpt_oss": ["mlp.router"],
    "hunyuan_v1_moe": ["mlp.gate.wg"],
    "jetmoe": ["mlp.router.layer", "self_attention.experts.router.layer"],
    "llama4_text": ["feed_forward.router"],
    "mixtral": ["mlp.gate"],
    "qwen3_moe": ["mlp.gate"],
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_of_any_name_are_left_alone(kind: str) -> None:
    found = survey(shapes(kind))
    routers = {one.name for one in found.left if one.is_router}
    expected = [name for name in ROUTERS[kind] if any(f".{name}.weight" in n for n in routers)]
    assert expected == ROUTERS[kind]
    assert not {i.name for i in found.linears} & {n.removesuffix(".weight") for n in routers}


@pytest.mark.parametrize("kind", ["llama", "bitnet", "falcon"])
def test_what_is_no_router_is_quantized(kind: str) -> None:
    assert survey(shapes(kind)).left == []


EXPERTS = {
    "aria_text": (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96))),
    "gpt_oss": (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96))),
    "llama4_text": (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96))),
    "mixtral": (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96))),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_of_every_known_way_are_split_into_linears(kind: str) -> None:
    linears = [i for i in find_linears(shapes(kind)) if i.is_expert]
    assert len(linears) == 2 * 4 * 3
    found = {i.name.rpartition(".")[2]: (i.out_features, i.in_features) for i in linears}
    assert found == dict(EXPERTS[kind])


def test_rows_of_gpt_oss_are_those_of_its_checkpoints() -> None:
    """Even rows of a published expert are its gate, odd ones its up; stored here as columns."""
    model = small("gpt_oss")
    own = model.model.layers[1].mlp.experts
    infos = {i.name: i for i in find_linears(model)}
    prefix = "model.layers.1.mlp.experts.2"
    published = own.gate_up_proj[2].T
    for name, rows in (("gate_proj", published[::2]), ("up_proj", published[1::2])):
        assert torch.equal(weight_of(model, infos[f"{prefix}.{name}"]), rows)
    assert torch.equal(weight_of(model, infos[f"{prefix}.down_proj"]), own.down_proj[2].T)


def quantized(folder: Path, kind: str, *options: str, **more: object) -> tuple[nn.Module, Path]:
    model = small(kind, **more)
    model.save_pretrained(folder / "model")
    dataset = str(write_ids(folder / "ids.npy"))
    command = [str(folder / "model"), "--dataset", dataset, *SMALL, "--out", str(folder / "out")]
    assert main([*command, "--rounding", "rtn", *options]) == 0
    return model, folder / "out"


IDS = torch.arange(24).reshape(2, 12) * 5 % VOCAB


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "aria_text"])
def test_unusual_experts_are_packed_and_run(kind: str, tmp_path: Path) -> None:
    """To the byte of the predicted size; the packed model is its linears rounded in place."""
    options = "--schemes", "W4A16G32,W8A16G32", "--avg-bits", "6.5", "--per-expert"
    _, out = quantized(tmp_path, kind, *options)
    report = read(out / "report.json")
    assert report["bytes_after"] == report["reached"]["predicted_bytes"]
    assert not [row for row in report["left_alone"] if not row["is_router"]]
    packed = mixbits.load(out, dtype=torch.float32)
    twin = open_source(str(tmp_path / "model")).load().float()
    recipes = packed.config.quantization_config.recipes()
    assert sum(".experts." in name for name in recipes) == 24
    fake_quantize_model(twin, recipes)
    # Two sums of some hundred products in float32.
    assert distance(packed(IDS).logits, twin(IDS).logits) < 1e-5
    tokens = packed.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert tokens.shape == (1, 15)


@torch.no_grad()
def test_biases_of_experts_stay_with_experts_that_are_left_alone(tmp_path: Path) -> None:
    options = "--schemes", "W8A16G32", "--keep", "*.experts.1.*=BF16", "--per-expert", "--size"
    model, out = quantized(tmp_path, "gpt_oss", *options, "10MB", "--strategy", "uniform")
    packed, prefix = mixbits.load(out), "model.layers.0.mlp.experts"
    state, own = packed.state_dict(), model.model.layers[0].mlp.experts
    for expert in range(4):
        gate_up = own.gate_up_proj_bias[expert]
        assert torch.equal(state[f"{prefix}.{expert}.gate_proj.bias"], gate_up[::2])
        assert torch.equal(state[f"{prefix}.{expert}.up_proj.bias"], gate_up[1::2])
    assert torch.equal(state[f"{prefix}.1.down_proj.weight_plain"], own.down_proj[1].T)
    packed.save_pretrained(tmp_path / "again")
    again = mixbits.load(tmp_path / "again")
    assert torch.equal(again(IDS).logits, packed(IDS).logits)
    layer = packed.model.layers[0].mlp
    copied, x = pickle.loads(pickle.dumps(copy.deepcopy(layer))), torch.randn(1, 3, 64).bfloat16()
    assert torch.equal(copied(x)[0], layer(x)[0])


@torch.no_grad()
def test_fake_experts_are_rounded_where_they_lie(tmp_path: Path) -> None:
    options = "--schemes", "W4A16G32", "--avg-bits", "4.5", "--per-expert"
    _, packed = quantized(tmp_path, "gpt_oss", *options)
    fake = tmp_path / "fake"
    ids = ["--dataset", str(tmp_path / "ids.npy"), *SMALL, "--rounding", "rtn"]
    assert main([str(tmp_path / "model"), *ids, *options, "--fake", "--out", str(fake)]) == 0
    model = AutoModelForCausalLM.from_pretrained(fake)
    for name, linear in mixbits.load(packed).named_modules():
        if ".experts." in name and isinstance(linear, PackedLinear):
            module, expert, projection = split_expert_name(name)
            found = expert_slice(model.get_submodule(module), expert, projection)
            assert torch.equal(found, linear.weight.bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bitnet", "llama", "gpt_oss", "deepseek_v3"])
def test_orders_of_columns_fold_only_where_nothing_changes(kind: str, tmp_path: Path) -> None:
    """BitNet has a norm between: its orders are stored. 8 bits move the logits by a few percent."""
    options = "--schemes", "W4A16G32,W8A16G32", "--avg-bits", "8.5", "--granularity", "slab"
    model, out = quantized(tmp_path, kind, *options)
    report = read(out / "report.json")
    assert report["bytes_after"] == report["reached"]["predicted_bytes"]
    packed = mixbits.load(out, dtype=torch.float32)
    downs = [n for n in packed.state_dict() if n.endswith("down_proj.order")]
    assert bool(downs) == (kind == "bitnet")
    assert distance(packed(IDS).logits, model.float()(IDS).logits) < 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "last", "stored"),
    [("falcon", "dense_4h_to_h", False), ("opt", "fc2", False), ("gpt2", "mlp.c_proj", True)],
)
def test_ffns_of_other_names_are_rotated_and_fold(
    kind: str, last: str, stored: bool, tmp_path: Path
) -> None:
    """Use tells which linear ends an FFN. Rows of a Conv1D are not put in another order."""
    options = "--schemes", "W4A16G32,W8A16G32", "--avg-bits", "8.5", "--granularity", "slab"
    model, out = quantized(tmp_path, kind, *options, "--rotate", "ffn")
    rotated = [n for unit in read(out / "plan.json")["units"] for n in unit.get("rotated", [])]
    assert len(rotated) == 2 and all(name.endswith(f".{last}") for name in rotated)
    packed = mixbits.load(out, dtype=torch.float32)
    assert any(n.endswith(f".{last}.order") for n in packed.state_dict()) == stored
    assert distance(packed(IDS).logits, model.float()(IDS).logits) < 0.1


# --- code that comes with a model ---------------------------------------------------------------


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


def llama() -> nn.Module:
    return small("llama")


def names(model: nn.Module) -> set[str]:
    return {i.name for i in find_linears(model)}


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


# --- the command ----------------------------------------------------------------------------------


def run(folder: Path, kind: str, *options: str) -> int:
    small(kind).save_pretrained(folder / "model")
    dataset = str(write_ids(folder / "ids.npy"))
    common = [*SMALL, "--rounding", "rtn", "--out", str(folder / "out")]
    return main([str(folder / "model"), "--dataset", dataset, *common, *options])


def test_a_budget_that_most_weights_take_no_part_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "jetmoe") == 2
    error = capsys.readouterr().err
    assert "at least half" in error and "JetMoeParallelExperts" in error
    assert "--allow-partial" in error and not (tmp_path / "out").exists()
    assert run(tmp_path, "jetmoe", "--dry-run") == 0
    assert "are left as they are: their formula is not known" in capsys.readouterr().out
    assert run(tmp_path, "jetmoe", "--allow-partial", "--avg-bits", "6") == 0
    out = capsys.readouterr().out
    assert "8 tensors of JetMoeParallelExperts" in out
    assert "% of the decoder blocks' weights)" in out
    groups = read(tmp_path / "out" / "report.json")["left_alone"]
    assert groups[0]["class"] == "JetMoeParallelExperts" and groups[0]["share"] > 0.9


def test_what_ignore_names_is_left_by_the_user(tmp_path: Path) -> None:
    ignored = ["--ignore", "*.input_linear", "--ignore", "*.output_linear", "--avg-bits", "6"]
    assert run(tmp_path, "jetmoe", *ignored) == 0


def test_a_rotation_that_would_turn_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "mamba", "--rotate", "ffn") == 2
    error = capsys.readouterr().err
    assert "--rotate ffn rotates what the last linear of an FFN reads" in error
    assert "got none among in_proj, x_proj, out_proj" in error
    assert not (tmp_path / "out").exists()


CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class MyConfig(LlamaConfig):
    model_type = "gained"


class GainLinear(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_features))

    def forward(self, x):
        return super().forward(x) * self.gain


class MyModel(LlamaForCausalLM):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.down_proj = GainLinear(96, 64, bias=False)
"""


@torch.no_grad()
def test_a_linear_of_remote_code_keeps_its_gain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling_gained.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(folder))
    import modeling_gained

    config = modeling_gained.MyConfig(**SIZES)
    names = {"AutoConfig": "MyConfig", "AutoModelForCausalLM": "MyModel"}
    config.auto_map = {k: f"modeling_gained.{v}" for k, v in names.items()}
    model = modeling_gained.MyModel(config).bfloat16()
    for layer in model.model.layers:
        layer.mlp.down_proj.gain.uniform_(1, 5)
    model.save_pretrained(folder)
    dataset = ["--dataset", str(write_ids(tmp_path / "ids.npy")), *SMALL, "--rounding", "rtn"]
    schemes = ["--schemes", "W8A16G32", "--avg-bits", "8.5", "--trust-remote-code"]
    assert main([str(folder), "--out", str(tmp_path / "out"), *dataset, *schemes]) == 0
    assert "2 tensors of GainLinear" in capsys.readouterr().out
    packed = mixbits.load(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    # Eight bits move the logits by 1 %, a gain that is lost by 65 %.
    assert distance(packed(IDS).logits, model.float()(IDS).logits) < 0.03
    sys.modules.pop("modeling_gained")


def test_what_is_found_does_not_depend_on_torchs_settings() -> None:
    """transformers builds models with another default dtype, on a device without storage."""
    models = [small("mixtral"), small("gpt_oss"), small("falcon"), small("llama")]
    expected = list(map(find_linears, models))
    for cache in (experts._FOUND, recognise._FOLDS, recognise._PRODUCTS):
        cache.clear()
    for model in models:
        for module in model.modules():
            module.__dict__.pop("_mixbits_layout", None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = list(map(find_linears, models))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected
