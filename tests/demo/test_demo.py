"""The bundled model, text and task: small, honest about what was held out, and usable offline."""

from __future__ import annotations

import json
import lzma
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mixbits import demo

ROOT = Path(demo.__file__).resolve().parents[2]
WINDOW = 512


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((demo.MODEL_DIR / "config.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------ the text


def test_training_and_held_out_files_are_disjoint_sorted_sources() -> None:
    training, held_out = demo.training_files(), demo.held_out_files()
    assert training == sorted(training) and held_out == sorted(held_out)
    assert not set(training) & set(held_out)
    for path in training + held_out:
        assert path.suffix == ".py" and "site-packages" not in path.parts
        path.read_text(encoding="utf-8")


def test_every_held_out_module_has_sources() -> None:
    names = {part.removesuffix(".py") for path in demo.held_out_files() for part in path.parts}
    assert set(demo.HELD_OUT) <= names
    assert 400_000 < len(demo.held_out_text().encode()) < 800_000


def test_no_training_file_is_or_tests_a_held_out_module() -> None:
    stdlib = demo.held_out_files()[0].parent
    leak = re.compile(rf"(test_?)?({'|'.join(demo.HELD_OUT)})(_.*)?(\.py)?")
    assert leak.fullmatch("test_argparse.py") and leak.fullmatch("json")
    for path in demo.training_files():
        first, *rest = path.relative_to(stdlib).parts
        parts = [first, *rest] if first == "test" else [first]
        assert not any(leak.fullmatch(part) for part in parts), path


def test_no_held_out_passage_is_quoted_in_the_training_text() -> None:
    """Hardly any run of six lines is shared: what is left is licence texts and boilerplate."""

    def passages(text: str) -> set[tuple[str, ...]]:
        lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 3]
        return set(zip(*(lines[i:] for i in range(6)), strict=False))

    held_out = passages(demo.held_out_text())
    assert len(held_out & passages(demo.training_text())) < 0.01 * len(held_out)


def test_missing_sources_are_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="standard library"):
        demo.held_out_files()


def test_files_that_are_not_utf8_are_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "argparse.py").write_text("held = 'out'\n", encoding="utf-8")
    (tmp_path / "good.py").write_text("x = 'é'\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert demo.training_files() == [tmp_path / "good.py"]
    assert demo.training_text() == "x = 'é'\n"
    assert demo.held_out_files() == [tmp_path / "argparse.py"]


def test_the_text_needs_no_torch() -> None:
    code = (
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location('demo', {demo.__file__!r})\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ----------------------------------------------------------------------------------- the model


def test_model_is_small_bfloat16_and_quantizable(config: dict) -> None:
    weights = demo.MODEL_DIR / "model.safetensors"
    assert sum(path.stat().st_size for path in demo.MODEL_DIR.iterdir()) <= 8_000_000
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    with safe_open(weights, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(weights)
    assert "lm_head.weight" not in tensors
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all(), name
        if name.endswith("_proj.weight"):
            assert tensor.shape[0] % 128 == 0 and tensor.shape[1] % 128 == 0, name


def test_tokenizer_matches_the_model(config: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.bos_token_id == config["bos_token_id"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.bos_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "def f(x):\n\treturn  x  # trailing  \r\n\r\n\n    \n  'y' ,z !",
        "don't 're  a.b ( c ) , . ! ? n't",
        "naïve ß 日本語 \U0001f600 e\u0301 \u00a0\u2028\ufeff\x00\x7f",
        "__init__ _x1234567 0xFFff 1_000 \\n {}[]<|bo s|>",
    ],
)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_round_trips_the_held_out_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = demo.held_out_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_of_a_context_do_not_depend_on_a_continuation(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """lm-eval scores encode(context + continuation)[len(encode(context)):]."""
    text = demo.held_out_text()
    cuts = [m.start() for m in re.finditer(r"(?<=\S)\s", text) if m.start() % 97 == 0]
    assert len(cuts) > 500
    for cut in cuts:
        context = tokenizer.encode(text[max(0, cut - 200) : cut])
        whole = tokenizer.encode(text[max(0, cut - 200) : cut + 40])
        assert whole[: len(context)] == context


def test_model_beats_xz_on_held_out_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that needs more bits than a general-purpose compressor has learned nothing."""
    text = demo.held_out_text().encode()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert bits_per_byte(tokenizer) < xz


@torch.inference_mode()
def bits_per_byte(tokenizer: PreTrainedTokenizerBase) -> float:
    """Of every eighth window of the held-out text; each sees itself and the token before it."""
    text = demo.held_out_text()
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(text)])
    count = (len(tokens) - 1) // WINDOW * WINDOW
    inputs, targets = (t.view(-1, WINDOW)[::8] for t in (tokens[:count], tokens[1 : count + 1]))
    nats = 0.0
    for rows, answers in zip(inputs.split(16), targets.split(16), strict=True):
        logits = model(input_ids=rows, use_cache=False).logits
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), answers.flatten(), reduction="sum"
        ).item()
    per_token = nats / inputs.numel() / math.log(2)
    return per_token * (len(tokens) - 1) / len(text.encode())


# ------------------------------------------------------------------------------------ the task


def test_questions_are_well_formed() -> None:
    lines = (demo.TASKS_DIR / "stdlib_next_line.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    assert 200 <= len(questions) <= 300
    for question in questions:
        assert Path(question["file"]).parts[0].removesuffix(".py") in demo.HELD_OUT
        assert len({choice.strip() for choice in question["choices"]}) == 4
        assert question["context"] == question["context"].rstrip()
        shown = question["context"].split("\n")
        assert not any(choice in shown for choice in question["choices"])
    # No position may give the answer away.
    positions = [question["answer"] for question in questions]
    assert all(0.15 < positions.count(i) / len(positions) < 0.35 for i in range(4))


EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from mixbits.demo import MODEL_DIR, TASKS_DIR

result = simple_evaluate(
    model="hf", model_args={"pretrained": str(MODEL_DIR), "dtype": "float32"}, device="cpu",
    tasks=["stdlib_next_line"], limit=20, batch_size=16, bootstrap_iters=0,
    task_manager=TaskManager(include_path=str(TASKS_DIR), include_defaults=False),
)
print(json.dumps(result["results"]["stdlib_next_line"], default=str))
"""


def test_task_runs_offline_from_any_directory(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE],
        cwd=tmp_path,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads(done.stdout.strip().splitlines()[-1])
    assert 0.25 < scores["acc,none"] <= 1.0
    assert 0.25 < scores["acc_norm,none"] <= 1.0
