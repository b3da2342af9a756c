"""What cannot come to its end is refused before anything is measured, from shapes and headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import entries, make_model, read
from transformers import AutoModelForCausalLM, ZambaConfig

import mixbits
from mixbits.checkpoint.stock import rehearse
from mixbits.errors import UsageError
from mixbits.files import atomic
from mixbits.formats.recipes import parse_recipe
from mixbits.pipeline import feasibility
from mixbits.pipeline.options import parse_arguments
from mixbits.pipeline.run import Run, prepare
from mixbits.source.source import open_source


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened, and nothing measured."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("mixbits.pipeline.process.quantize", fail)


def prepared(model: Path, *options: object) -> Run:
    words = [model, "--dataset", "none.npy", "--seqlen", 32, "--out", model.parent / "o", *options]
    return prepare(parse_arguments([*map(str, words), "--device", "cpu"]))


SLABS = ("--granularity", "slab")
OUT_OF_REACH: dict[str, tuple[tuple[object, ...], str]] = {
    "few bits": (("--avg-bits", 3), "between 4.2571 and 8.2571 for these schemes: got 3"),
    "many bits": (("--avg-bits", 9), "between 4.2571 and 8.2571"),
    "elements": (("--avg-bits", 4.2, "--ignore-scale-bits", "--schemes", "W8A16G32"), "8 and 8"),
    "kept": (("--avg-bits", 4.3, "--keep", "*.down_proj=MXFP8"), "between 5.2289 and 8.2571"),
    "kept slabs": (("--avg-bits", 4.3, "--keep", "*.up_proj=MXFP8", *SLABS), "--avg-bits must be"),
    "a few bytes": (("--size", "20kB"), "--size must be at least"),
    "slabs": (("--size", "20kB", *SLABS), "--size must be at least"),
    "uniform": (("--avg-bits", 3, "--strategy", "uniform"), "between 4.2571 and 8.2571"),
    "no unit": (("--size", "4.2"), "must have a unit: got '4.2' (4.2GB?)"),
    "no budget": (("--schemes", "MXFP8"), "got 4.5, which is the default (MXFP8)"),
    "a target": (("--target", "vllm"), "try --schemes W4A16G64,W8A16G64 --ignore '*.down_proj'"),
    "kept for it": (("--target", "gguf", "--schemes", "MXFP4A16", "--ignore", "*.down_proj",
                     "--keep", "*.k_proj=MXFP8"), "try --ignore '*.k_proj' instead"),
    "a leaf": (("--keep", "down_proj=MXFP8"), "matches no unit, such as model.layers.0.self_attn."
               "q_proj; '*.down_proj' would"),
    "another option": (("--bits", 4), "unrecognized arguments: --bits 4 (--avg-bits?)"),
}  # fmt: skip


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("case", OUT_OF_REACH)
def test_what_is_out_of_reach(
    case: str,
    dry: bool,
    run: Callable[..., int],
    untouched: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, expected = OUT_OF_REACH[case]
    if dry and case == "no budget":
        pytest.skip("nothing is asked for")
    assert run(*options, *["--dry-run"] * dry) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert entries(tmp_path) == []


@pytest.mark.parametrize("how", [(), SLABS, ("--per-expert",)], ids=["", "slab", "per-expert"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_range_is_right_to_the_byte(kind: str, how: tuple[str, ...], tmp_path: Path) -> None:
    """What is named as the least is accepted, and a byte less is not."""
    model = make_model(tmp_path / "model", kind)
    keep = ("--keep", "*.q_proj=W8A16", "--schemes", "MXFP4,W8A16G32", *how)
    with pytest.raises(UsageError, match=r"at least ([\d,]+) bytes") as caught:
        feasibility.check_budget(prepared(model, "--size", "20kB", *keep))
    least = int(str(caught.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert feasibility.check_budget(prepared(model, "--size", least, *keep)) == least
    with pytest.raises(UsageError, match=f"at least {least:,} bytes"):
        feasibility.check_budget(prepared(model, "--size", least - 1, *keep))


def test_the_least_size_that_is_accepted_can_be_had(
    run: Callable[..., int], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    least = feasibility.check_budget(prepared(model, "--max-kl", 1, "--schemes", "MXFP4,MXFP8"))
    assert run("--size", least, "--rounding", "rtn", model=model) == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == least


# --- folders that would not load -----------------------------------------------------------------


def with_head(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A model whose config.json ties the head, and whose files have another."""
    make_model(folder, kind, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    shape = tensors["model.embed_tokens.weight"].shape
    tensors["lm_head.weight"] = torch.randn(shape, generator=torch.Generator()).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**read(folder / "config.json"), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("options", [(), ("--quantize-lm-head",), ("--fake",)])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_head_of_its_own_stays_that(
    kind: str, options: tuple[str, ...], run: Callable[..., int], tmp_path: Path
) -> None:
    model = with_head(tmp_path / "model", kind)
    words = ("--schemes", "W8A16G32", "--size", "1GB", "--rounding", "rtn", *options)
    assert run(*words, model=model) == 0
    out = tmp_path / "out"
    assert read(out / "config.json")["tie_word_embeddings"] is False
    loaded = open_source(str(out)).load() if "--fake" in options else mixbits.load(out)
    ids = torch.arange(24)[None]
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    assert original.lm_head.weight is not original.model.embed_tokens.weight
    wanted, got = original(ids).logits.float(), loaded(ids).logits.float()
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    sizes = read(out / "report.json")
    assert "--fake" in options or sizes["bytes_after"] == sizes["reached"]["predicted_bytes"]


def test_a_head_that_is_stored_twice_is_tied(tmp_path: Path) -> None:
    model = with_head(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(model))
    assert "lm_head.weight" in source.shapes.all_tied_weights_keys and not source.untied


ZAMBA: dict[str, Any] = {
    "vocab_size": 130,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_head_dim": 32,
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "n_mamba_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def zamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zamba") / "model"
    model = AutoModelForCausalLM.from_config(ZambaConfig(**ZAMBA), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("same", [True, False])
def test_blocks_that_share_linears(same: bool, zamba: Path, tmp_path: Path) -> None:
    """Stored twice they are one, if they are equal; if not, they cannot be what the class makes."""
    model = tmp_path / "model"
    shutil.copytree(zamba, model)
    tensors = load_file(model / "model.safetensors")
    first, second = (f"model.layers.{i}.shared_transf.self_attn.q_proj.weight" for i in (1, 3))
    tensors[second] = tensors[first].clone() if same else tensors[first] * 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if same:
        feasibility.check(
            prepared(model, "--schemes", "W8A16G32", "--avg-bits", 8.5, "--allow-partial")
        )
        return
    with pytest.raises(UsageError, match=rf"shares {second} with {first}: got other values"):
        prepared(model, "--schemes", "W8A16G32", "--avg-bits", 8.5, "--allow-partial")


def test_what_the_loader_would_refuse_is_refused_first(tmp_path: Path) -> None:
    """A plan for a linear that only the model in hand has, and a layout that was changed."""
    run = prepared(make_model(tmp_path / "model"), "--schemes", "W8A16G32", "--size", "1GB")
    plan = {info.name: parse_recipe("W8A16G32") for info in run.linears}
    rehearse(run.source, run.shapes, run.linears, plan)
    run.shapes.model.layers[0].mlp.register_buffer("extra", torch.empty(3, device="meta"))
    with pytest.raises(UsageError, match=r"layers.0.mlp.extra must be none: got BF16 \[3\]"):
        rehearse(run.source, run.shapes, run.linears, plan)


# --- a tied head, disks and memories -------------------------------------------------------------


def test_a_tied_head_makes_no_files_larger_unsaid(
    run: Callable[..., int], untouched: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    options = ("--avg-bits", 5, "--quantize-lm-head")
    assert run(*options, model=model) == 2
    told = capsys.readouterr().err
    assert "in MXFP4 beside it" in told and "--untie-head" in told
    assert run(*options, "--dry-run", model=model) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "beside it" in x)
    assert " kB larger" in line
    assert feasibility.check_head(prepared(model, *options, "--untie-head"))
    assert feasibility.check_head(prepared(model, *options, "--keep", "lm_head=BF16")) == []
    untied = make_model(tmp_path / "untied")
    assert feasibility.check_head(prepared(untied, *options)) == []


@pytest.mark.parametrize("how", ["", "--fake", "--solve-only"])
def test_a_small_disk(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(make_model(tmp_path / "model"), "--avg-bits", 5, *([how] if how else []))
    needed = feasibility.room(run, feasibility.check_budget(run))
    plain = run.predicted_bytes({})
    assert needed == {"--fake": plain, "--solve-only": 0}.get(how, needed) < plain + 1
    free = shutil.disk_usage(tmp_path)._replace(free=max(needed - 1, 0))
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: free)
    if how == "--solve-only":
        feasibility.check(run)
    else:
        with pytest.raises(UsageError, match=f"bytes free: {needed:,} are needed"):
            feasibility.check(run)


def test_a_small_memory(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    run = prepared(model, "--avg-bits", 5, "--batch-size", 4)
    logits = 2 * 4 * 32 * 130 * 4
    assert {what: n for n, what, _ in feasibility.needs(run)}[
        "the logits of a batch, twice"
    ] == logits
    feasibility.check_memory(run, max(n for n, _, _ in feasibility.needs(run)))
    with pytest.raises(UsageError, match=r"takes .* lower it with --batch-size or --seqlen"):
        feasibility.check_memory(run, logits - 1)
    quick = prepared(model, "--effort", "quick", "--eval-nsamples", 0)
    assert "second moments of the widest input" not in [
        what for _, what, _ in feasibility.needs(quick)
    ]
    assert feasibility.available_memory() > 1 << 20
