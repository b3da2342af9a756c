"""The card of an output folder: valid for the hub, true to report.json, and free of local paths."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mixbits.files import io as files
from mixbits.report import card
from mixbits.report.report import Report
from mixbits.source.source import Source


def read(folder: Path) -> tuple[ModelCard, str, dict]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return ModelCard(text), text, json.loads((folder / "report.json").read_text())


def table_after(text: str, heading: str) -> list[list[str]]:
    lines = text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in lines if line[:1] == "|"]
    assert rows[1][0] == "---" and set(rows[1][1:]) == {"---:"}
    return rows[:1] + rows[2:]


def test_a_card_says_what_the_report_says(
    run: Callable[..., int], tmp_path: Path, shared: Path
) -> None:
    assert run("--avg-bits", "6", "--schemes", "MXFP4,MXFP8", "--rounding", "rtn") == 0
    parsed, text, report = read(tmp_path / "out")
    assert parsed.data.library_name == "transformers"
    assert parsed.data.tags == ["mixbits", "quantized", "mixed-precision", "mxfp4", "mxfp8"]
    assert parsed.data.license is None and parsed.data.base_model is None
    rows = table_after(text, "Where the bits went")
    assert rows[0] == ["module", "MXFP4", "MXFP8", "bits"]
    assert "print(tokenizer.decode(ids[0]))" in text
    assert f"**{report['evaluation']['verdict']['sentence'].partition(':')[0]}**:" in text
    assert rows[-1][0] == "all" and rows[-1][3] == f"{report['reached']['avg_bits']:.3f}"
    assert sum(int(cell.replace("-", "0")) for cell in rows[-1][1:3]) == 14
    scores = {row[0]: row[1:] for row in table_after(text, "Scores")}
    held_out = report["evaluation"]["held_out"]
    assert scores["KL, nats/token"][1] == f"{held_out['kl']:.4f} ± {held_out['kl_stderr']:.4f}"
    assert scores["perplexity"][1].startswith(f"{held_out['perplexity']:.3f} ±")
    for words in ("mixbits.load(", "from_pretrained", "mixbits.serve out", "pretrained=out"):
        assert words in text
    assert str(shared) not in text and str(tmp_path) not in text and "llama" in text


def test_tasks_are_in_it(run: Callable[..., int], tmp_path: Path, shared: Path) -> None:
    assert run("--rounding", "rtn") == 0
    report = read(tmp_path / "out")[2]
    scores = {"acc": 0.25, "acc_stderr": 0.125, "ppl|x": 3.0}
    tasks = {"tasks": {"t": scores}, "average": 0.25, "limit": 7, "add_bos_token": None}
    report["evaluation"].update(tasks=tasks, original_tasks=tasks)
    rows = [["module", "MXFP4", "bits"], ["all", "14", "4.25"]]
    source = Source("org/name", shared / "llama", None)
    text = card.render("out", source, rows, Report.of(report))
    assert "| t | acc | 0.2500 ± 0.1250 | 0.2500 ± 0.1250 |" in text and "ppl\\|x" in text
    assert "the first 7 of each" in text


@pytest.mark.parametrize("options", [["--eval-nsamples", "0"], ["--fake"], ["--solve-only"]])
def test_without_scores_packed_weights_or_a_model(
    options: list[str], run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--rounding", "rtn", *options) == 0
    if options == ["--solve-only"]:
        assert not (tmp_path / "out" / "README.md").exists()
        return
    _, text, _ = read(tmp_path / "out")
    assert ("## Scores" in text) == (options == ["--fake"])
    assert ("mixbits.load" in text) == (options != ["--fake"])


def test_the_gate_is_told(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--rounding", "rtn", "--gate", "4") == 0
    _, text, report = read(tmp_path / "out")
    best, second, *_ = report["gate"]["candidates"]
    assert (
        f"KL {best['kl']:.4f}; next is {second['name']}, behind by {second['behind']:.4f}" in text
    )


def test_licence_and_origin_are_those_of_the_original(shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "llama", tmp_path / "snapshot")
    front = "license: other\nlicense_name: a-b\nlicense_link: https://x.y/z\ntags: [old]"
    (tmp_path / "snapshot" / "README.md").write_text(f"---\n{front}\n---\n# Theirs\n")
    text = card.metadata(Source("org/name", tmp_path / "snapshot", None), ["MXFP4"])
    data = ModelCard(f"---\n{text}\n---\n").data
    assert (data.license, data.license_name, data.license_link) == ("other", "a-b", "https://x.y/z")
    assert data.base_model == "org/name" and data["base_model_relation"] == "quantized"
    assert "old" not in data.tags
    for theirs in ("# No front matter\n", "---\n[\n---\n", "---\n- a\n---\n", "\0"):
        (tmp_path / "snapshot" / "README.md").write_text(theirs)
        text = card.metadata(Source(str(tmp_path), tmp_path / "snapshot", None), ["MXFP4"])
        assert "license" not in text and "base_model" not in text


BAD = 'a\n# b <script>alert(1)</script> `x` [l](http://h) |_i_|\x1b[2J\u202e"; import os #$(id)'


def report_of(name: str) -> dict:
    text = {"source": name, "nsamples": 1, "seqlen": 2}
    held_out = {"kl": 0.1, "kl_stderr": 0.1, "perplexity": 2.0, "perplexity_stderr": 0.1}
    held_out |= {"perplexity_reference": 2.0, "perplexity_reference_stderr": 0.1}
    held_out |= {"top1_agreement": 0.5, "top1_agreement_stderr": 0.1, **text}
    scores = {"tasks": {name: {name: 0.5}}, "average": None, "limit": None}
    return {
        "evaluation": {"held_out": held_out, "tasks": scores},
        "bytes_before": 2,
        "bytes_after": 1,
        "calibration": text,
        "rounding": {"method": "rtn"},
        "gate": None,
        "environment": {"mixbits": "0", "torch": "0"},
        "reached": {"avg_bits": 4.0},
    }


def test_names_of_others_are_text_and_nothing_else(shared: Path) -> None:
    """Of folder, model, datasets, tasks and metrics: no markup, HTML, lines or terminal codes."""
    source, made_up = Source(BAD, shared / "llama", None), Report.of(report_of(BAD))
    text = card.render(BAD, source, [["module", "MXFP4", "bits"], [BAD, "1", "4"]], made_up)
    body = text.split("---\n", 2)[2]
    assert body.count("alert(1)") >= 8  # it is all there
    assert "\n# b" not in body and "\x1b" not in body and "\u202e" not in body
    parts = body.split("```")
    assert len(parts) % 2 == 1 and "<" not in "".join(parts[::2])
    outside = "".join(parts[::2]).replace("`rtn`", "").replace("`", "\\`")
    assert not re.search(r"(?<!\\)(\\\\)*\[l\]", outside)
    for line in body.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5)
    data = ModelCard(text).data
    assert data.library_name == "transformers" and data.base_model == BAD
    for code in parts[1::2]:
        if code.startswith("python"):
            tree = ast.parse(code.removeprefix("python\n"))
            assert [n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)] == [
                "mixbits"
            ]
        for line in code.splitlines():
            if line.startswith("python -m mixbits.serve"):
                assert len(shlex.split(line)) == 4


@pytest.mark.parametrize(
    ("config", "front", "expected"),
    [
        ({"_name_or_path": "org/model-1.5"}, "", ("org/model-1.5", "quantized")),
        ({"_name_or_path": "/home/me/model"}, "", (None, None)),
        ({"_name_or_path": "./model"}, "base_model: a/b", ("a/b", None)),
        ({"_name_or_path": 7}, "base_model: [a/b, c/d]", (["a/b", "c/d"], None)),
        ({}, "base_model: '<script>'", (None, None)),
        ({}, "", (None, None)),
    ],
)
def test_a_local_folder_may_say_what_it_is_on_the_hub(
    config: dict, front: str, expected: tuple, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text(f"---\n{front or 'license: mit'}\n---\n")
    source = Source(str(tmp_path), tmp_path, None)
    data = ModelCard(f"---\n{card.metadata(source, [])}\n---\n").data
    assert (data.base_model, data.get("base_model_relation")) == expected


def test_a_snapshot_of_the_hubs_cache_has_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--my-model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert files.last_part(str(folder)) == "org/my-model"
    (folder / "config.json").write_text("{}")
    assert "base_model: org/my-model" in card.metadata(Source(str(folder), folder, None), [])
