"""Wrong words are told before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model

from mixbits.errors import UsageError
from mixbits.pipeline import early
from mixbits.pipeline.options import parse_arguments
from mixbits.pipeline.settings import DEFAULT_DATASET, EFFORTS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_text("text")
    return tmp_path / "model"


def check(model: Path, *options: str) -> None:
    text = str(model.parent / "text.txt")
    words = [str(model), "--out", str(model.parent / "out"), "--dataset", text, *options]
    early.check(parse_arguments([*words, "--seqlen", "32"] if "--seqlen" not in options else words))


WRONG = {
    "a scheme": (["--schemes", "MXFP5"], "unknown scheme 'MXFP5'"),
    "a kept scheme": (["--keep", "*=MXFP5"], "unknown scheme 'MXFP5'"),
    "no kept scheme": (["--keep", "*.down_proj"], "--keep must be PATTERN=SCHEME"),
    "sequences": (["--seqlen", "256"], "--seqlen must be at most 128 for this model: got 256"),
    "scores": (["--scores", "no.json"], "cannot read no.json: No such file"),
    "a plan": (["--plan", "no.json"], "cannot read no.json: No such file"),
    "a text": (["--eval-dataset", "no.txt"], "no.txt is no file"),
    "few bits": (
        ["--avg-bits", "3", "--device", "cpu"],
        "between 3.5 and 8.25 for these schemes: got 3",
    ),
    "few elements": (
        ["--avg-bits", "3", "--ignore-scale-bits", "--schemes", "W4A16G32,BF16"],
        "between 4 and 16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_by_itself(case: str, model: Path) -> None:
    options, message = WRONG[case]
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        check(model, *options)


def test_what_is_left_to_shapes(model: Path) -> None:
    """Short groups make more bits, and kept schemes another range."""
    for options in (
        ["--avg-bits", "3", "--schemes", "W4A16,W8A16"],  # groups of 128
        ["--avg-bits", "3", "--keep", "*=W2A16G64"],
        ["--avg-bits", "3", "--target", "gguf"],
        ["--avg-bits", "4.25"],
    ):
        check(model, *options)


def test_a_packed_model_is_no_original(model: Path) -> None:
    packed = {**CONFIG, "quantization_config": {"quant_method": "mixbits"}}
    (model / "config.json").write_text(json.dumps(packed))
    with pytest.raises(UsageError, match="is quantized by mixbits already: pass the original"):
        check(model)
    (model / "config.json").unlink()
    with pytest.raises(UsageError, match=r"must hold config\.json"):
        check(model)


def test_tasks_that_stand_nowhere(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UsageError, match=r"stdlib_next_lin is none \(stdlib_next_line\?\)"):
        check(model, "--tasks", "stdlib_next_lin,stdlib_next_line")
    check(model, "--tasks", "stdlib_next_line")
    (tmp_path / "own.yaml").write_text("group: all_mine\ntask:\n  - 'mine'\n")
    check(model, "--tasks", "mine,all_mine,piqa", "--include-path", str(tmp_path))
    with pytest.raises(UsageError, match="--include-path must be a folder"):
        check(model, "--tasks", "mine", "--include-path", str(tmp_path / "no"))


def test_every_task_of_lm_eval_is_known() -> None:
    """By the words in its files, as by its own index."""
    lm_eval = pytest.importorskip("lm_eval")
    known = early._named([Path(lm_eval.__file__).parent / "tasks"])
    wanted = [
        "lambada_openai",
        "hellaswag",
        "piqa",
        "winogrande",
        "mmlu",
        "mmlu_anatomy",
        "arc_easy",
    ]
    assert early._missing(wanted, known) == []


def test_torch_is_not_imported_for_it(model: Path) -> None:
    words = [str(model), "--avg-bits", "3", "--seqlen", "32", "--dry-run", "--device", "cpu"]
    code = (
        "import sys; from mixbits.quantize import main\n"
        f"assert main({words!r}) == 2\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "between 3.5 and 8.25" in done.stderr


def test_efforts_are_presets(tmp_path: Path) -> None:
    quick = parse_arguments(["m", "--effort", "quick"])
    assert (quick.method, quick.rounding, quick.gate, quick.dataset) == (
        "weight",
        "search",
        0,
        None,
    )
    named = parse_arguments(["m", "--effort", "quick", "--rounding", "gptq", "--seqlen", "64"])
    assert (named.rounding, named.seqlen, named.gate) == ("gptq", 64, 0)
    assert named.dataset == (DEFAULT_DATASET,)  # which gptq needs
    assert parse_arguments(["m", "--effort", "quick", "--gate", "4"]).dataset == (DEFAULT_DATASET,)
    normal = parse_arguments(["m"])
    assert vars(normal) | {"command": ""} == vars(parse_arguments(["m", "--effort", "normal"])) | {
        "command": ""
    }
    assert normal.dataset == (DEFAULT_DATASET,) and normal.method == "fisher"
    assert set(EFFORTS["quick"]) <= set(vars(normal))


@pytest.mark.parametrize(
    ("text", "message"),
    [("4.2", r"must have a unit: got '4.2' \(4.2GB\?\)"), ("900", r"900GB\?"), ("x", "such as")],
)
def test_sizes_without_a_unit(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arguments(["m", "--size", text])
    assert parse_arguments(["m", "--size", "900B"]).size == 900
    assert parse_arguments(["m", "--size", "20000"]).size == 20_000


def test_encoders_are_refused(tmp_path: Path) -> None:
    """transformers would run them as decoders, though they look ahead."""
    from transformers import BertConfig, GPT2Config, XLNetConfig

    from mixbits.source.source import open_source

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 40}
    for number, config in enumerate((BertConfig(**sizes), XLNetConfig(n_layer=1))):
        config.save_pretrained(tmp_path / str(number))
        with pytest.raises(UsageError, match="does not describe a decoder-only language model"):
            open_source(str(tmp_path / str(number)), config_only=True)
    for number, config in enumerate((BertConfig(**sizes, is_decoder=True), GPT2Config(n_layer=1))):
        config.save_pretrained(tmp_path / f"good{number}")
        open_source(str(tmp_path / f"good{number}"), config_only=True)
    open_source(str(make_model(tmp_path / "llama")), config_only=True)
