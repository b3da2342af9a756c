"""llama.cpp's types in our benchmark are those that llama.cpp makes, judged beside our plans."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import make_model, write_ids
from torch import Tensor

pytest.importorskip("benchmarks.peers.llama_types", reason="installed without its benchmarks")
from benchmarks.peers import ggml, llama_cpp, llama_types
from benchmarks.quality import uniform
from benchmarks.tools.records import Records
from mixbits.model.layout import find_linears, meta_model
from mixbits.model.streaming import StreamedModel

WHY = llama_cpp.why_unavailable()
needs_ggml = pytest.mark.skipif(WHY is not None, reason=f"no libggml or gguf: {WHY}")
IDS = torch.randint(0, 130, (3, 20), generator=torch.Generator().manual_seed(1))
# Rows of 256 and of 288 columns: only the former are made of blocks of 256.
CONFIG = transformers.LlamaConfig(
    hidden_size=256,
    intermediate_size=288,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=64,
    tie_word_embeddings=True,
)
NAMES = {  # in a block: of transformers -> of a GGUF
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def gguf_name(linear: str) -> str:
    _, _, block, within = linear.split(".", 3)
    return f"blk.{block}.{NAMES[within]}.weight"


def uneven(columns: int) -> Tensor:
    """An importance that differs from column to column."""
    return torch.linspace(-3, 3, columns)[torch.randperm(columns)].exp()


def quantized_by_llama_cpp(
    source: Path, file_type: str, pure: bool, columns: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Tensor -> what gguf's reader has of it, in a file that llama.cpp's own quantizer made."""
    import gguf
    import llama_cpp as llama

    data = [(n.encode(), c.numpy()) for n, c in columns.items()]
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [(n, c.ctypes.data_as(pointer), len(c)) for n, c in data]
    matrix = (llama.llama_model_imatrix_data * (len(entries) + 1))(*entries)  # ends with a null
    options = llama.llama_model_quantize_default_params()
    options.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    options.pure, options.nthread, options.imatrix = pure, 1, matrix
    target = source.with_name(f"{file_type}.gguf")
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), options) == 0
    return {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}


@needs_ggml
@pytest.mark.parametrize("what", ["Q4_0", "Q3_K", "IQ4_XS", "Q4_K", "Q6_K", "Q4_K_M", "Q5_K_M"])
def test_types_and_bytes_are_those_of_llama_cpp(what: str, tmp_path: Path) -> None:
    """Substitutes, mixtures and weighed rounding, of llama.cpp's own run on the same file."""
    import gguf

    torch.manual_seed(0)
    source = tmp_path / "source.gguf"
    llama_cpp.write_gguf(source, CONFIG, "F16")
    linears = find_linears(meta_model(CONFIG))
    columns = {gguf_name(i.name): uneven(i.in_features) for i in linears}
    file_type = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M"}.get(what, what)  # pure ones are of one type
    theirs = quantized_by_llama_cpp(source, file_type, what not in llama_types.MIXTURES, columns)
    types = llama_types.types_of(what, linears, CONFIG)
    assert {gguf_name(n): t for n, t in types.items()} == {
        name: tensor.tensor_type.name for name, tensor in theirs.items() if name in columns
    }
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    for info in linears[:7]:
        name = gguf_name(info.name)
        weight = torch.from_numpy(weights[name].astype(np.float32))
        ours = ggml.quantize(types[info.name], weight, columns[name])
        assert np.array_equal(ours.numpy(), theirs[name].data), name


def test_which_types_take_the_place_of_others() -> None:
    assert [ggml.fitting("Q4_K", n) for n in (512, 576, 100)] == ["Q4_K", "Q5_0", "F16"]
    assert [ggml.fitting("MXFP4", n) for n in (576, 100)] == ["MXFP4", "F16"]
    assert ggml.fitting("BF16", 100) == "BF16"


@needs_ggml
def test_blocks_are_as_wide_as_ggml_has_them() -> None:
    for name in ggml.TYPES:
        traits = ggml.library().ggml_get_type_traits(ggml.TYPES[name]).contents
        assert traits.type_name.decode().upper() == name
        narrower = traits.block_size // 2
        assert ggml.fitting(name, traits.block_size) == name
        assert narrower == 0 or ggml.fitting(name, narrower) != name


