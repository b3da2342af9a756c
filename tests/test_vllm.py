"""The plugin inside vLLM's own layers, on CPU tensors: created, loaded, cut, and multiplied.

Runs where vllm can be imported: an environment of its own, since vLLM pins its torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import fake_model, packed
from safetensors.torch import load_file
from tiny import read
from torch import Tensor

from mixbits.formats import Mixed, Recipe, UsageError, parse_scheme

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor.layers.quantization import get_quantization_config

from mixbits.integrations import vllm as plugin

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 2, 16, 256, 160
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to be one of several GPUs; sums and gathers are left to the test."""

    def pretend(rank: int, size: int) -> None:
        for module in (parameter, linear, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    pretend(0, 1)
    return pretend


class Checkpoint:
    """A packed folder, and the layers that vLLM makes of it."""

    def __init__(self, tmp_path: Path, schemes: str, recipes: dict[str, Recipe] | None = None):
        options = {"intermediate_size": INNER, "vocab_size": VOCAB}
        source, assignment, folder = packed(tmp_path, schemes, recipes=recipes, **options)
        self.fake = fake_model(source, assignment).float()
        plugin.register()
        config = read(folder / "config.json")["quantization_config"]
        self.config = get_quantization_config("mixbits").from_config(config)
        self.config.packed_modules_mapping = FUSED
        self.tensors = load_file(folder / "model.safetensors")

    def load(self, layer: Any, name: str, parts: dict[str, Any]) -> Any:
        """Fill a layer as vLLM's models do: every tensor of every part, with its shard's name."""
        found = dict(layer.named_parameters())
        loaded = set()
        for part, shard in parts.items():
            for key, tensor in self.tensors.items():
                if key.startswith(f"{name}.{part}."):
                    suffix = key.removeprefix(f"{name}.{part}.")
                    target = found[suffix]
                    target.weight_loader(target, tensor, *([] if shard is None else [shard]))
                    loaded.add(suffix)
        assert loaded == set(found)
        layer.quant_method.process_weights_after_loading(layer)
        layer.quant_method.process_weights_after_loading(layer)  # may be called again
        return layer

    def expected(self, name: str, x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.fake.get_submodule(name)(x)
        return out

    def qkv(self) -> Any:
        layer = linear.QKVParallelLinear(
            HIDDEN,
            HEAD_DIM,
            HEADS,
            KV_HEADS,
            bias=False,
            params_dtype=torch.float32,
            quant_config=self.config,
            prefix=f"{ATTENTION}.qkv_proj",
        )
        return self.load(layer, ATTENTION, {"q_proj": "q", "k_proj": "k", "v_proj": "v"})

    def gate_up(self) -> Any:
        layer = linear.MergedColumnParallelLinear(
            HIDDEN,
            [INNER, INNER],
            bias=False,
            params_dtype=torch.float32,
            quant_config=self.config,
            prefix=f"{MLP}.gate_up_proj",
        )
        return self.load(layer, MLP, {"gate_proj": 0, "up_proj": 1})

    def down(self) -> Any:
        layer = linear.RowParallelLinear(
            INNER,
            HIDDEN,
            bias=False,
            reduce_results=False,
            params_dtype=torch.float32,
            quant_config=self.config,
            prefix=f"{MLP}.down_proj",
        )
        return self.load(layer, MLP, {"down_proj": None})


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()  # orders of summation


MIXES = [
    "MXFP4A16",
    "MXFP4A16,MXFP8A16,BF16",  # unlike schemes in one fused layer, and none
    "MXFP4,MXFP8",
    "W4A16G32,W8A16G32,W2A16G32",
    "W4A16G32ASYM,W8A16G64ASYM",
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("schemes", MIXES)
def test_fused_layers_on_several_gpus(tmp_path: Path, ranks: Any, schemes: str, size: int) -> None:
    checkpoint = Checkpoint(tmp_path, schemes)
    x = torch.randn(3, 5, HIDDEN)
    q, k, v, gate_up = [], [], [], []
    for rank in range(size):
        ranks(rank, size)
        heads = [HEADS // size * HEAD_DIM] + [max(1, KV_HEADS // size) * HEAD_DIM] * 2
        parts = checkpoint.qkv()(x)[0].split(heads, -1)
        for whole, part in zip((q, k, v), parts, strict=True):
            whole.append(part)
        gate_up.append(checkpoint.gate_up()(x)[0].chunk(2, -1))
    copies = max(1, size // KV_HEADS)  # GPUs with the same keys and values
    for name, got in (("q_proj", q), ("k_proj", k[::copies]), ("v_proj", v[::copies])):
        close(torch.cat(got, -1), checkpoint.expected(f"{ATTENTION}.{name}", x))
    for name, got in zip(("gate_proj", "up_proj"), zip(*gate_up, strict=True), strict=True):
        close(torch.cat(got, -1), checkpoint.expected(f"{MLP}.{name}", x))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8A16", "W2A16G64", "W4A16G32ASYM", "W8A16G64"])
def test_columns_on_several_gpus(tmp_path: Path, ranks: Any, scheme: str, size: int) -> None:
    checkpoint = Checkpoint(tmp_path, scheme)
    x = torch.randn(7, INNER)
    total = torch.zeros(7, HIDDEN)
    for rank in range(size):
        ranks(rank, size)
        total += checkpoint.down()(x.chunk(size, -1)[rank])[0]
    close(total, checkpoint.expected(f"{MLP}.down_proj", x))


def slabs(rotated: bool = False) -> Mixed:
    order = tuple(torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0)).tolist())
    parts = (parse_scheme("MXFP8A16"), 32), (parse_scheme("MXFP4A16"), 32)
    return Mixed(parts, order, rotated)


def test_slabs_are_cut_by_rows_only(tmp_path: Path, ranks: Any) -> None:
    eight, four = (parse_scheme(name, act_scale_mode="even") for name in ("MXFP8", "MXFP4"))
    down = Mixed(((eight, 128), (four, 128)), rotated=True)
    recipes: dict[str, Recipe] = {f"{ATTENTION}.{n}": slabs() for n in ("q_proj", "v_proj")}
    recipes |= {f"{MLP}.up_proj": slabs(rotated=True), f"{MLP}.down_proj": down}
    checkpoint = Checkpoint(tmp_path, "MXFP4A16,MXFP8A16", recipes)
    x = torch.randn(4, HIDDEN)
    q, up = [], []
    for rank in range(2):
        ranks(rank, 2)
        q.append(checkpoint.qkv()(x)[0][:, : HEADS * HEAD_DIM // 2])
        up.append(checkpoint.gate_up()(x)[0].chunk(2, -1)[1])
        with pytest.raises(UsageError, match=r"cannot be cut.*128 of 256 columns.*down_proj"):
            checkpoint.down()
    close(torch.cat(q, -1), checkpoint.expected(f"{ATTENTION}.q_proj", x))
    close(torch.cat(up, -1), checkpoint.expected(f"{MLP}.up_proj", x))
    ranks(0, 1)
    y = torch.randn(4, INNER)
    close(checkpoint.down()(y)[0], checkpoint.expected(f"{MLP}.down_proj", y))


def test_columns_are_cut_at_whole_groups(tmp_path: Path, ranks: Any) -> None:
    for scheme, size, part in (("W4A16", 4, 64), ("W4A16G64ASYM", 4, 64), ("MXFP4A16", 16, 16)):
        with pytest.raises(UsageError, match=f"{part} of {INNER} columns"):
            plugin.check_cut("down_proj", parse_scheme(scheme), INNER, INNER // size)
    plugin.check_cut("down_proj", parse_scheme("W4A16G64ASYM"), INNER, INNER // 2)


def test_a_head_fills_up_its_vocabulary(tmp_path: Path, ranks: Any) -> None:
    checkpoint = Checkpoint(tmp_path, "MXFP4A16")
    x = torch.randn(3, HIDDEN)
    got = []
    for rank in range(2):
        ranks(rank, 2)
        head = vocab_parallel_embedding.ParallelLMHead(
            VOCAB,
            HIDDEN,
            params_dtype=torch.float32,
            quant_config=checkpoint.config,
            prefix="lm_head",
        )
        for name, target in dict(head.named_parameters()).items():
            target.weight_loader(target, checkpoint.tensors[f"lm_head.{name}"])
        head.quant_method.process_weights_after_loading(head)
        got.append(head.quant_method.apply(head, x))
    logits = torch.cat(got, -1)
    wanted = checkpoint.expected("lm_head", x)
    close(logits[:, :VOCAB], wanted)
    assert (logits[:, VOCAB:] == 0).all()


def test_what_is_not_packed_is_left_to_vllm(tmp_path: Path, ranks: Any) -> None:
    checkpoint = Checkpoint(tmp_path, "BF16", {f"{MLP}.down_proj": parse_scheme("MXFP4A16")})
    layer = linear.ColumnParallelLinear(
        HIDDEN, 32, bias=False, quant_config=checkpoint.config, prefix=f"{ATTENTION}.o_proj"
    )
    assert isinstance(layer.quant_method, linear.UnquantizedLinearMethod)
    assert isinstance(checkpoint.down().quant_method, plugin.MixbitsLinearMethod)


def test_a_damaged_tensor_is_refused(tmp_path: Path, ranks: Any) -> None:
    for change in (lambda t: t.float(), lambda t: t[:, :-1], lambda t: t[:-1]):
        (tmp_path / str(change)).mkdir()
        checkpoint = Checkpoint(tmp_path / str(change), "MXFP4A16")
        name = f"{ATTENTION}.k_proj.weight_scale"
        checkpoint.tensors[name] = change(checkpoint.tensors[name])
        with pytest.raises((UsageError, RuntimeError)):
            checkpoint.qkv()


def test_other_configurations_are_refused() -> None:
    config = {"layout": 1, "weight_scale_mode": "floor", "act_scale_mode": "even"}
    name = "model.layers.0.mlp.experts.0.up_proj"
    with pytest.raises(UsageError, match="experts"):
        plugin.MixbitsVllmConfig.from_config({**config, "modules": {name: "MXFP4"}})
    with pytest.raises(UsageError, match="layout"):
        plugin.MixbitsVllmConfig.from_config({**config, "layout": 99, "modules": {}})


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's own groups of processes, of one."""
    from vllm import distributed

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # there is none
    distributed.init_distributed_environment(1, 0, f"file://{tmp_path}/group", 0, "gloo")
    distributed.initialize_model_parallel(1, 1)
    yield
    distributed.destroy_model_parallel()
    distributed.destroy_distributed_environment()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_vllm_loads_a_whole_model(tmp_path: Path, one_process: None, kind: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    plugin.register()
    eight = parse_scheme("MXFP8A16")
    recipes: dict[str, Recipe] = {f"{ATTENTION}.{n}": slabs() for n in ("q_proj", "k_proj")}
    recipes |= {f"{MLP}.down_proj": Mixed(((eight, 160),), rotated=True)}
    source, assignment, folder = packed(tmp_path, "MXFP4A16,MXFP8A16,BF16", kind, recipes=recipes)
    engine = EngineArgs(
        model=str(folder), dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True
    ).create_engine_config()
    with set_current_vllm_config(engine):
        model = get_model(vllm_config=engine)
    fake, x = fake_model(source, assignment), torch.randn(5, HIDDEN).bfloat16()
    with torch.no_grad():
        for ours, theirs in zip(fake.model.layers, model.model.layers, strict=True):
            qkv = [ours.self_attn.get_submodule(name)(x) for name in FUSED["qkv_proj"]]
            gate_up = [ours.mlp.get_submodule(name)(x) for name in FUSED["gate_up_proj"]]
            y = gate_up[0]
            for got, wanted in (
                (theirs.self_attn.qkv_proj(x)[0], torch.cat(qkv, -1)),
                (theirs.mlp.gate_up_proj(x)[0], torch.cat(gate_up, -1)),
                (theirs.mlp.down_proj(y)[0], ours.mlp.down_proj(y)),
            ):
                # One unit in the last place of bfloat16, of sums in another order.
                assert (got - wanted).abs().max() <= 2**-7 * wanted.abs().max()
        assert torch.equal(model.compute_logits(x), fake.lm_head(x))


def test_layers_compile_into_one_graph(tmp_path: Path, ranks: Any) -> None:
    recipes: dict[str, Recipe] = {f"{ATTENTION}.q_proj": slabs(rotated=True)}
    checkpoint = Checkpoint(tmp_path, "MXFP4A16,MXFP8", recipes)
    for layer in (checkpoint.qkv(), checkpoint.gate_up()):

        def run(x: Tensor, layer: Any = layer) -> Tensor:
            out: Tensor = layer.quant_method.apply(layer, x)
            return out

        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (3, 8):
            x = torch.randn(tokens, HIDDEN)
            assert torch.equal(compiled(x), run(x))


def test_vllm_finds_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import plugins
    from vllm.model_executor.layers import quantization

    monkeypatch.setattr(plugins, "plugins_loaded", False)
    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.pop("mixbits", None)
    plugins.load_general_plugins()
    assert get_quantization_config("mixbits") is plugin.MixbitsVllmConfig
