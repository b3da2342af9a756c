"""The plugin inside vLLM's own layers, on CPU tensors: created, loaded, cut, and multiplied.

Runs where vllm can be imported: an environment of its own, since vLLM pins its torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exported import fake_model, packed
from safetensors.torch import load_file
from tiny import read
from torch import Tensor
from vllm_shapes import (
    ATTENTION,
    FUSED,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    MLP,
    VOCAB,
    slabs,
)

from mixbits.errors import UsageError
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, parse_scheme

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.config import (
    CUDAGraphMode,
    VllmConfig,
    get_current_vllm_config,
    set_current_vllm_config,
)
from vllm.model_executor import parameter
from vllm.model_executor.layers import fused_moe, linear, vocab_parallel_embedding
from vllm.model_executor.layers.quantization import get_quantization_config

from mixbits.integrations import vllm as plugin


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to be one of several GPUs; sums and gathers are left to the test."""

    def pretend(rank: int, size: int) -> None:
        for module in (parameter, linear, vocab_parallel_embedding, fused_moe.config):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            if module is not fused_moe.config:  # which is told
                monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    pretend(0, 1)
    return pretend


class Checkpoint:
    """A packed folder, and the layers that vLLM makes of it."""

    def __init__(
        self,
        tmp_path: Path,
        schemes: str,
        recipes: dict[str, Recipe] | None = None,
        kind: str = "llama",
        **sizes: int,
    ):
        options = {"intermediate_size": INNER, "vocab_size": VOCAB, **sizes}
        source, assignment, folder = packed(tmp_path, schemes, kind, recipes=recipes, **options)
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


def test_slabs_are_cut_by_rows_only(tmp_path: Path, ranks: Any) -> None:
    eight, four = (parse_scheme(name, act_scale_mode="even") for name in ("MXFP8", "MXFP4"))
    down = Recipe(((eight, 128), (four, 128)), rotated=True)
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
            plugin.check_cut("down_proj", parse_recipe(scheme), INNER, INNER // size)
    plugin.check_cut("down_proj", parse_recipe("W4A16G64ASYM"), INNER, INNER // 2)


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("W3A16G32", "codes of 3 bits lie in planes"),
        ("MXFP6A16", "codes of 6 bits lie in planes"),
        ("FP8A16", "its scales are of whole rows"),
        ("W4xINT8", "a scale for a whole token"),
        ("NVFP4", "a scale for a whole token"),
    ],
)
def test_what_spans_all_columns_is_not_cut(scheme: str, why: str) -> None:
    with pytest.raises(UsageError, match=rf"{scheme} cannot be cut.*{why}.*128 of 256.*down_proj"):
        plugin.check_cut("down_proj", parse_recipe(scheme), 256, 128)
    plugin.check_cut("down_proj", parse_recipe(scheme), 256, 256)
    for other in ("NVFP4A16", "W4A16", "MXFP8"):
        plugin.check_cut("down_proj", parse_recipe(other), 256, 128)


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
    checkpoint = Checkpoint(tmp_path, "BF16", {f"{MLP}.down_proj": parse_recipe("MXFP4A16")})
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
    with pytest.raises(UsageError, match="layout"):
        plugin.MixbitsVllmConfig.from_config({**config, "layout": 99, "modules": {}})


# --- experts -------------------------------------------------------------------------------------

EXPERTS, TOP = 5, 2


