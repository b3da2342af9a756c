"""lm-eval's own command line gives a packed model the scores that mixbits.quantize gives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import pack_demo
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixbits
from mixbits import lm_eval, progress
from mixbits.demo import TASKS_DIR
from mixbits.measuring.evaluate import _bars_told, _task_summary, run_tasks
from mixbits.report.report import Evaluation
from mixbits.report.tables import task_rows

TASK = "stdlib_next_line"
LIMIT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_demo(tmp_path_factory.mktemp("lm_eval") / "packed")


def arguments(folder: Path, out: Path) -> list[str]:
    words = ["--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", TASK]
    words += ["--include_path", str(TASKS_DIR), "--limit", str(LIMIT), "--batch_size", "8"]
    return [*words, "--device", "cpu", "--output_path", str(out)]


def test_the_numbers_are_ours(folder: Path, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mixbits.lm_eval", *arguments(folder, tmp_path / "out")],
        cwd=tmp_path,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "You passed `quantization_config`" not in done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"][TASK]
    model, tokenizer = mixbits.load(folder), AutoTokenizer.from_pretrained(folder)
    ours = run_tasks(model, tokenizer, [TASK], LIMIT)["tasks"][TASK]
    assert {name for name in ours if "stderr" not in name} >= {"acc", "acc_norm"}
    for name, value in ours.items():
        assert theirs[f"{name},none"] == value
    assert 0.25 < ours["acc"] < 1


def test_a_damaged_folder_is_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its model is loaded after an index of all tasks was made, for which others wait."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"")

    def evaluate() -> None:
        AutoModelForCausalLM.from_pretrained(tmp_path)

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    monkeypatch.setattr(sys, "argv", ["mixbits.lm_eval"])
    assert lm_eval.main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot read")


def test_bars_of_lm_eval_are_not_drawn_but_counted(capsys: pytest.CaptureFixture[str]) -> None:
    import lm_eval.models.huggingface as theirs
    import tqdm as package

    run = progress.Progress({"evaluate": 1.0})
    with run.stage("evaluate"), _bars_told(cost=2.0):
        bar = theirs.tqdm(total=5, desc="requests")
        bar.update(3)
        assert run.work["evaluate"] == 10.0 and run.done["evaluate"] == 6.0
        bar.update()
        bar.close()
        assert list(package.tqdm(range(3), desc="contexts")) == [0, 1, 2]
        assert run.done["evaluate"] == 8.0
    assert theirs.tqdm is package.tqdm is not type(bar)
    assert "it/s" not in capsys.readouterr().err


def test_the_average_says_what_it_is_of() -> None:
    results = {"a": {"acc,none": 0.5, "acc_stderr,none": 0.03}, "b": {"ppl,none": 9.0}}
    results |= {"c": {"acc,none": 0.7, "acc_stderr,none": 0.04}}
    samples = {"a": [{"doc_id": 1, "acc": 0.0}, {"doc_id": 0, "acc": 1.0}], "c": []}
    raw = {"results": results, "samples": samples}
    found = _task_summary(raw, ["a", "b", "c"], None, None)
    assert found["documents"] == {"a": [1, 0], "c": []}
    assert found["average"] == pytest.approx(0.6) and found["averaged"] == ["a", "c"]
    assert found["average_stderr"] == pytest.approx(0.025)
    rows = task_rows(Evaluation.of({"tasks": found}))
    assert rows[-1] == ["mean of 2 tasks", "acc", "0.6000 ± 0.0250"]
    del results["c"]["acc_stderr,none"]
    found = _task_summary(raw, ["a", "b", "c"], None, None)
    assert (
        found["average_stderr"] is None
        and task_rows(Evaluation.of({"tasks": found}))[-1][-1] == "0.6000"
    )
