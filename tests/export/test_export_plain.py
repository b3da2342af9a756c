"""Back to 16 bits: what transformers loads by itself is the packed model, its activations whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import published
import published_integers
import pytest
import torch
from exported import export, logits, packed
from tiny import read
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixbits
from mixbits.checkpoint import folder as checkpoint
from mixbits.checkpoint.saving import save
from mixbits.errors import UsageError
from mixbits.export.__main__ import main
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.model.layout import find_linears
from mixbits.source.source import open_source
from mixbits.source.weights import Files

A16 = "MXFP4A16,W4A16G32,BF16,W8A16G32ASYM,MXFP8A16,W2A16G32"


def loaded(folder: Path, **options: Any) -> Any:
    """By transformers alone; every tensor is there and taken."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def slabs(source: Path, head: bool) -> dict[str, Recipe]:
    """Orders, stored and folded; rotations; several schemes in a linear."""
    numbers = random.Random(0)
    low, high = parse_scheme("MXFP4A16"), parse_scheme("W8A16G32")
    found: dict[str, Recipe] = {}
    for i, info in enumerate(find_linears(open_source(str(source)).load(), include_head=head)):
        order = tuple(numbers.sample(range(info.in_features), info.in_features))
        segments = ((high, 32), (low, info.in_features - 32))
        folded = info.name.endswith("down_proj") and i % 2 == 0
        found[info.name] = Recipe(segments, order if i % 3 else None, i % 4 == 1, folded)
    return found


def fill(recipes: dict[str, Recipe], head: bool, source: Path) -> None:
    recipes.update(slabs(source, head))


def nothing(source: Path) -> None:
    pass