class ExpertsCheckpoint(Checkpoint):
    """A Qwen3-MoE of one layer, whose experts take the schemes in turn, or `recipes`."""

    def __init__(self, tmp_path: Path, schemes: str, recipes: dict[str, Recipe] | None = None):
        sizes = {"num_hidden_layers": 1, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
        super().__init__(tmp_path, schemes, recipes, kind="qwen3_moe", **sizes)

    def layer(self, size: int = 1, activation: str = "silu", **options: Any) -> Any:
        # Every GPU would have it once.
        get_current_vllm_config().compilation_config.static_forward_context.clear()
        runner = fused_moe.FusedMoEFactory(
            num_experts=EXPERTS,
            top_k=TOP,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            params_dtype=torch.float32,
            quant_config=self.config,
            tp_size=size,
            dp_size=1,
            pcp_size=1,
            prefix=f"{MLP}.experts",
            activation=activation,
            **options,
        )
        own = {k: t for k, t in self.tensors.items() if k.startswith(f"{MLP}.experts.")}
        weights = [(k.removeprefix(f"{MLP}.experts."), t) for k, t in own.items()]
        for empty in runner.routed_experts.parameters():
            empty.data.fill_(0xAA)
        loaded = set(runner.load_weights(iter(weights)))
        assert {name.removeprefix("routed_experts.") for name in loaded} == {
            name for name, value in runner.routed_experts.named_parameters() if value.numel()
        }
        method = runner.routed_experts.quant_method
        method.process_weights_after_loading(runner.routed_experts)
        method.process_weights_after_loading(runner.routed_experts)
        assert all("packed." in name for name, _ in runner.routed_experts.named_parameters())
        return runner.routed_experts


def routed(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, and every token's weights and experts, of which one has no token."""
    choices = torch.stack([torch.randperm(EXPERTS - 1)[:TOP] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP), choices.int()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("schemes", MIXES)
def test_experts_on_several_gpus(tmp_path: Path, ranks: Any, schemes: str, size: int) -> None:
    checkpoint = ExpertsCheckpoint(tmp_path, schemes)
    x, weights, choices = routed()
    total = torch.zeros_like(x)
    for rank in range(size):
        ranks(rank, size)
        layer = checkpoint.layer(size)
        total += layer.forward_modular(x, weights, choices)
    with torch.no_grad():
        close(total, checkpoint.fake.get_submodule(f"{MLP}.experts")(x, choices, weights))


def test_whole_experts_on_several_gpus(tmp_path: Path, ranks: Any) -> None:
    # The one with zero points is on the last GPU only.
    recipes: dict[str, Recipe] = {f"{MLP}.experts.4.up_proj": parse_recipe("W4A16G32ASYM")}
    checkpoint = ExpertsCheckpoint(tmp_path, "MXFP4A16,MXFP8A16,W4A16G32,BF16", recipes)
    x, weights, choices = routed()
    total, config = torch.zeros_like(x), VllmConfig()
    config.parallel_config.enable_expert_parallel = True
    for rank in range(2):
        ranks(rank, 2)
        with set_current_vllm_config(config):
            layer = checkpoint.layer(2)
        assert layer.packed.num_experts == (3, 2)[rank]
        total += layer.forward_modular(x, weights, choices)
    with torch.no_grad():
        close(total, checkpoint.fake.get_submodule(f"{MLP}.experts")(x, choices, weights))


def test_slabs_of_experts(tmp_path: Path, ranks: Any) -> None:
    recipes: dict[str, Recipe] = {f"{MLP}.experts.0.gate_proj": slabs()}
    recipes |= {f"{MLP}.experts.1.up_proj": slabs(rotated=True)}
    checkpoint = ExpertsCheckpoint(tmp_path, "MXFP4A16", recipes)
    x, weights, choices = routed()
    total = torch.zeros_like(x)
    for rank in range(2):
        ranks(rank, 2)
        total += checkpoint.layer(2).forward_modular(x, weights, choices)
    with torch.no_grad():
        close(total, checkpoint.fake.get_submodule(f"{MLP}.experts")(x, choices, weights))
    down = Recipe(((parse_scheme("MXFP8A16"), 128), (parse_scheme("MXFP4A16"), 128)))
    checkpoint.config.recipes = {f"{MLP}.experts.1.down_proj": down}
    with pytest.raises(UsageError, match=r"cannot be cut.*128 of 256 columns.*experts\.1\.down"):
        checkpoint.layer(2)


def test_experts_that_do_not_run_are_refused(tmp_path: Path, ranks: Any) -> None:
    checkpoint = ExpertsCheckpoint(tmp_path, "MXFP4A16")
    for options, message in (
        ({"activation": "relu2"}, "relu2"),
        ({"apply_router_weight_on_input": True}, "weighted inputs"),
    ):
        with pytest.raises(UsageError, match=message):
            checkpoint.layer(**options)
    graphs = VllmConfig()
    graphs.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    with set_current_vllm_config(graphs), pytest.raises(UsageError, match="enforce_eager=True"):
        checkpoint.layer()


def test_experts_that_are_left_alone(tmp_path: Path, ranks: Any) -> None:
    recipes: dict[str, Recipe] = {f"{ATTENTION}.q_proj": parse_recipe("MXFP4A16")}
    checkpoint = ExpertsCheckpoint(tmp_path, "BF16", recipes)
    layer = SimpleNamespace(global_num_experts=EXPERTS)
    assert checkpoint.config._experts(layer, f"{MLP}.experts") is None


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
