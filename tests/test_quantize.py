"""The command line, end to end on tiny models: what it makes, what it refuses, what it leaves."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import KINDS, VOCAB, add_tokenizer, make_model, write_ids
from transformers import AutoModelForCausalLM

import mixbits
from mixbits import checkpoint, quantize
from mixbits.formats import parse_scheme
from mixbits.model import find_linears, make_units
from mixbits.plan import average_bits
from mixbits.source import open_source

SMALL = ["--nsamples", "4", "--seqlen", "32", "--eval-nsamples", "4"]
KILLS = int(os.environ.get("MIXBITS_TEST_KILLS", "4"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llama` (and its tokenizer) and `ids.npy`; tests only read it."""
    folder = tmp_path_factory.mktemp("shared")
    add_tokenizer(make_model(folder / "llama"))
    write_ids(folder / "ids.npy")
    return folder


@pytest.fixture
def run(shared: Path, tmp_path: Path) -> Callable[..., int]:
    """`run(*options, model=, out=)`: quantize with little text, into tmp_path/out."""

    def call(*options: object, model: object = shared / "llama", out: str = "out") -> int:
        words = [model, "--out", tmp_path / out, "--dataset", shared / "ids.npy", *SMALL, *options]
        return quantize.main([str(word) for word in words])

    return call


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --------------------------------------------------------------------------------- what it makes


def test_everything_is_written_and_the_report_tells_it(
    run: Callable[..., int], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 5) == 0
    out = tmp_path / "out"
    assert entries(tmp_path) == ["out"]
    assert entries(out) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "plan.json",
        "report.json",
        "scores.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    report = read(out / "report.json")
    assert report["budget"] == {"avg_bits": 5.0, "counted": "elements, scales and zero points"}
    source = open_source(str(shared / "llama"))
    linears = find_linears(source.load())
    plan = {
        name: parse_scheme(unit["scheme"])
        for unit in read(out / "plan.json")["units"]
        for name in unit["linears"]
    }
    reached = report["reached"]
    assert reached["avg_bits"] == average_bits(linears, plan) <= 5
    assert reached["avg_bits_without_scales"] == average_bits(linears, plan, True)
    assert len(set(plan.values())) == 2
    weights = (out / "model.safetensors").stat().st_size
    assert reached["predicted_bytes"] == report["bytes_after"] == weights
    assert report["bytes_before"] == (shared / "llama" / "model.safetensors").stat().st_size
    assert [row["stage"] for row in report["stages"]] == list(quantize.STAGES)
    assert all(row["seconds"] >= 0 for row in report["stages"])
    assert all(row["peak_memory_bytes"] > 1e7 for row in report["stages"])
    held = report["evaluation"]["held_out"]
    assert held["kl"] > 0 and held["kl_stderr"] > 0
    assert held["perplexity"] > 1 and held["perplexity_reference"] > 1
    assert (held["nsamples"], held["seqlen"]) == (4, 32)
    assert report["command"].startswith("python -m mixbits.quantize ")
    assert report["command"].endswith(f"{' '.join(SMALL)} --avg-bits 5")
    assert report["source"] == {"name": str(shared / "llama"), "sha256": source.sha256()}
    assert report["calibration"]["nsamples"] == 4 and report["calibration"]["seed"] == 0
    assert report["environment"]["mixbits"] == mixbits.__version__
    assert report["predicted_loss"] == read(out / "plan.json")["predicted_loss"] > 0
    printed = capsys.readouterr().out
    for number, stage in enumerate(quantize.STAGES, 1):
        assert f"[{number}/6] {stage}" in printed
    assert f"{reached['avg_bits']:.4f} bits per weight with everything counted" in printed


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


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_can_be_quantized(tied: bool, run: Callable[..., int], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    assert run("--avg-bits", 5, "--quantize-lm-head", "--keep", "lm_head=MXFP8", model=model) == 0
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= names
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
    assert entries(first) == ["plan.json", "report.json", "scores.json"]
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
        ({"--act-scale-mode": "rceil"}, "measured with scale modes"),
    ):
        model = {k: v for k, v in options.items() if k == "model"}
        words = [w for k, v in options.items() if k != "model" for w in (k, v)]
        assert run(*scores, *words, out="b", **model) == 2
        assert message in capsys.readouterr().err
    assert entries(tmp_path) == ["other", "out"]


