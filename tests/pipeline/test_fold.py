"""--rotate fold: what is written is plain for any engine, and compared with the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export, loaded, logits
from safetensors.torch import load_file
from tiny import SMALL, entries, make_model, read, write_ids
from transformers import AutoModelForCausalLM

import mixbits
from mixbits.quantize import main
from mixbits.source.folded import Folded
from mixbits.source.source import open_source

PLAIN = ["--nsamples", "4", "--seqlen", "32", "--eval-nsamples", "4", "--gate", "0"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tied model whose norms are no ones."""
    return make_source(tmp_path / "model")


def make_source(folder: Path, kind: str = "qwen2", **overrides: object) -> Path:
    make_model(folder, kind, intermediate_size=160, **overrides)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.data.uniform_(0.3, 1.7)
    model.save_pretrained(folder)
    return folder


def run(source: Path, out: str, *words: str) -> Path:
    """The folder that a run has written, on text of its own."""
    folder = source.parent / out
    assert command(source, out, *words) == 0
    return folder


def command(source: Path, out: str, *words: str) -> int:
    ids = source.parent / "ids.npy"
    if not ids.exists():
        write_ids(ids)
    given = [str(source), "--dataset", str(ids), "--out", str(source.parent / out), *words]
    return main(given)


def test_the_folder_is_plain_and_says_so(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(source, "out", *SMALL, "--rotate", "fold", "--avg-bits", "5", "--rounding", "search")
    said = capsys.readouterr().out
    assert "inputs of 2 linears are not rotated (down_proj)" in said
    assert (
        "the head, which was tied to the embedding, has weights of its own: 16.64 kB more" in said
    )
    report, scores, plan = (read(out / f"{n}.json") for n in ("report", "scores", "plan"))
    sha256 = open_sha256(source)
    told = {"name": "model", "sha256": sha256, "folded": True}
    assert report["source"] == scores["model"] == told and plan["folded"] is True
    config = read(out / "config.json")
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["source"] == told
    assert all(isinstance(m, str) for m in config["quantization_config"]["modules"].values())
    state = load_file(out / "model.safetensors")
    assert (state["model.norm.weight"] == 1).all() and state[
        "lm_head.weight"
    ].dtype == torch.bfloat16
    assert report["reached"]["predicted_bytes"] == report["bytes_after"]
    assert 0 < report["evaluation"]["held_out"]["kl"] < 0.1
    assert "in a rotated basis" in (out / "README.md").read_text()
    assert entries(source.parent) == ["ids.npy", "model", "out"]  # no scratch is left


def distance(model: Any, reference: Any) -> float:
    """The norm of the difference of logits over that of the reference's."""
    found, expected = logits(model), logits(reference)
    return float((found - expected).norm() / expected.norm())


def open_sha256(folder: Path) -> str:
    source = open_source(str(folder))
    source.load()
    return source.sha256()


def test_what_is_left_alone_gives_the_logits_of_the_original(source: Path) -> None:
    """Nothing quantized: in bfloat16 the folded weights are rounded, and that is all."""
    out = run(source, "out", *PLAIN, "--schemes", "BF16", "--avg-bits", "16", "--rotate", "fold")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert 1e-5 < distance(mixbits.load(out), original) < 0.02
    assert read(out / "report.json")["evaluation"]["held_out"]["kl"] < 1e-4


@pytest.mark.parametrize(
    ("target", "schemes", "dtype"),
    [
        ("compressed-tensors", "MXFP4A16,MXFP8A16", torch.bfloat16),
        ("auto-round", "W4A16G32,W8A16G32", torch.float16),
    ],
)
def test_other_engines_compute_the_same(
    source: Path, target: str, schemes: str, dtype: torch.dtype
) -> None:
    more = ["--target", target, "--rotate", "fold", "--rounding", "search"]
    out = run(source, "out", *PLAIN, "--schemes", schemes, "--avg-bits", "6", *more)
    exported = loaded(export(out, target), dtype=dtype)
    ours = mixbits.load(out, dtype=dtype)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert 4 * distance(exported, ours) < distance(ours, original) < 0.5
    assert not exported.config.tie_word_embeddings


def test_scores_and_plans_of_the_other_basis_are_refused(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--avg-bits", "5", "--solve-only"]
    folded = run(source, "folded", *words, "--rotate", "fold")
    as_it_is = run(source, "plain", *words, "--rotate", "none")
    capsys.readouterr()
    for option in ("scores", "plan"):
        for made, more, wanted in (
            (folded, [], "must be of the model as it is: got one of the model folded"),
            (as_it_is, ["--rotate", "fold"], "must be of the model folded (--rotate fold): got"),
        ):
            path = made / f"{option}.json"
            given = PLAIN if option == "plan" else words
            assert command(source, "out", *given, f"--{option}", str(path), *more) == 2
            assert f"error: {path} {wanted}" in capsys.readouterr().err
    again = [*PLAIN, "--plan", str(folded / "plan.json"), "--rotate", "fold", "--rounding", "rtn"]
    assert run(source, "again", *again)
    scores = [*SMALL, "--scores", str(folded / "scores.json"), "--rotate", "fold"]
    run(source, "other", *scores, "--avg-bits", "6", "--rounding", "rtn")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tune"], "--tune knows whole linears only"),
        (["--target", "vllm", "--rotate", "all"], "--target vllm cannot go with --rotate all"),
    ],
)
def test_what_makes_no_sense_is_refused(
    source: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rotate = [] if "--rotate" in words else ["--rotate", "fold"]
    assert command(source, "out", *SMALL, "--avg-bits", "5", *words, *rotate) == 2
    assert sentence in capsys.readouterr().err


def test_a_model_that_cannot_be_folded_is_refused_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model", "llama")
    config = read(folder / "config.json")
    config |= {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert command(folder, "out", *SMALL, "--avg-bits", "5", "--rotate", "fold", "--dry-run") == 2
    error = capsys.readouterr().err
    assert "got Olmo2ForCausalLM: model.layers." in error and "Traceback" not in error


def test_experts_and_fake(tmp_path: Path) -> None:
    """A plain model, weights rounded: in 16 bits, and near the original."""
    source = make_source(tmp_path / "model", "qwen3_moe")
    words = [
        "--schemes",
        "MXFP8A16",
        "--avg-bits",
        "8.2709",
        "--rotate",
        "fold",
        "--rounding",
        "rtn",
    ]
    out = run(source, "out", *PLAIN, *words, "--fake")
    state = load_file(out / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    packed = run(source, "packed", *PLAIN, *words)
    kls = [read(f / "report.json")["evaluation"]["held_out"]["kl"] for f in (out, packed)]
    assert kls[0] == pytest.approx(kls[1], rel=0.05) and kls[0] < 0.01


def test_distill_and_gate(source: Path) -> None:
    words = ["--nsamples", "4", "--seqlen", "32", "--eval-nsamples", "0", "--gate", "2"]
    words += ["--schemes", "MXFP4,MXFP8", "--avg-bits", "5", "--distill", "2", "--batch-size", "2"]
    out = run(source, "out", *words, "--rotate", "fold")
    names = {row["name"] for row in read(out / "report.json")["gate"]["candidates"]}
    assert "optimal, distilled" in names


def test_the_scratch_folder_is_what_is_told_before(source: Path) -> None:
    folded: Any = Folded.make(open_source(str(source)))
    before = folded.weights
    expected = {name: before.stored_dtype(name) for name in before.groups}
    told = folded.scratch_bytes()
    model = folded.load()
    after = folded.weights
    assert {name: after.stored_dtype(name) for name in after.groups} == expected
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    files = after.files
    assert files.nbytes(files.headers) == told
