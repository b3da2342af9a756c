"""from_pretrained(SOURCE, quantization_config=MixbitsConfig(...)): packed while it is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hub import logits
from tiny import VOCAB, make_model, read
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import mixbits
from mixbits import MixbitsConfig, UsageError
from mixbits.checkpoint.on_the_fly import largest_that_fits
from mixbits.checkpoint.saving import save
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import parse_scheme
from mixbits.model.layout import find_linears
from mixbits.runtime.linear import PackedLinear
from mixbits.source.source import open_source

ASKED: dict[str, Any] = {"schemes": ["W2A16G32ASYM", "MXFP4", "MXFP8"], "avg_bits": 4.5}


def make_gpt2(folder: Path) -> Path:
    """Its linears are Conv1D, its head is tied."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
    config = AutoConfig.for_model("gpt2", **sizes, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def from_pretrained(folder: Path, asked: dict[str, Any] = ASKED, **options: Any) -> Any:
    config = MixbitsConfig(**asked)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def edit_weights(folder: Path, edit: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.safetensors", "config.json")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "llama")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "qwen3_moe"])
def test_it_generates_is_saved_and_loaded_as_the_same(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    (make_gpt2 if kind == "gpt2" else lambda f: make_model(f, kind))(folder)
    model = from_pretrained(folder)
    model.save_pretrained(tmp_path / "out")

    source = open_source(str(folder))  # and what the command writes of one scheme
    original = source.load()
    linears, mxfp4 = find_linears(original), parse_recipe("MXFP4", act_scale_mode="even")
    (tmp_path / "uniform").mkdir()
    recipes = {info.name: mxfp4 for info in linears}
    save(tmp_path / "uniform", source, original, linears, recipes, {"act_scale_mode": "even"})
    written, uniform = contents(tmp_path / "out"), contents(tmp_path / "uniform")
    assert written[0] == uniform[0]
    told = json.loads(written[1])["quantization_config"]
    same = json.loads(uniform[1])["quantization_config"]
    assert told.pop("rounding") == {"method": "rtn"}
    assert told == same

    again = mixbits.load(tmp_path / "out")
    ids, options = torch.arange(2, 8)[None], {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), again.generate(ids, **options))
    assert torch.equal(logits(model), logits(again))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == written


def test_the_scheme_is_the_largest_that_fits(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    linears = find_linears(open_source(str(llama)).shapes)
    schemes = [parse_scheme(name) for name in ("W2A16", "MXFP4", "W4A16G32", "W8A16")]
    # 172 columns end in short groups: these take a little more than 4.25, 4.5 and 8.125 bits.
    for avg_bits, name in ((8.2345, "W8A16"), (4.6, "W4A16G32"), (4.3, "MXFP4"), (4.25, "W2A16")):
        assert largest_that_fits(linears, schemes, avg_bits).name == name
        assert largest_that_fits(linears, schemes[::-1], avg_bits).name == name
    with pytest.raises(UsageError, match=r"avg_bits must be at least 2\.\d+, for one of W2A16, "):
        largest_that_fits(linears, schemes, 2.1)
    # The command's own sentence, for what no plan could spend.
    beyond = r"^avg_bits must be between 2\.\d+ and 8\.\d+ for these schemes: got 8\.5$"
    with pytest.raises(UsageError, match=beyond):
        largest_that_fits(linears, schemes, 8.5)
    with caplog.at_level(logging.WARNING, "mixbits"):
        model = from_pretrained(llama, {"schemes": "w8a16,mxfp4", "avg_bits": 8.2345})
    assert {m.recipe.name for m in model.modules() if isinstance(m, PackedLinear)} == {"W8A16"}
    said = [r.getMessage() for r in caplog.records if r.name.startswith("mixbits")]
    assert len(said) == 1
    assert said[0].startswith("quantized without data: all 14 linears in W8A16, 8.")


def test_what_the_class_does_not_take_is_carried(tmp_path: Path) -> None:
    extra = torch.arange(6, dtype=torch.float32)
    folder = edit_weights(make_model(tmp_path / "m"), lambda t: t.update({"mtp.weight": extra}))
    from_pretrained(folder).save_pretrained(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["mtp.weight"], extra)
    told = read(tmp_path / "out" / "config.json")["quantization_config"]
    assert told["carried"] == ["mtp.weight"]
    mixbits.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_head_that_the_files_have_apart_stays_apart(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * -2

    folder = edit_weights(make_model(tmp_path / "m", tie_word_embeddings=True), edit)
    model = from_pretrained(folder)
    model.save_pretrained(tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    assert torch.equal(logits(mixbits.load(tmp_path / "out")), logits(model))


def test_another_dtype_than_the_files(llama: Path, tmp_path: Path) -> None:
    model = from_pretrained(llama, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert torch.equal(logits(mixbits.load(tmp_path)), logits(model))


# ------------------------------------------------------------------------------- plain errors


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"schemes": ["MXFP4"]}, "avg_bits must be a number of bits, up to 16: got None"),
        ({"avg_bits": 4.5}, "schemes must be names of schemes: got None"),
        ({**ASKED, "avg_bits": "4"}, "avg_bits must be a number of bits, up to 16: got '4'"),
        ({**ASKED, "avg_bits": float("nan")}, "avg_bits must be a number"),
        ({**ASKED, "bits": 4}, "takes schemes, avg_bits, .* act_scale_mode: got 'bits'"),
        ({**ASKED, "schemes": []}, "schemes must name schemes that pack weights: got none"),
        ({**ASKED, "schemes": ["BF16", "MXFP4"]}, r"pack weights: got \['BF16'\]"),
        ({**ASKED, "schemes": "MXFP5"}, "unknown scheme 'MXFP5'"),
        ({**ASKED, "act_scale_mode": "up"}, "scale mode must be one of .* got 'up'"),
        ({}, "schemes must be names of schemes: got None"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MixbitsConfig(**asked)


def test_a_source_that_is_packed_already_is_refused(llama: Path, tmp_path: Path) -> None:
    from_pretrained(llama).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"quantized by mixbits already, .* pass the original"):
        from_pretrained(tmp_path)
    told = read(tmp_path / "config.json")["quantization_config"]
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):  # as of lm-eval
        model = from_pretrained(tmp_path, told)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def test_a_source_in_codes_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(UsageError, match=f"{name} is stored as float8_e4m3fn"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"weights are missing: model\.layers\.1\.mlp"),
        ("model.layers.1.mlp.up_proj.weight", 0, r"must be finite: .*layers\.1\.mlp\.up_proj"),
        ("model.embed_tokens.weight", 0, r"must be finite: .*model\.embed_tokens\.weight"),
    ],
)
def test_weights_that_are_not_there_or_not_finite(
    name: str, value: int | None, said: str, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name].view(-1)[value] = torch.nan

    with pytest.raises(UsageError, match=said):
        from_pretrained(edit_weights(make_model(tmp_path / "m"), edit))


def test_a_budget_out_of_reach_and_a_part_are_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"avg_bits must be at least 4\.\d+, for one of MXFP4"):
        from_pretrained(llama, {"schemes": "MXFP4", "avg_bits": 4})
    with pytest.raises(UsageError, match="load it as LlamaForCausalLM, not as LlamaModel"):
        AutoModel.from_pretrained(llama, quantization_config=MixbitsConfig(**ASKED))
    model = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(UsageError, match="not from a state dict"):
        type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            quantization_config=MixbitsConfig(**ASKED),
        )
    folder_s = MixbitsConfig({"model.layers.0.mlp.up_proj": "MXFP4"}, 1, checksum="0" * 8)
    with pytest.raises(UsageError, match="quantized to schemes and avg_bits: got neither"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=folder_s)
