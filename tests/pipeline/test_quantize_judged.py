"""The command line, end to end on tiny models: what judges a plan. Gate, page, curve, diagnosis."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import entries, read

from mixbits.model.layout import find_linears
from mixbits.pipeline import roundings
from mixbits.report.html import render
from mixbits.report.report import Report
from mixbits.rounding.whole_model import round_model
from mixbits.source.source import open_source


@pytest.mark.parametrize("granularity", ["layer", "slab"])
def test_the_gate_ships_the_best_candidate(
    granularity: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 5, "--gate", 6, "--granularity", granularity) == 0
    report = read(tmp_path / "out" / "report.json")
    gate, printed = report["gate"], capsys.readouterr().out
    names = {row["name"] for row in gate["candidates"]}
    first = "slabs" if granularity == "slab" else "optimal"
    # Equal plans once; the best of them compensated.
    assert {f"{name}, search" for name in (first, "uniform", "head")} <= names
    assert len([name for name in names if not name.endswith("search")]) == 2
    kl = [row["kl"] for row in gate["candidates"]]
    assert kl == sorted(kl)
    assert all(row["behind"] > 0 and row["interval"] > 0 for row in gate["candidates"][1:])
    assert gate["candidates"][0]["name"] in printed and "behind the best" in printed
    # Three texts that share nothing: to calibrate with, to choose by, to judge by.
    parts = report["calibration"], gate, report["evaluation"]["held_out"]
    assert len({part["sha256"] for part in parts}) == 3
    assert [part["nsamples"] for part in parts] == [4, 6, 4]
    # The plan in the folder is the winner's.
    assert run("--plan", tmp_path / "out" / "plan.json", out="again") == 0
    again = read(tmp_path / "again" / "report.json")["reached"]
    assert again == report["reached"]


@pytest.mark.parametrize("options", [[], ["--solve-only"], ["--plan"]], ids=["", "solve", "plan"])
def test_the_page_can_be_made_again_from_the_files(
    options: list[str], run: Callable[..., int], shared: Path, tmp_path: Path
) -> None:
    assert run("--avg-bits", 5, *(options if options == ["--solve-only"] else [])) == 0
    out = tmp_path / "out"
    if options == ["--plan"]:
        assert run("--plan", out / "plan.json", out="again") == 0
        out = tmp_path / "again"
    names = ("report.json", "plan.json", "scores.json")
    data = [read(out / name) if (out / name).exists() else {} for name in names]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page == render(Report.of(data[0]), *data[1:])
    assert ("Where the bits went" in page, "Time and memory" in page) == (True, True)
    assert ("What every budget buys" in page) == (options != ["--plan"])
    assert ("perplexity" in page) == (options != ["--solve-only"])
    report = data[0]
    linears = find_linears(open_source(str(shared / report["source"]["name"])).load())
    assert list(report["linear_bits"]) == [info.name for info in linears]
    weights = {info.name: info.numel for info in linears}
    bits = sum(report["linear_bits"][name] * n for name, n in weights.items())
    assert bits / sum(weights.values()) == pytest.approx(report["reached"]["avg_bits"])
    if options != ["--plan"]:
        assert [row["name"] for row in report["baselines"]] == ["uniform", "head", "tail"]
        assert all(r["predicted_loss"] >= report["predicted_loss"] for r in report["baselines"])


@pytest.mark.parametrize("granularity", ["layer", "slab"])
def test_the_curve_is_written_with_and_without_weights(
    granularity: str, run: Callable[..., int], shared: Path, tmp_path: Path
) -> None:
    options = ["--granularity", granularity, "--curve", 5]
    assert run("--avg-bits", 6, "--solve-only", *options) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").open()))
    picture = ElementTree.parse(tmp_path / "out" / "curve.svg").getroot()
    told = "\n".join(picture.itertext())
    assert all(f"\n{name}\n" in told for name in ("frontier", "this plan", "uniform"))
    bits, without, size, loss = (
        [float(row[key]) for row in rows]
        for key in ("avg_bits", "avg_bits_without_scales", "predicted_bytes", "predicted_loss")
    )
    assert len(rows) >= 5 and bits == sorted(bits) and loss == sorted(loss, reverse=True)
    report = read(tmp_path / "out" / "report.json")
    drawn = report["curve"]
    assert drawn[0]["avg_bits"] == pytest.approx(bits[0])
    assert drawn[-1]["avg_bits"] == pytest.approx(bits[-1])
    # A point is the plan of its budget, and its size that of the files.
    assert run("--avg-bits", bits[0] + 1e-6, *options[:2], "--rounding", "rtn", out="least") == 0
    least = read(tmp_path / "least" / "report.json")
    assert least["predicted_loss"] == pytest.approx(loss[0])
    assert least["bytes_after"] == size[0]
    assert least["reached"]["avg_bits_without_scales"] == pytest.approx(without[0])
    assert entries(tmp_path / "least").count("curve.csv") == 0


def test_the_smallest_model_of_a_quality(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = ("--gate", 6, "--rounding", "rtn")
    assert run("--avg-bits", 6, *rest, out="six") == 0
    rows = read(tmp_path / "six" / "report.json")["gate"]["candidates"]
    limit = 1.001 * next(row["kl"] for row in rows if row["name"] == "optimal")
    plans: list[dict[str, str]] = []

    def noted(model: Any, linears: Any, recipes: Any, *args: Any, **named: Any) -> Any:
        plans.append({name: recipe.name for name, recipe in recipes.items()})
        return round_model(model, linears, recipes, *args, **named)

    monkeypatch.setattr(roundings, "round_model", noted)
    assert run("--max-kl", limit, *rest) == 0
    assert len(plans) > 3 and all(plan not in plans[:i] for i, plan in enumerate(plans))
    report = read(tmp_path / "out" / "report.json")
    search, budget = report["search"], report["budget"]
    assert budget["max_kl"] == search["max_kl"] == pytest.approx(limit)
    good = [m for m in search["measured"] if m["kl"] <= limit]
    least = min(good, key=lambda m: m["avg_bits"])
    bad = [m for m in search["measured"] if m["kl"] > limit]
    assert bad and search["kl"] == least["kl"]
    # The bracket is as narrow as promised, or the search ran out of measurements.
    below = [m["avg_bits"] for m in bad if m["avg_bits"] < least["avg_bits"]]
    assert least["avg_bits"] - max(below) <= search["tolerance"] or len(search["measured"]) >= 12
    # That plan is among the gate's candidates, measured again, and the best ships.
    again = {row["name"]: row["kl"] for row in report["gate"]["candidates"]}
    assert again["optimal"] == search["kl"]
    assert report["gate"]["candidates"][0]["kl"] <= limit
    assert report["reached"]["avg_bits"] <= least["avg_bits"]
    assert report["bytes_after"] == report["reached"]["predicted_bytes"]
    printed = capsys.readouterr().out
    assert printed.count("bits per weight: KL") == len(search["measured"])
    held, shipped = report["evaluation"]["held_out"], report["gate"]["candidates"][0]["kl"]
    assert f"KL is {shipped:.4f} on the gate's text" in printed
    assert f"and {held['kl']:.4f} ± {held['kl_stderr']:.4f} on other text." in printed


def test_a_quality_out_of_reach(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--max-kl", "1e-9", "--gate", 2, "--rounding", "rtn") == 2
    assert "--max-kl 1e-09 is out of reach" in capsys.readouterr().err
    assert entries(tmp_path) == ["out.scores.json"]


@pytest.mark.parametrize("how", [[], ["--granularity", "slab", "--rotate", "ffn"]])
def test_diagnosis(
    how: list[str],
    run: Callable[..., int],
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--avg-bits", 6, "--solve-only", "--gate", 6, "--diagnose", *how]
    assert run(*options) == 0
    printed, report = capsys.readouterr().out, read(tmp_path / "out" / "report.json")
    assert "[5/6] diagnose" in printed
    assert f"KL: {report['rank_correlation']:.3f} ({len(report['measured'])} units" in printed
    assert f"agree on {report['stability']['same_units']:.1%} of the choices" in printed
    assert "rank correlation" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    units = [unit["unit"] for unit in read(tmp_path / "out" / "plan.json")["units"]]
    assert [m["unit"] for m in report["measured"]] == units
    scores = read(tmp_path / "out" / "scores.json")["linears"]
    total = sum(row["scores"]["MXFP4"] for row in scores.values())
    assert sum(m["predicted"] for m in report["measured"]) == pytest.approx(total)
    assert all(m["measured"] > 0 and m["scheme"] == "MXFP4" for m in report["measured"])
    # The same from scores that were measured before.
    assert run(*options, "--scores", tmp_path / "out" / "scores.json", out="again") == 0
    again = read(tmp_path / "again" / "report.json")
    for key in ("measured", "rank_correlation", "stability"):
        assert again[key] == report[key]