def test_a_mixture_is_refused_where_its_rule_is_not_known() -> None:
    config = transformers.AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(SystemExit, match="dense models with"):
        llama_types.types_of("Q4_K_M", find_linears(meta_model(config)), config)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_importance_is_the_mean_square_of_what_reaches_a_linear(kind: str, tmp_path: Path) -> None:
    """Seen by hooks of torch's; of experts, by their tokens' routing: there are no more tokens."""
    folder = make_model(tmp_path / kind, kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears, seen = find_linears(model), {}
    plain = [info.name for info in linears if not info.is_expert]
    for name in plain:
        hook = lambda module, args, name=name: seen.__setitem__(name, args[0].detach())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    model(IDS)
    kept = dict(seen)
    found = llama_types.importance(StreamedModel(model), linears, IDS)
    for name in plain:
        torch.testing.assert_close(found[name], kept[name].square().mean((0, 1)))
    experts = [found[i.name] for i in linears if i.is_expert and i.name in found]
    assert bool(experts) == (kind == "qwen3_moe")
    assert all(mean.isfinite().all() and (mean >= 0).all() for mean in experts)


@needs_ggml
def test_importance_weighs_the_columns() -> None:
    torch.manual_seed(0)
    weight, columns = torch.randn(16, 256), uneven(256)

    def error(importance: Tensor | None) -> float:
        packed = ggml.quantize("Q4_0", weight, importance)
        off = ggml.dequantize("Q4_0", packed, 256) - weight
        return float((off.square() * columns).sum())

    assert error(columns) < 0.9 * error(None)
    with pytest.raises(ValueError, match=r"importance must be \[256\]: got \[32\]"):
        error(columns[:32])
    with pytest.raises(ValueError, match="cannot be quantized without importance"):
        ggml.quantize("IQ2_XXS", weight)


@needs_ggml
def test_inputs_are_rounded_as_ggml_reads_them() -> None:
    """Q8_0: 32 share a float16, the largest of them over 127. K-quants read blocks of 256."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 256)
    groups = x.view(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 127
    expected = (groups / scale).round() * scale.half().float()
    torch.testing.assert_close(ggml.rounded_inputs("Q5_1", x), expected.view(x.shape))
    wide = ggml.rounded_inputs("Q4_K", x)
    steps = wide / (x.abs().amax(-1, keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert torch.equal(ggml.rounded_inputs("BF16", x), x.bfloat16().float())


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[dict[str, str]]:
    """The benchmark on a tiny model; its rows."""
    folder, text = make_model(tmp_path / "tiny", hidden_size=64), write_ids(tmp_path / "ids.npy")
    counts = ["--nsamples", "3", "--eval-nsamples", "4", "--seqlen", "32"]
    csv = tmp_path / "types.csv"
    files = ["--dataset", str(text), "--held-out", str(text), "--csv", str(csv)]
    monkeypatch.setattr(sys, "argv", ["llama_types", str(folder), *files, *counts, *words])
    llama_types.main()
    return Records(csv, llama_types.COLUMNS, llama_types.KEY).rows


@needs_ggml
def test_types_are_judged_beside_a_plan_of_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    menus = ["--menu", "ours=W4A16G32,W8A16G32", "--menu", "eight=W8A16G32"]
    words = ["--types", "Q4_0,Q8_0", *menus, "--rounding", "rtn"]
    rows = run(tmp_path, monkeypatch, *words)
    by_name = {(row["what"], row["avg_bits"]): row for row in rows}
    four, eight = by_name["Q4_0", ""], by_name["Q8_0", ""]
    # Two down projections of 64 rows of 172 columns are in F16.
    other = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 172 * 64)
    share = 2 * 64 * 172 / (other + 2 * 64 * 172)
    assert float(four["bits"]) == pytest.approx((1 - share) * 4.5 + share * 16)
    assert float(four["substituted"]) == pytest.approx(share) and four["substitutes"] == "F16"
    assert 0 < float(eight["kl"]) < float(four["kl"])
    kls = [float(kl) for kl in four["kls"].split()]
    assert len(kls) == 4 and np.mean(kls) == pytest.approx(float(four["kl"]), rel=1e-4)
    ours = by_name["ours", f"{float(four['bits']):.4f}"]
    assert float(ours["bits"]) <= float(four["bits"])
    first, last = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert first[-3:] == ["-"] * 3  # 8 bits fit into no 7.3
    assert float(by_name["eight", f"{float(eight['bits']):.4f}"]["bits"]) < float(eight["bits"])
    apart = float(eight["kl"]) - float(by_name["ours", f"{float(eight['bits']):.4f}"]["kl"])
    assert float(last[last.index("+-") - 1]) == pytest.approx(apart * 1e3, abs=0.006)
    assert run(tmp_path, monkeypatch, *words) == rows  # nothing is measured again


def test_the_original_is_run_once() -> None:
    class Counted:
        calls = 0

        def logits(self, ids: Tensor) -> Tensor:
            self.calls += 1
            return ids * 2.0

    model = Counted()
    remembered = uniform.Remembered(model)
    for _ in range(2):
        for batch in IDS.split(2):
            assert torch.equal(remembered.logits(batch), batch * 2.0)
    assert model.calls == 2


@needs_ggml
def test_rounded_inputs_cost_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = run(tmp_path, monkeypatch, "--types", "Q8_0")
    rows = run(tmp_path, monkeypatch, "--types", "Q8_0", "--inputs", "8")
    assert [row["inputs"] for row in rows] == ["16", "8"]
    assert float(rows[1]["kl"]) > float(wide[0]["kl"])


def test_a_type_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, monkeypatch, "--types", "Q4_X")
    assert stopped.value.code == 2
