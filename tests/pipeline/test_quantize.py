"""The command line, end to end on tiny models: what it makes."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import KINDS, SMALL, add_tokenizer, entries, make_model, read
from transformers import AutoModelForCausalLM

import mixbits
from mixbits import quantize
from mixbits.checkpoint import folder as checkpoint
from mixbits.files.manifest import foreign
from mixbits.formats.menus import MENUS
from mixbits.formats.recipes import parse_recipe
from mixbits.model.layout import LinearInfo, find_linears
from mixbits.model.units import make_units
from mixbits.pipeline import process
from mixbits.planning.plan import average_bits
from mixbits.source.source import open_source


def check_reached(report: dict[str, Any], out: Path, linears: list[LinearInfo]) -> None:
    """What the report says of the plan's size is so."""
    plan = {
        name: parse_recipe(unit["scheme"])
        for unit in read(out / "plan.json")["units"]
        for name in unit["linears"]
    }
    reached = report["reached"]
    assert reached["avg_bits"] == average_bits(linears, plan) <= 5
    assert reached["avg_bits_without_scales"] == average_bits(linears, plan, True)
    assert len(set(plan.values())) == 2
    weights = (out / "model.safetensors").stat().st_size
    assert reached["predicted_bytes"] == report["bytes_after"] == weights


def check_told(report: dict[str, Any], out: Path, printed: str) -> None:
    """What is printed, the page and the card say what the report does."""
    verdict, reached = report["evaluation"]["verdict"], report["reached"]
    page = html.unescape((out / "report.html").read_text()).replace("\u00a0", " ")
    card, figures = (out / "README.md").read_text(), verdict["sentence"].partition(":")[2]
    assert all(figures in shown for shown in (printed, page, card))
    assert verdict["advice"] in printed and verdict["advice"] in page
    assert "4 bits" in verdict["advice"]  # that of MXFP4's activations
    assert not re.search(r"[\x00-\x08\x0b-\x1f]|%\|", printed)  # no bar without a terminal
    for number, stage in enumerate(process.STAGES, 1):
        assert f"[{number}/{len(process.STAGES)}] {stage}" in printed
    assert f"{reached['avg_bits']:.4f} bits per weight with everything counted" in printed