def test_held_out_text_follows_what_the_scores_were_measured_on(
    run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--avg-bits", 5, "--nsamples", 9) == 0
    scores = tmp_path / "out" / "scores.json"
    assert run("--avg-bits", 5, "--nsamples", 2, "--scores", scores, out="b") == 0
    a, b = (read(tmp_path / x / "report.json")["evaluation"]["held_out"] for x in ("out", "b"))
    assert a["sha256"] == b["sha256"] and a["kl"] == b["kl"]


def test_an_edited_plan_is_applied(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--avg-bits", 5, "--solve-only") == 0
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


def test_a_size_is_never_exceeded_and_well_used(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--avg-bits", 5, "--solve-only", out="scores") == 0
    scores = ("--scores", tmp_path / "scores" / "scores.json", "--solve-only", "--overwrite")
    source = open_source(str(read(tmp_path / "scores" / "report.json")["source"]["name"]))
    model = source.load()
    linears = find_linears(model)

    def size(plan: dict[str, Any]) -> int:
        return checkpoint.predicted_bytes(model, linears, plan, source.dtype)

    four, eight = ({i.name: parse_scheme(s) for i in linears} for s in ("MXFP4", "MXFP8"))
    lowest, highest = size(four), size(eight)
    sizes = [lowest, highest, *(lowest + (highest - lowest) * i // 7 for i in range(1, 7))]
    for limit in [*sizes, highest + 10_000]:
        assert run("--size", limit, *scores) == 0
        data = read(tmp_path / "out" / "plan.json")
        plan = {n: parse_scheme(u["scheme"]) for u in data["units"] for n in u["linears"]}
        assert size(plan) <= limit
        for info in linears:
            if plan[info.name].name == "MXFP4":  # no room for one more, but for a header's length
                assert size({**plan, info.name: parse_scheme("MXFP8")}) > limit - 64
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
        plan = {i.name: parse_scheme(name) for i in linears}
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


def test_one_held_out_sequence_has_no_standard_error(
    run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--avg-bits", 5, "--eval-nsamples", 1) == 0
    assert read(tmp_path / "out" / "report.json")["evaluation"]["held_out"]["kl_stderr"] is None


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


def test_a_task_that_fails_leaves_the_rest(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lm_eval = pytest.importorskip("lm_eval")

    def fail(**kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
    assert "no network" in refused(run("--avg-bits", 5, "--tasks", "stdlib_next_line"), capsys)
    assert read(tmp_path / "out" / "report.json")["evaluation"]["held_out"]["kl"] > 0
    mixbits.load(tmp_path / "out")


# ------------------------------------------------------------------------------- what it refuses


def refused(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The error, after checking that it is one sentence and nothing else is on stderr."""
    captured = capsys.readouterr()
    assert code == 2
    lines = [line for line in captured.err.replace("\r", "\n").splitlines() if "|" not in line]
    message = "".join(lines[-1:])
    assert message.startswith("error: ")
    assert [line for line in lines if line.strip()] == [message]
    return message


def _without(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return change


def _poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _forget(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (_without("config.json"), "must hold config.json"),
    "config no json": (lambda f: (f / "config.json").write_text('{"a": '), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "config of nothing": (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    "unknown type": (_config(model_type="no_such_model"), "no_such_model"),
    "an encoder-decoder": (_config(model_type="t5"), "model"),
    "nonsense in config": (_config(hidden_size="wide"), "config.json"),
    "other sizes": (_config(intermediate_size=176), "another shape than config.json says"),
    "no safetensors": (_without("*.safetensors"), "no *.safetensors file in"),
    "pickle only": (_pickle_only, "pytorch_model.bin is a pickle and is not loaded"),
    "truncated": (_truncate, "is the file complete?"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is the file complete?"),
    "NaN": (_poison, "model.layers.1.mlp.up_proj.weight"),
    "a tensor missing": (_forget, "model.layers.1.mlp.up_proj.weight"),
    "quantized": (_config(quantization_config={"quant_method": "gptq"}), "is quantized already"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(
    case: str,
    run: Callable[..., int],
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(shared / "llama", tmp_path / "model")
    change, expected = BAD_MODELS[case]
    change(tmp_path / "model")
    code = run("--avg-bits", 5, model=tmp_path / "model")
    assert expected in refused(code, capsys)
    assert entries(tmp_path) == ["model"]


TEXTS = {"empty.txt": "", "short.txt": "too short", "notext.jsonl": '{"prompt": "x"}\n'}
BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "no budget of that kind": (["--avg-bits", "many"], "--avg-bits: must be above 0"),
    "unknown scheme": (["--schemes", "MXFP4,MXFP5"], "unknown scheme 'MXFP5': known are MXFP4"),
    "no scheme": (["--schemes", "MXFP4,"], "unknown scheme ''"),
    "too few bits": (["--avg-bits", "3"], "between 4.2571 and 8.2571"),
    "too many bits": (["--avg-bits", "12"], "between 4.2571 and 8.2571"),
    "too small": (["--size", "1kB"], "--size must be at least"),
    "bad size": (["--size", "much"], "--size: must be a size such as 4.2GB"),
    "negative size": (["--size", "-1GB"], "--size"),
    "zero size": (["--size", "0GB"], "--size: must be a size"),
    "two budgets": (["--size", "1GB", "--avg-bits", "5"], "not allowed with argument"),
    "bad keep": (["--keep", "down_proj"], "--keep must be PATTERN=SCHEME"),
    "keep of nothing": (["--keep", "*.no_proj=MXFP8"], "matches no unit"),
    "bad regex": (["--keep", "re:*=MXFP8"], "is not a regular expression"),
    "unknown option": (["--avg-bit-width", "5"], "unrecognized arguments"),
    "unknown strategy": (["--strategy", "best"], "invalid choice: 'best'"),
    "unknown method": (["--method", "guess"], "invalid choice: 'guess'"),
    "long sequences": (["--seqlen", "100"], "--seqlen must be at most 64"),
    "short sequences": (["--seqlen", "1"], "--seqlen must be at least 2"),
    "no sequences": (["--nsamples", "0"], "--nsamples: must be a whole number"),
    "negative held-out": (["--eval-nsamples", "-1"], "--eval-nsamples must be at least 0"),
    "empty text": (["--dataset", "{}/empty.txt"], "got 0 from"),
    "short text": (["--dataset", "{}/short.txt"], "need 8 sequences of 32 tokens"),
    "no text field": (["--dataset", "{}/notext.jsonl"], "with a field 'text'"),
    "no dataset": (["--dataset", "{}/no.txt"], "is no file"),
    "short held-out": (["--eval-dataset", "{}/short.txt"], "need 4 sequences of 32 tokens"),
    "large ids": (["--dataset", "{}/large.npy"], "must be in 0..129, the model's vocabulary"),
    "no scores": (["--scores", "{}/no.json"], "cannot read"),
    "no plan": (["--plan", "{}/no.json"], "cannot read"),
    "plan and keep": (["--plan", "{}/no.json", "--keep", "*=MXFP4"], "cannot go with --plan"),
    "plan and scores": (["--plan", "{}/no.json", "--scores", "x"], "cannot go with --plan"),
    "plan and fuse": (["--plan", "{}/no.json", "--fuse"], "cannot go with --plan"),
    "ignored scales": (["--size", "1GB", "--ignore-scale-bits"], "counts for --avg-bits only"),
    "unknown backend": (["--backend", "abacus"], "backend must be one of"),
    "unknown device": (["--device", "abacus"], "--device abacus cannot be used"),
    "unknown task": (["--tasks", "stdlib_next_line,no_such_task"], "no_such_task"),
    "no task folder": (["--tasks", "x", "--include-path", "{}/no"], "--include-path must be"),
    "out in a file": (["--out", "{}/short.txt/out"], "must lie in a writable folder"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(
    case: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    write_ids(tmp_path / "large.npy", vocab_size=VOCAB + 1)
    before = entries(tmp_path)
    options, expected = BAD_OPTIONS[case]
    code = run(*(word.format(tmp_path) for word in options))
    assert expected in refused(code, capsys)
    assert entries(tmp_path) == before


def test_no_model(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "MODEL is required" in refused(quantize.main([]), capsys)
    for model in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        assert "is no folder" in refused(run(model=model), capsys)
    assert entries(tmp_path) == []


def test_what_needs_a_tokenizer_says_so(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("text " * 1000)
    for option, value in (
        ("--prompt", "x"),
        ("--tasks", "x"),
        ("--dataset", tmp_path / "text.txt"),
    ):
        assert "tokenizer" in refused(run(option, value, model=model), capsys)
    assert entries(tmp_path) == ["model", "text.txt"]


def test_an_existing_folder(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "exists: pass --overwrite" in refused(run(), capsys)
    assert "is no mixbits output" in refused(run("--overwrite"), capsys)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_its_own_output_is_no_input(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 5, "--eval-nsamples", 0) == 0
    capsys.readouterr()
    code = run("--avg-bits", 5, model=tmp_path / "out", out="again")
    assert "is quantized already" in refused(code, capsys)
    assert entries(tmp_path) == ["out"]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "mixbits.quantize", *map(str, words)]


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_names_that_cannot_be_fetched(what: str, shared: Path, tmp_path: Path) -> None:
    model = "nobody/no-such-model" if what == "model" else shared / "llama"
    done = subprocess.run(
        command(model, "--dataset", "nobody/no-such-text", "--out", tmp_path / "out", *SMALL),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'nobody/no-such-")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not [name for name in entries(tmp_path) if name != "hub"]


# ---------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB: less than a tiny packed model takes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("options", [[], ["--fake"]])
def test_a_full_disk_is_seen_before_anything_is_written(
    options: list[str],
    run: Callable[..., int],
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "bytes free" in refused(run("--avg-bits", 5, *options, out="disk/out"), capsys)
    assert entries(small_disk) == []


@pytest.mark.parametrize("options", [[], ["--fake"], ["--solve-only"]])
def test_a_disk_that_fills_up_midway(
    options: list[str],
    run: Callable[..., int],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plenty = shutil.disk_usage(small_disk)._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)
    if options == ["--solve-only"]:
        (small_disk / "filler").write_bytes(bytes(60 << 10))
    code = run("--avg-bits", 5, *options, out="disk/out")
    assert "the disk is full" in refused(code, capsys)
    assert entries(small_disk) in ([], ["filler"])


@pytest.mark.parametrize("stage", ["weights", "text"])
@pytest.mark.parametrize("options", [[], ["--fake"]])
def test_a_simulated_full_disk(
    stage: str,
    options: list[str],
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import safetensors.torch
    import transformers.modeling_utils
    from safetensors import SafetensorError

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Io error: No space left on device (os error 28)")

    def full_text(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if stage == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", full)
        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    else:
        monkeypatch.setattr(shutil, "copyfile", full_text)
    assert "the disk is full" in refused(run("--avg-bits", 5, *options), capsys)
    assert entries(tmp_path) == []


# ------------------------------------------------------------------------------------- killed


def start(shared: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    words = [shared / "llama", "--out", tmp_path / "out", "--dataset", shared / "ids.npy"]
    return subprocess.Popen(
        command(*words, *SMALL, "--overwrite", "--avg-bits", "5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def whole_or_absent(tmp_path: Path) -> bool:
    """Whether there is an output, after checking that it is whole."""
    out = tmp_path / "out"
    if not out.exists():
        return False
    assert torch.isfinite(mixbits.load(out)(torch.arange(8)[None]).logits).all()
    assert read(out / "report.json")["mixbits_report"] == 1
    return True


def test_sigkill_leaves_all_or_nothing(shared: Path, tmp_path: Path) -> None:
    """Killed at random moments; MIXBITS_TEST_KILLS sets how many."""
    begin = time.monotonic()
    process = start(shared, tmp_path)
    process.communicate()
    whole = time.monotonic() - begin
    assert process.returncode == 0 and whole_or_absent(tmp_path)
    shutil.rmtree(tmp_path / "out")
    rng = random.Random(0)
    for _ in range(KILLS):
        # Most of the time goes into imports: half of the moments lie where files are written.
        moment = rng.random() if rng.random() < 0.5 else rng.uniform(0.75, 1)
        process = start(shared, tmp_path)
        try:
            process.wait(moment * whole)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        whole_or_absent(tmp_path)
    assert start(shared, tmp_path).wait() == 0
    assert whole_or_absent(tmp_path)
    assert entries(tmp_path) == ["out"]  # the killed ones' folders are gone too


class Killed(BaseException):
    """In place of SIGKILL: what has been done so far stays, nothing more is done."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step_of_the_exchange(
    overwrite: bool, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork dies at each file-system call in turn; the folder is whole or absent afterwards."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    pattern = tmp_path / "pattern"
    assert run("--avg-bits", 5, "--eval-nsamples", 0, out="pattern") == 0
    for step in range(100):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(pattern, out)
        pid = os.fork()
        if pid == 0:
            left = [step]

            def audit(event: str, arguments: Any, left: list[int] = left) -> None:
                if event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}:
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1

            sys.addaudithook(audit)
            with checkpoint.atomic_folder(out, overwrite) as folder:
                for path in pattern.iterdir():
                    shutil.copyfile(path, folder / path.name)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        whole_or_absent(tmp_path)
        if not os.WIFSIGNALED(status):
            break
    assert 0 < step < 99
    with checkpoint.atomic_folder(out, overwrite=True) as folder:
        (folder / "plan.json").write_text("{}")
    assert entries(tmp_path) == ["out", "pattern"]


def test_sigterm_leaves_neither_output_nor_partial_folder(shared: Path, tmp_path: Path) -> None:
    process = start(shared, tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"[4/6]"):  # the next thing it does is write
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (143, -15)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_files_are_written_leaves_nothing(
    number: signal.Signals,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*args: Any) -> None:
        assert any(".partial-" in name for name in entries(tmp_path))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(checkpoint, "copy_companions", stop)
    if number == signal.SIGINT:
        assert run("--avg-bits", 5) == 1
    else:
        with pytest.raises(SystemExit):
            run("--avg-bits", 5)
    assert entries(tmp_path) == []


def test_the_units_of_the_plan_are_the_models(run: Callable[..., int], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mixtral")
    assert run("--avg-bits", 5, "--solve-only", "--fuse", model=model) == 0
    linears = find_linears(open_source(str(model)).load())
    units = make_units(linears, fuse=True)
    data = read(tmp_path / "out" / "plan.json")["units"]
    assert [u["unit"] for u in data] == [unit.name for unit in units]
    assert [list(u["linears"]) for u in data] == [[i.name for i in u.linears] for u in units]
