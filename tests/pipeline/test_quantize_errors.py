"""The command line on bad input, full disks and sudden ends: what it says and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SMALL, VOCAB, entries, make_model, read, write_ids

import mixbits
from mixbits import quantize
from mixbits.checkpoint import saving as checkpoint
from mixbits.files.manifest import foreign
from mixbits.pipeline import process


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
    "quantized": (_config(quantization_config={"quant_method": "mixbits"}), "by mixbits already"),
    "stored by others": (
        _config(quantization_config={"quant_method": "bitsandbytes"}),
        "weights that are stored by bitsandbytes cannot be read",
    ),
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
    "empty text": (["--dataset", "{}/empty.txt"], "must hold text"),
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
    "no such rounding": (["--rounding", "best"], "invalid choice: 'best'"),
    "too much correction": (["--correction", "1.5"], "--correction: must be between 0 and 1"),
    "a gate of -1": (["--gate", "-1"], "--gate must be at least 0: got -1"),
    "a quality that is none": (["--max-kl", "0"], "--max-kl: must be a number above 0"),
    "a quality and a budget": (["--max-kl", "0.1", "--avg-bits", "5"], "not allowed with argument"),
    "a quality and a plan": (["--max-kl", "0.1", "--plan", "x"], "not allowed with argument"),
    "a quality unmeasured": (["--max-kl", "0.1"], "it cannot go with --gate 0"),
    "a quality of a baseline": (
        ["--max-kl", "0.1", "--gate", "2", "--strategy", "head"],
        "it cannot go with --strategy head",
    ),
    "a quality unrounded": (
        ["--max-kl", "0.1", "--gate", "2", "--solve-only"],
        "it cannot go with --solve-only",
    ),
    "a quality, scales ignored": (
        ["--max-kl", "0.1", "--gate", "2", "--ignore-scale-bits"],
        "counts for --avg-bits only",
    ),
    "a curve of a point": (["--curve", "1"], "--curve must be of at least 2 points: got 1"),
    "a curve of words": (["--curve", "many"], "argument --curve: invalid int value"),
    "a curve of a plan": (["--curve", "--plan", "{}/no.json"], "cannot go with --plan"),
    "a diagnosis of a plan": (["--diagnose", "--plan", "{}/no.json"], "cannot go with --plan"),
    "a diagnosis unmeasured": (["--diagnose"], "--diagnose measures on the gate's text"),
    "halves of a sequence": (
        ["--diagnose", "--gate", "2", "--nsamples", "1"],
        "--diagnose halves the calibration text: got 1 sequence",
    ),
    "slabs of BF16": (
        ["--granularity", "slab", "--schemes", "MXFP4,BF16"],
        "slabs must be of packed groups of columns: got BF16",
    ),
    "slabs of whole rows": (
        ["--granularity", "slab", "--schemes", "MXFP4,FP8"],
        "slabs must be of packed groups of columns: got FP8",
    ),
    "slabs by deltaloss": (
        ["--granularity", "slab", "--method", "deltaloss"],
        "need --method fisher: got deltaloss",
    ),
    "free without slabs": (["--free-slabs"], "--free-slabs helps --granularity slab only"),
    "a gate without text": (["--gate", "200"], "204 for calibration"),
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
    assert set(entries(tmp_path)) == set(before)


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
    for options in ([], ["--overwrite"]):
        message = refused(run(*options), capsys)
        assert "is no mixbits output (mixbits did not write thesis.tex)" in message
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_its_own_output_is_no_input(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 5, "--eval-nsamples", 0) == 0
    capsys.readouterr()
    code = run("--avg-bits", 5, model=tmp_path / "out", out="again")
    assert "is quantized by mixbits already" in refused(code, capsys)
    assert entries(tmp_path) == ["out"]


COMMANDS = """
import json, sys
from mixbits.quantize import main
sys.exit([main(json.loads(line)) for line in sys.stdin] != [2, 2])
"""


def test_names_that_cannot_be_fetched(shared: Path, tmp_path: Path) -> None:
    """In a process of its own, whose stderr has nothing of others either."""
    rest = ["--dataset", "nobody/no-such-text", "--out", str(tmp_path / "out"), *SMALL]
    models = ["nobody/no-such-model", str(shared / "llama")]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(json.dumps([model, *rest]) for model in models),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model, text = done.stderr.strip().splitlines()
    assert model.startswith("error: 'nobody/no-such-model")
    assert text.startswith("error: 'nobody/no-such-text")
    assert not [name for name in entries(tmp_path) if name != "hub"]


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
    assert entries(small_disk) in (["out.scores.json"], ["filler"])


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
    assert entries(tmp_path) == ["out.scores.json"]


def test_a_disk_that_is_full_when_the_scores_are_to_be_reported(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    score = process.evaluate

    def scored(*args: Any) -> None:
        score(*args)
        monkeypatch.setattr(os, "fsync", full)

    monkeypatch.setattr(process, "evaluate", scored)
    message = refused(run("--avg-bits", 5), capsys)
    assert "the disk is full" in message and "is complete, but its report" in message
    assert entries(tmp_path) == ["out"] and foreign(tmp_path / "out") is None
    assert read(tmp_path / "out" / "report.json")["evaluation"] is None
    mixbits.load(tmp_path / "out")


@pytest.mark.parametrize("end", [RuntimeError("odd"), KeyboardInterrupt(), SystemExit(143)])
def test_what_was_measured_outlives_whatever_ends_the_run(
    end: BaseException,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any) -> None:
        raise end

    kept = tmp_path / "out.scores.json"
    with monkeypatch.context() as patch, suppress(SystemExit):
        patch.setattr(checkpoint, "copy_companions", stop)
        assert run("--avg-bits", 5) == (2 if isinstance(end, RuntimeError) else 1)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (told,) = (line for line in lines if line.startswith(("error: ", "stopped")))
    assert told.endswith(f"; to go on from what was measured: --scores {kept}")
    assert entries(tmp_path) == ["out.scores.json"]
    text = kept.read_text()
    words = ["--avg-bits", 5, "--eval-nsamples", 0]
    assert run(*words, "--scores", kept, "--solve-only", out="again") == 0
    assert (tmp_path / "again" / "scores.json").read_text() == text
    assert run(*words, "--solve-only") == 0  # which measures the same, and has it in its output
    assert entries(tmp_path) == ["again", "out"]
    assert (tmp_path / "out" / "scores.json").read_text() == text