def test_everything_is_written_and_the_report_tells_it(
    run: Callable[..., int], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 5) == 0
    out = tmp_path / "out"
    assert entries(tmp_path) == ["out"]
    assert entries(out) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "mixbits-manifest.json",
        "model.safetensors",
        "plan.json",
        "report.html",
        "report.json",
        "scores.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert foreign(out) is None
    assert None not in read(out / "mixbits-manifest.json")["files"].values()
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    report = read(out / "report.json")
    assert report["budget"] == {"avg_bits": 5.0, "counted": "elements, scales and zero points"}
    source = open_source(str(shared / "llama"))
    check_reached(report, out, find_linears(source.load()))
    assert report["bytes_before"] == (shared / "llama" / "model.safetensors").stat().st_size
    assert [row["stage"] for row in report["stages"]] == list(process.STAGES)
    assert all(row["seconds"] >= 0 for row in report["stages"])
    assert all(row["peak_memory_bytes"] > 1e7 for row in report["stages"])
    held = report["evaluation"]["held_out"]
    assert held["kl"] > 0 and held["kl_stderr"] > 0
    assert held["perplexity"] > 1 and held["perplexity_reference"] > 1
    assert (held["nsamples"], held["seqlen"]) == (4, 32)
    assert report["command"].startswith("python -m mixbits.quantize ")
    assert report["command"].endswith(f"{' '.join(SMALL)} --avg-bits 5")
    for name in ("report.json", "report.html", "README.md", "plan.json", "scores.json"):
        assert str(tmp_path) not in (out / name).read_text(), name
        assert str(shared) not in (out / name).read_text(), name
    assert str(shared) not in (out / "config.json").read_text()
    verdict = report["evaluation"]["verdict"]
    ratio = held["perplexity"] / held["perplexity_reference"]
    assert verdict["perplexity_ratio"] == pytest.approx(ratio, rel=1e-12)
    assert verdict["top1_agreement"] == held["top1_agreement"]
    assert report["source"] == {"name": "llama", "sha256": source.sha256()}  # no path
    assert report["calibration"]["nsamples"] == 4 and report["calibration"]["seed"] == 0
    assert report["environment"]["mixbits"] == mixbits.__version__
    assert report["predicted_loss"] == read(out / "plan.json")["predicted_loss"] > 0
    check_told(report, out, capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind: str, run: Callable[..., int], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind)
    assert run("--avg-bits", 5, model=model) == 0
    scores = read(tmp_path / "out" / "scores.json")["linears"]
    linears = find_linears(open_source(str(model)).load())
    assert list(scores) == [info.name for info in linears]
    assert all(0 < row["scores"]["MXFP8"] < row["scores"]["MXFP4"] for row in scores.values())
    assert read(tmp_path / "out" / "report.json")["evaluation"]["held_out"]["kl"] > 0
    loaded = mixbits.load(tmp_path / "out")
    assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()
    assert not any(
        isinstance(m, torch.nn.Linear) for m in loaded.model.layers[0].self_attn.children()
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_single_experts_can_be_kept(kind: str, run: Callable[..., int], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind)
    assert (
        run("--avg-bits", 8, "--per-expert", "--keep", "*.0.mlp.experts.1.*=BF16", model=model) == 0
    )
    plan = {u["unit"]: u["scheme"] for u in read(tmp_path / "out" / "plan.json")["units"]}
    kept = {name for name, scheme in plan.items() if scheme == "BF16"}
    projections = ("gate_proj", "up_proj", "down_proj")
    assert kept == {f"model.layers.0.mlp.experts.1.{p}" for p in projections}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {n for n in stored if n.endswith(".weight_plain")} == {f"{n}.weight_plain" for n in kept}
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert read(tmp_path / "out" / "report.json")["reached"]["predicted_bytes"] == size


@pytest.mark.parametrize(("stored", "kept"), [("float32", "bfloat16"), ("float16", "float16")])
def test_models_of_other_dtypes(
    stored: str, kept: str, run: Callable[..., int], tmp_path: Path
) -> None:
    """float16 stays; a float32 model runs in bfloat16, but what is not quantized keeps its bits."""
    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights = {name: tensor.to(getattr(torch, stored)) for name, tensor in weights.items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = read(model / "config.json")
    (model / "config.json").write_text(json.dumps({**config, "dtype": stored}))
    assert run("--avg-bits", 5, model=model) == 0
    assert read(tmp_path / "out" / "config.json")["dtype"] == kept
    packed = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert packed[name].dtype == getattr(torch, stored)
    assert torch.equal(packed[name], weights[name])
    assert mixbits.load(tmp_path / "out").dtype == getattr(torch, kept)
    report = read(tmp_path / "out" / "report.json")
    assert report["bytes_after"] == report["reached"]["predicted_bytes"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_can_be_quantized(tied: bool, run: Callable[..., int], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    options = ("--quantize-lm-head", "--untie-head", "--keep", "lm_head=MXFP8")
    assert run("--avg-bits", 5, *options, model=model) == 0
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"lm_head.segments.0.weight_packed", "model.embed_tokens.weight"} <= names
    assert "lm_head.weight" not in names
    report = read(tmp_path / "out" / "report.json")
    assert report["bytes_after"] == report["reached"]["predicted_bytes"]
    embedding = mixbits.load(tmp_path / "out").get_input_embeddings().weight
    assert torch.equal(embedding, open_source(str(model)).load().get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe", "mixtral"])
def test_fake_is_a_plain_model(kind: str, run: Callable[..., int], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind)
    options = ("--avg-bits", "4.6", "--schemes", "MXFP4A16,MXFP8A16")
    assert run(*options, "--fake", model=model) == 0
    assert run(*options, model=model, out="packed") == 0
    assert "quantization_config" not in read(tmp_path / "out" / "config.json")
    plain, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(24)[None]
    packed = mixbits.load(tmp_path / "packed", dtype=torch.float32)(ids).logits
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(plain(ids).logits, packed, rtol=1e-4, atol=1e-4)
    assert (packed - original).abs().max() > 0.01


@pytest.mark.parametrize("method", ["fisher", "deltaloss"])
def test_solve_only_and_another_budget_from_the_same_scores(
    method: str, run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--avg-bits", 5, "--solve-only", "--method", method) == 0
    first = tmp_path / "out"
    names = ["mixbits-manifest.json", "plan.json", "report.html", "report.json", "scores.json"]
    assert entries(first) == names
    assert read(first / "report.json")["evaluation"] is None
    assert read(first / "report.json")["budget"]["avg_bits"] == 5.0
    assert run("--avg-bits", 7, "--solve-only", "--scores", first / "scores.json", out="b") == 0
    second = tmp_path / "b"
    assert (second / "scores.json").read_bytes() == (first / "scores.json").read_bytes()
    losses = [read(folder / "plan.json")["predicted_loss"] for folder in (first, second)]
    assert losses[1] < losses[0]


def test_scores_of_something_else_are_refused(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 5, "--solve-only") == 0
    scores = ("--scores", tmp_path / "out" / "scores.json", "--solve-only")
    other = make_model(tmp_path / "other", seed=1)
    for options, message in (
        ({"model": other}, "measured on another model"),
        ({"--schemes": "MXFP4,W8A16"}, "no scores for W8A16"),
        ({"--act-scale-mode": "rceil"}, "measured with scale mode even of activations: got rceil"),
    ):
        model = {k: v for k, v in options.items() if k == "model"}
        words = [w for k, v in options.items() if k != "model" for w in (k, v)]
        assert run(*scores, *words, out="b", **model) == 2
        assert message in capsys.readouterr().err
    assert entries(tmp_path) == ["other", "out"]


def test_an_edited_plan_is_applied(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--avg-bits", 5, "--rotate", "none", "--solve-only") == 0
    plan = read(tmp_path / "out" / "plan.json")
    del plan["units"][0]
    plan["units"][0]["scheme"] = "W4A16"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(plan))
    assert run("--plan", path, "--eval-nsamples", 0, out="b") == 0
    modules = read(tmp_path / "b" / "config.json")["quantization_config"]["modules"]
    assert modules["model.layers.0.self_attn.k_proj"] == "W4A16"
    assert "model.layers.0.self_attn.q_proj" not in modules
    report = read(tmp_path / "b" / "report.json")
    assert report["budget"] is None and report["predicted_loss"] is None
    assert not (tmp_path / "b" / "scores.json").exists()


def test_a_size_is_never_exceeded_and_well_used(
    run: Callable[..., int], shared: Path, tmp_path: Path
) -> None:
    assert run("--avg-bits", 5, "--rotate", "none", "--solve-only", out="scores") == 0
    scores = ("--scores", tmp_path / "scores" / "scores.json", "--solve-only", "--overwrite")
    source = open_source(str(shared / "llama"))
    model = source.load()
    linears = find_linears(model)

    def size(plan: dict[str, Any]) -> int:
        return checkpoint.predicted_bytes(model, linears, plan, source.dtype)

    four, eight = ({i.name: parse_recipe(s) for i in linears} for s in ("MXFP4", "MXFP8"))
    lowest, highest = size(four), size(eight)
    sizes = [lowest, highest, *(lowest + (highest - lowest) * i // 7 for i in range(1, 7))]
    # One byte less than a plan's size, so that the header's own length decides.
    sizes += [size({**four, **dict(list(eight.items())[:n])}) - 1 for n in range(1, len(linears))]
    for limit in [*sizes, highest - 1, highest + 10_000]:
        assert run("--size", limit, *scores) == 0
        data = read(tmp_path / "out" / "plan.json")
        plan = {n: parse_recipe(u["scheme"]) for u in data["units"] for n in u["linears"]}
        assert size(plan) <= limit
        for info in linears:
            if plan[info.name].name == "MXFP4":  # no room for one more, but for a header's length
                assert size({**plan, info.name: parse_recipe("MXFP8")}) > limit - 64
    assert size(plan) == highest


def test_dry_run_needs_config_json_only(
    run: Callable[..., int], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(shared / "llama" / "config.json", tmp_path / "bare")
    assert run("--dry-run", "--schemes", "MXFP4,W8A16", model=tmp_path / "bare") == 0
    out = capsys.readouterr().out
    assert entries(tmp_path) == ["bare"]
    linears = find_linears(open_source(str(shared / "llama")).load())
    assert out.startswith(f"14 linears in 14 units, {sum(i.numel for i in linears):,} weights\n")
    rows = [line.split() for line in out.splitlines()]
    assert ["down_proj", "2", "64", "172"] in rows
    for name in ("MXFP4", "W8A16", "BF16"):
        plan = {i.name: parse_recipe(name) for i in linears}
        bits = [f"{average_bits(linears, plan, ignore):.4f}" for ignore in (False, True)]
        assert [name, *bits] in [row[:3] for row in rows]


def test_the_same_command_gives_the_same_bytes(run: Callable[..., int], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen3_moe")
    names = ("scores.json", "plan.json", "model.safetensors", "config.json")
    runs = []
    for _ in range(2):
        assert run("--avg-bits", 5, "--overwrite", model=model) == 0
        runs.append({name: (tmp_path / "out" / name).read_bytes() for name in names})
    for name in names:
        assert runs[0][name] == runs[1][name], name


def test_fuse_and_prompt_and_lm_eval(run: Callable[..., int], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = add_tokenizer(make_model(tmp_path / "model", max_position_embeddings=1024))
    tasks = ("--tasks", "stdlib_next_line", "--limit", 2, "--eval-original")
    assert run("--avg-bits", 5, "--fuse", "--prompt", "def f", *tasks, model=model) == 0
    plan = {u["unit"]: u["linears"] for u in read(tmp_path / "out" / "plan.json")["units"]}
    assert len(plan) == 2 * 4  # q+k+v, o, gate+up, down
    result = read(tmp_path / "out" / "report.json")["evaluation"]
    assert result["sample"].startswith("def f")
    for which in ("tasks", "original_tasks"):
        assert 0 <= result[which]["tasks"]["stdlib_next_line"]["acc"] <= 1
        assert result[which]["limit"] == 2


def test_the_units_of_the_plan_are_the_models(run: Callable[..., int], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mixtral")
    assert run("--avg-bits", 5, "--solve-only", "--fuse", model=model) == 0
    linears = find_linears(open_source(str(model)).load())
    units = make_units(linears, fuse=True)
    data = read(tmp_path / "out" / "plan.json")["units"]
    assert [u["unit"] for u in data] == [unit.name for unit in units]
    assert [list(u["linears"]) for u in data] == [[i.name for i in u.linears] for u in units]


ARRANGED = {
    "slab": ["--granularity", "slab"],
    "free": ["--granularity", "slab", "--free-slabs"],
    "rotated": ["--rotate", "ffn"],
    "all": [],  # by default, since the schemes round activations
    "both": ["--granularity", "slab", "--rotate", "ffn"],
    "integers": ["--granularity", "slab", "--schemes", "W2A16G32,W4A16G32,W8A16G32"],
}


@pytest.mark.parametrize("how", ARRANGED)
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_arranged_columns(
    kind: str, how: str, run: Callable[..., int], shared: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", kind) if kind != "llama" else shared / "llama"
    assert run("--avg-bits", 6, *ARRANGED[how], model=model) == 0
    report = read(tmp_path / "out" / "report.json")
    assert report["reached"]["avg_bits"] <= 6
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["reached"]["predicted_bytes"] == report["bytes_after"] == weights
    stored = load_file(tmp_path / "out" / "model.safetensors")
    orders = [name for name in stored if name.endswith(".order")]
    assert bool(orders) == ("slab" in ARRANGED[how])
    plan = read(tmp_path / "out" / "plan.json")
    rotated = {name for unit in plan["units"] for name in unit.get("rotated", [])}
    names = {n for u in plan["units"] for n in u["linears"]}
    downs = {name for name in names if name.endswith(".down_proj")}
    by_default = set() if how == "integers" else names
    assert rotated == (downs if "--rotate" in ARRANGED[how] else by_default)
    assert report["evaluation"]["held_out"]["kl"] < 1
    # The plan alone gives the same file.
    given = ["--plan", tmp_path / "out" / "plan.json"]
    assert run(*given, model=model, out="again") == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


PAGES = ("report.html", "README.md")


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_a_plan_can_be_applied_to_a_fake_model(
    rounding: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 6, "--rotate", "ffn", "--rounding", rounding) == 0
    plan = ["--plan", tmp_path / "out" / "plan.json", "--fake", "--rounding", rounding]
    assert run(*plan, out="fake") == 0
    packed, fake = (read(tmp_path / out / "report.json") for out in ("out", "fake"))
    assert fake["reached"] == packed["reached"]
    # Scored with activations rounded, as the packed model runs; rotated weights are bfloat16 there.
    kl = [r["evaluation"]["held_out"]["kl"] for r in (fake, packed)]
    assert kl[0] == pytest.approx(kl[1], rel=0.1)
    told = [r["evaluation"].get("scored") for r in (fake, packed)]
    assert told == ["fake, activations rounded", None]
    for text in (capsys.readouterr().out, *((tmp_path / "fake" / n).read_text() for n in PAGES)):
        assert told[0] in text


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("granularity", ["layer", "slab"])
def test_fake_is_scored_as_the_packed_model_is(
    kind: str, granularity: str, run: Callable[..., int], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", kind)
    # Rotated, --fake would write its weights in bfloat16, which is another rounding.
    options = ("--rounding", "rtn", "--granularity", granularity, "--rotate", "none")
    kl = {}
    for schemes in ("MXFP4,MXFP8", "MXFP4A16,MXFP8A16"):
        for how in ([], ["--fake"]):
            words = ("--avg-bits", 5, "--schemes", schemes, *options, *how, "--overwrite")
            assert run(*words, model=model) == 0
            evaluation = read(tmp_path / "out" / "report.json")["evaluation"]
            kl[schemes, bool(how)] = evaluation["held_out"]["kl"]
            told = "rounded" if schemes.endswith("8") else "in 16 bits"
            assert evaluation.get("scored") == (f"fake, activations {told}" if how else None)
        assert kl[schemes, True] == pytest.approx(kl[schemes, False], rel=1e-3)
    both = kl["MXFP4,MXFP8", True], kl["MXFP4A16,MXFP8A16", True]
    assert both[0] > 1.1 * both[1]  # rounded activations show


def test_every_rounding_is_recorded_and_compensation_pays(
    run: Callable[..., int], tmp_path: Path
) -> None:
    kl = {}
    for rounding in ("rtn", "search", "gptq"):
        options = [
            "--avg-bits",
            4.3,
            "--rounding",
            rounding,
            "--nsamples",
            48,
            "--eval-nsamples",
            48,
        ]
        assert run(*options, out=rounding) == 0
        report = read(tmp_path / rounding / "report.json")
        assert report["rounding"]["method"] == rounding
        config = read(tmp_path / rounding / "config.json")["quantization_config"]
        assert config["rounding"] == report["rounding"]
        kl[rounding] = report["evaluation"]["held_out"]["kl"]
    assert kl["gptq"] < min(kl["search"], kl["rtn"])


def test_groups_that_scales_cannot_hold_are_counted(
    run: Callable[..., int], tmp_path: Path
) -> None:
    """NVFP4: scales of a tensor lie within 2^18 of each other."""
    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 16:48] *= 2.0**-24
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    how = ("--schemes", "NVFP4A16,MXFP8A16", "--keep", "*=NVFP4A16", "--rounding", "search")
    assert run("--avg-bits", 4.5078, "--gate", 0, *how, model=model) == 0
    assert read(tmp_path / "out" / "report.json")["rounding"]["lost_groups"] == 2


def test_the_menu_is_told(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [*SMALL[: SMALL.index("--schemes")], "--rounding", "rtn", "--solve-only"]
    quick += ["--dataset", str(shared / "ids.npy"), "--device", "cpu"]

    def menu(*options: str) -> object:
        words = [str(shared / "llama"), "--out", str(tmp_path / "out"), "--overwrite"]
        assert quantize.main([*words, *quick, *options]) == 0
        return read(tmp_path / "out" / "report.json")["menu"]

    why = menu()
    assert str(why).startswith("the menu cpu: ")
    assert f"to choose from: {', '.join(MENUS['cpu'])} ({why})" in capsys.readouterr().out
    assert str(menu("--granularity", "slab")).startswith("the menu portable: ")
    assert menu("--target", "gguf", "--ignore", "*.down_proj") == "what gguf holds"
    assert menu("--schemes", "w4a4", "--avg-bits", "5") is None
