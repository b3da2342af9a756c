"""The benchmarks of accuracy and cost: same tokens for all, rows that survive, honest figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import add_tokenizer, make_model, read, write_ids

from benchmarks.peers import autoscheme
from benchmarks.quality import tables
from benchmarks.tools import random_llama
from benchmarks.tools.meter import Meter
from benchmarks.tools.records import Records
from benchmarks.tools.text import GATE, make_text
from mixbits import quantize
from mixbits.formats.recipes import parse_recipe
from mixbits.measuring.evaluate import compare
from mixbits.model.streaming import StreamedModel
from mixbits.pipeline.options import parse_arguments
from mixbits.runtime.fake import fake_quantize_model
from mixbits.source.source import open_source

CONFIGURATIONS = [c for section in tables.SECTIONS.values() for c in section]


# --- rows ------------------------------------------------------------------------------------


def test_rows_are_found_again_by_another_run(tmp_path):
    path = tmp_path / "figures" / "a.csv"
    first = Records(path, ["name", "bits", "kl"], ["name", "bits"])
    first.append({"name": "x", "bits": 4.5, "kl": 0.25})
    again = Records(path, ["name", "bits", "kl"], ["name", "bits"])
    row = again.find(name="x", bits=4.5)
    assert row is not None and row["kl"] == "0.25" and row["commit"] and row["torch"]
    assert again.find(name="x", bits=5) is None
    again.append({"name": "x", "bits": 5})
    assert len(path.read_text().splitlines()) == 3


def test_a_csv_of_another_kind_is_left_alone(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("name,kl\nx,1\n")
    with pytest.raises(SystemExit, match="must have the columns"):
        Records(path, ["name", "bits"], ["name"])
    assert path.read_text() == "name,kl\nx,1\n"


def test_unknown_columns_are_refused(tmp_path):
    records = Records(tmp_path / "a.csv", ["name"], ["name"])
    with pytest.raises(ValueError, match="no columns \\['typo'\\]"):
        records.append({"name": "x", "typo": 1})
    with pytest.raises(ValueError, match="named by"):
        records.find(nme="x")


def test_a_meter_sees_memory_that_is_gone_at_the_end():
    with Meter() as meter:
        torch.ones(48 << 20, dtype=torch.uint8).sum()
        torch.ones(8 << 20).mul(2).sum()  # 32 MiB twice, slow enough to be sampled
    assert meter.peak_anonymous > 32 << 20
    assert meter.peak_rss > meter.peak_anonymous
    assert meter.seconds > 0 and meter.cpu_seconds > 0


# --- tokens ----------------------------------------------------------------------------------


def test_parts_of_the_text_share_no_token(tmp_path, shared):
    ids = np.arange(60 * 8) % 128
    np.save(tmp_path / "ids.npy", ids)
    text = make_text(str(shared / "llama"), tmp_path, str(tmp_path / "ids.npy"), (4, 5), 8)
    rows = ids.reshape(-1, 8)
    assert np.array_equal(np.load(text.calibration), rows[:4])
    assert np.array_equal(np.load(text.held_out), rows[4:9])
    both = np.concatenate([rows[:4], rows[9 : 9 + GATE]])
    assert np.array_equal(np.load(text.dataset), both)


def test_a_marker_becomes_a_newline(tmp_path, shared):
    (tmp_path / "in.txt").write_text("one<|end|>two" * 200)
    text = make_text(
        str(shared / "llama"), tmp_path, str(tmp_path / "in.txt"), (2, 2), 8, "<|end|>"
    )
    tokenizer = open_source(str(shared / "llama")).tokenizer()
    assert tokenizer.decode(np.load(text.calibration)[0]) == "one\ntwoo"


def test_text_is_asked_for(tmp_path, shared):
    with pytest.raises(SystemExit, match="--dataset is required"):
        make_text(str(shared / "llama"), tmp_path, None, (2, 2), 8)


# --- configurations --------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda c: f"{c.section}-{c.name}")
def test_the_command_line_takes_every_configuration(config):
    args = parse_arguments(["model", *config.command()])
    assert args.avg_bits == config.bits and args.strategy == config.strategy
    assert args.ignore_scale_bits != config.count_scales
    if config.options != tables.DEFAULT:
        assert (args.weight_scale_mode, args.act_scale_mode) == config.scale_modes
        assert args.rounding == "rtn" and args.gate == 0


def test_default_options_are_those_of_the_command():
    config = tables.Configuration("mx", "x", 4.5, options=tables.DEFAULT)
    args = parse_arguments(["model", *config.command()])
    plain = parse_arguments(["model", "--avg-bits", "4.5"])
    for name in ("rounding", "gate", "rotate", "weight_scale_mode", "act_scale_mode"):
        assert getattr(args, name) == getattr(plain, name)


def test_rows_that_name_their_options_are_made_with_any_and_names_must_be_of_rows(capsys):
    made = []
    stand_in = SimpleNamespace(
        ours=made.append, theirs=lambda *_: pytest.fail(), args=SimpleNamespace(names="5.25 bits")
    )
    tables.run_section(stand_in, "wide", [""], [])
    assert [(config.name, config.options) for config in made] == [("5.25 bits", tables.DEFAULT)]
    with pytest.raises(SystemExit):
        tables.main(["demo", "--sections", "wide,int", "--names", "3 bits,4.6 bits"])
    told = capsys.readouterr().err
    assert "--names must be among 3 bits, 3 bits, head" in told and told.endswith("4.6 bits\n")


def test_accuracies_are_paired_with_the_original_s():
    one, two = ({"documents": json.dumps({"a": a})} for a in ([1, 1, 0, 1], [0, 1, 0, 1]))
    assert tables.against(two, one) == "-0.2500 ± 0.4900"
    assert tables.against(two, None) == tables.against(two, {"documents": ""}) == "-"


def test_options_have_the_last_word():
    config = tables.Configuration("mx", "x", 4.5, options="--rounding gptq --gate 8 --fuse")
    args = parse_arguments(["model", *config.command()])
    assert args.rounding == "gptq" and args.gate == 8 and args.fuse


def test_lambada_is_cut_before_the_last_word(tmp_path):
    yaml = pytest.importorskip("yaml")
    jinja2 = pytest.importorskip("jinja2")
    tables.write_lambada(tmp_path / "tasks", tmp_path / "la'mbada.jsonl")
    task = yaml.safe_load((tmp_path / "tasks" / "lambada_local.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "la'mbada.jsonl")
    render = jinja2.Environment().from_string
    assert render(task["doc_to_text"]).render(text="a b c") == "a b"
    assert render(task["doc_to_target"]).render(text="a b c") == " c"


def _in_this_process(
    model: str, out: Path, words: Sequence[str], only: bool = False
) -> dict[str, Any]:
    argv = [model, "--out", str(out), *words, *(["--solve-only"] if only else [])]
    assert quantize.main(argv) == 0
    report: dict[str, Any] = read(out / "report.json")
    return report


def test_a_section_is_made_once(tmp_path, shared, monkeypatch, capsys):
    runs = []

    def counted(*args: Any, **kwargs: Any) -> dict[str, Any]:
        runs.append(args)
        return _in_this_process(*args, **kwargs)

    monkeypatch.setattr(tables, "quantize", counted)
    options = ["--dataset", str(write_ids(tmp_path / "ids.npy")), "--sections", "int"]
    options += ["--nsamples", "4", "--eval-nsamples", "4", "--seqlen", "32"]
    words = [str(shared / "llama"), *options, "--peers", "none", "--csv", str(tmp_path / "t.csv")]
    tables.main(words)
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [c.name for c in tables.SECTIONS["int"]]
    assert len(runs) == 1 + len(rows)  # one measurement for all
    kl = {row["name"]: float(row["kl"]) for row in rows}
    assert kl["pure W4A16"] < kl["3 bits"] < kl["pure W2A16"]
    capsys.readouterr()
    tables.main(words)
    assert len(runs) == 1 + len(rows)
    assert f"{kl['3 bits'] * 1e3:.1f} ±" in capsys.readouterr().out


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_random_models_open(tmp_path, monkeypatch, tied):
    shape = {
        "model_type": "qwen2",  # with biases
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 130,
        "tie_word_embeddings": tied,
    }
    monkeypatch.setitem(random_llama.SHAPES, "small", shape)
    monkeypatch.setattr(random_llama, "SHARD_BYTES", 20000 if tied else 1 << 30)
    model = open_source(str(random_llama.write_model(tmp_path / "m", "small", layers=2))).load()
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == tied
    assert len(model.model.layers) == 2 and next(model.parameters()).dtype == torch.bfloat16
    assert 0.015 < model.model.layers[1].mlp.up_proj.weight.float().std() < 0.025


# --- AutoScheme ------------------------------------------------------------------------------


@pytest.mark.slow
def test_autoscheme_is_given_our_tokens_and_judged_by_us(tmp_path):
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    model = add_tokenizer(make_model(tmp_path / "llama", intermediate_size=128))
    rng = np.random.Generator(np.random.PCG64(0))
    for name in ("calibration", "held_out"):
        np.save(tmp_path / f"{name}.npy", rng.integers(2, 130, (4, 32)))
    job = autoscheme.Job(
        str(model),
        str(tmp_path / "calibration.npy"),
        str(tmp_path / "held_out.npy"),
        "MXFP4,MXFP8",
        [[5.0, "none"], [5.0, "plain"]],
        batch_size=2,
    )
    allocated, plain = autoscheme.run_worker(job)
    assert allocated["plan"] == plain["plan"] and set(plain["plan"].values()) == {"MXFP4", "MXFP8"}
    assert plain["bits_without_scales"] <= 5.0
    assert allocated["measure_seconds"] > 0 and "kl" not in allocated
    assert plain["differs_from_ours"] == 0
    fake = open_source(str(model)).load()
    fake_quantize_model(fake, {n: parse_recipe(s) for n, s in plain["plan"].items()})
    original = StreamedModel(open_source(str(model)).load())
    held_out = torch.from_numpy(np.load(job.held_out))
    assert plain["kl"] == pytest.approx(compare(original, StreamedModel(fake), held_out)["kl"])


def test_rows_of_autoscheme_have_the_columns_of_its_file(tmp_path, shared, monkeypatch, capsys):
    """The evaluator knows more figures than the file has."""
    figures = dict.fromkeys((*autoscheme.FIGURES, "perplexity_ratio"), 0.5)
    result = {**figures, "bits": 4.75, "bits_without_scales": 4.5, "plan": {"a": "MXFP4"}}
    monkeypatch.setattr(
        autoscheme, "run_worker", lambda job: iter([dict(result) for _ in job.peers])
    )
    words = [str(shared / "llama"), "--dataset", str(write_ids(tmp_path / "ids.npy"))]
    words += ["--nsamples", "4", "--eval-nsamples", "4", "--seqlen", "32", "--bits", "4.5,5"]
    autoscheme.main([*words, "--roundings", "plain", "--csv", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["asked"], row["kl"], row["plan"]) for row in rows] == [
        (bits, "0.5", "a=MXFP4") for bits in ("4.5", "5")
    ]
    assert "500.0" in capsys.readouterr().out


def test_a_worker_that_fails_says_why():
    job = autoscheme.Job("no/such/model", "none.npy", "none.npy", "MXFP4,MXFP8", [[5.0, "plain"]])
    with pytest.raises(RuntimeError, match=r"(?s)auto-round failed: .*none\.npy"):
        list(autoscheme.run_worker(job))