CASES: dict[str, tuple[str, bool, bool, dict[str, Any]]] = {  # kind, head, slabs, overrides
    "llama": ("llama", True, False, {}),
    "llama tied": ("llama", False, False, {"tie_word_embeddings": True}),
    "llama untied by us": ("llama", True, False, {"tie_word_embeddings": True}),
    "llama slabs": ("llama", True, True, {}),
    "qwen2 biases, slabs": ("qwen2", False, True, {}),
    "mixtral": ("mixtral", True, False, {}),
    "qwen3_moe slabs": ("qwen3_moe", False, True, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_without_mixbits(case: str, tmp_path: Path) -> None:
    kind, head, in_slabs, overrides = CASES[case]
    recipes: dict[str, Recipe] = {}
    change = partial(fill, recipes, head) if in_slabs else nothing
    source, _, folder = packed(
        tmp_path, A16, kind, head=head, recipes=recipes, change=change, **overrides
    )
    exact, rounded = export(folder, "plain", "--dtype", "float32"), export(folder, "plain")
    config = read(rounded / "config.json")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    expected = logits(mixbits.load(folder, dtype=torch.float32))
    got = logits(loaded(exact))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    # In the model's own dtype each weight is the nearest to what the packed one stands for.
    plain, model = loaded(rounded).state_dict(), loaded(exact).state_dict()
    assert (
        plain.keys()
        == model.keys()
        == loaded(source.path).state_dict().keys()
        | ({"lm_head.weight"} if case == "llama untied by us" else set())
    )
    for name, value in plain.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, model[name].to(torch.bfloat16))


def test_dequantized_in_memory_it_is_the_same(tmp_path: Path) -> None:
    for case in ("llama slabs", "qwen2 biases, slabs", "mixtral"):
        kind, head, in_slabs, overrides = CASES[case]
        recipes: dict[str, Recipe] = {}
        where = tmp_path / kind
        change = partial(fill, recipes, head) if in_slabs else nothing
        source, _, folder = packed(
            where, A16, kind, head=head, recipes=recipes, change=change, **overrides
        )
        exported = loaded(export(folder, "plain"))
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dequantize() is model and not model.is_quantized
        assert torch.equal(logits(model), logits(exported))
        original = loaded(source.path)
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
        assert model.num_parameters() == original.num_parameters()
        model.save_pretrained(where / "saved")
        assert "transformers_weights" not in read(where / "saved" / "config.json")
        assert torch.equal(logits(loaded(where / "saved")), logits(exported))
        finer = mixbits.load(folder).dequantize(torch.float32)
        assert {p.dtype for p in finer.parameters()} == {torch.float32}
        ids = torch.arange(5)[None]
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_what_lies_on_several_devices_is_not_dequantized(tmp_path: Path) -> None:
    folder = packed(tmp_path, A16)[2]
    model = mixbits.load(folder)
    model.model.norm.to("meta")
    with pytest.raises(UsageError, match="must be on one device to be dequantized"):
        model.dequantize()


# (what makes a checkpoint as published, `AutoModelForCausalLM` takes all of it)
PUBLISHED = {"gpt_oss": True, "deepseek_v3": False, "qwen3_5": False, "awq": True}


@pytest.mark.parametrize("maker", PUBLISHED)
def test_experts_towers_and_what_was_quantized_before(maker: str, tmp_path: Path) -> None:
    """Half of the linears are left as the source has them, quantized or not."""
    make = getattr(published, maker, None) or getattr(published_integers, maker)
    make(tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    linears = find_linears(source.load())
    recipe = Recipe.plain(parse_scheme("W8A16G32"))
    recipes = {info.name: recipe for info in linears if (info.block or 0) % 2 == 0}
    (tmp_path / "packed").mkdir()
    save(tmp_path / "packed", source, source.load(), linears, recipes, {"act_scale_mode": "even"})
    out = export(tmp_path / "packed", "plain", "--dtype", "float32")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and bool(info["unexpected_keys"]) < 2 - PUBLISHED[maker]
    expected = logits(mixbits.load(tmp_path / "packed", dtype=torch.float32))
    atol = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(model.eval()), expected, rtol=0, atol=atol)
    # What is carried along came too, under its own name, and plain.
    files = Files(sorted(out.glob("*.safetensors")))
    carried = {one.name for one in source.weights.carried}
    assert carried <= files.headers.keys() and bool(carried) == (not PUBLISHED[maker])
    assert not {h.dtype for h in files.headers.values()} & {torch.uint8, torch.float8_e4m3fn}


def test_shards_are_as_large_as_they_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed(tmp_path, "MXFP4,W8A16G32", "mixtral")[2]
    whole = loaded(export(folder, "plain")).state_dict()
    out = capsys.readouterr().out
    assert "now plain bfloat16" in out and "relative error" in out
    assert "activations are not rounded any more" in out
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60_000)
    parts = export(folder, "plain")
    sizes = [path.stat().st_size for path in parts.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 70_000
    again = loaded(parts).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_it_is_quantized_again_as_the_model_that_it_is(
    run: Callable[..., int], shared: Path, tmp_path: Path
) -> None:
    """Weights that are codes already are packed as the same codes."""
    quick = ["--rounding", "rtn", "--eval-nsamples", "0", "--gate", "0"]
    assert run(*quick, "--schemes", "MXFP4A16,MXFP8A16", "--avg-bits", "6") == 0
    plain = export(tmp_path / "out", "plain")
    plan = ["--plan", tmp_path / "out" / "plan.json"]
    assert run(*quick, *plan, model=plain, out="again") == 0
    first, second = (mixbits.load(tmp_path / name) for name in ("out", "again"))
    assert torch.equal(logits(first), logits(second))
    assert AutoTokenizer.from_pretrained(plain).get_vocab()


def test_what_a_dtype_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def grow(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.model.layers[0].mlp.up_proj.weight.data *= 2.0**30
        model.save_pretrained(folder)

    folder = packed(tmp_path, "MXFP8A16", change=grow)[2]
    words = [str(folder), "--out", str(tmp_path / "out"), "--dtype"]
    assert main([*words, "float16", "--format", "plain"]) == 2
    assert "mlp.up_proj is too large for float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "float32", "--format", "compressed-tensors"]) == 2
    assert "--dtype float32 is for --format plain only" in capsys.readouterr().err
