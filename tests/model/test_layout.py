"""Parts of a model are recognised by what they do; the rest is left alone, and said."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from small_models import IDS, SIZES, distance, shapes, small
from tiny import SMALL, read, write_ids
from torch import nn
from transformers import AutoModelForCausalLM

import mixbits
from mixbits.model import experts, recognise
from mixbits.model.experts import expert_slice
from mixbits.model.layout import (
    find_linears,
    split_expert_name,
    survey,
    weight_of,
)
from mixbits.quantize import main
from mixbits.runtime.fake import fake_quantize_model
from mixbits.runtime.linear import PackedLinear
from mixbits.source.source import open_source

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


# --- the command ----------------------------------------------------------------------------------


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
