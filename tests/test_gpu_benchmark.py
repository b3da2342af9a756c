"""What benchmarks.kernels.gpu computes and decides; the whole program on a CPU, in miniature."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("installed without its benchmarks", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks.kernels import gpu, gpu_smoke, gpu_summary  # noqa: E402
from benchmarks.kernels.gpu_timing import AppendedRows, Budget, Timer, interleaved, spread  # noqa: E402


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_budget_ends_before_the_next_case_would(capsys):
    clock, done = Clock(), []
    budget = Budget(10.0, clock)
    for case in budget.take([1, 3, 2, 5, 1]):
        clock.now += case
        done.append(case)
    assert done == [1, 3, 2, 5]  # 4 s were left, and no case had taken more than 3
    assert "out of time: 1 of 5 cases left out" in capsys.readouterr().out
    assert list(Budget(10.0, clock).take([])) == []


def test_rows_are_in_the_file_as_soon_as_they_are_known(tmp_path):
    path = tmp_path / "folder" / "rows.csv"
    rows = AppendedRows(path, ["a", "b"], {"device": "x, y"})
    rows.append({"a": 1 / 3})
    assert path.read_text() == 'a,b,device\n0.33333,,"x, y"\n'
    again = AppendedRows(path, ["a", "b"], {"device": "z"})
    again.append({"b": "c"})
    assert path.read_text().splitlines()[2:] == [",c,z"]
    with pytest.raises(AssertionError, match="unknown"):
        rows.append({"unknown": 1})
    nowhere = AppendedRows(None, ["a"], {})
    nowhere.append({"a": 1})
    assert nowhere.rows == [{"a": 1}]


def test_what_is_judged_is_measured_first():
    shapes = [(4096, 4096), (8192, 8192)]
    cases = gpu.matmul_cases(shapes, [1, 4, 16])
    assert sorted(cases) == sorted((shape, m) for shape in shapes for m in (1, 4, 16))
    large, small = shapes[1], shapes[0]
    assert cases == [(large, 1), (large, 16), (large, 4), (small, 1), (small, 16), (small, 4)]


def test_ratios_and_shares():
    seconds = {gpu.BASELINE: [4e-6, 3e-6, 9e-6], "ours": [1e-6, 2e-6, 1e-6]}
    sizes = {gpu.BASELINE: 4000, "ours": 1000}
    rows = gpu.matmul_rows((8, 16), 2, sizes, seconds, {"read": 4e9, "copy": 2e9})
    ours = rows["ours"]
    assert (ours["us"], ours["us_p20"], ours["us_p80"]) == pytest.approx((1, 1, 2))
    assert ours["ratio"] == pytest.approx(4.0) and rows[gpu.BASELINE]["ratio"] == 1.0
    assert ours["gb_per_s"] == pytest.approx(1.0) and ours["share_of_read"] == pytest.approx(0.25)
    assert ours["gflop_per_s"] == pytest.approx(2 * 2 * 8 * 16 / 1e-6 / 1e9)
    assert set(ours) <= set(gpu.COLUMNS)


def test_timers_take_turns_and_go_round():
    import torch

    calls = []
    cpu = torch.device("cpu")
    timers = {
        name: Timer(lambda i, name=name: calls.append((name, i)), 2, cpu) for name in ("a", "b")
    }
    calls.clear()
    seconds = interleaved(timers, 3)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3
    assert all(len(times) == 3 and min(times) >= 0 for times in seconds.values())
    assert spread([3e-6, 1e-6, 2e-6]) == pytest.approx({"us": 2, "us_p20": 1, "us_p80": 3})


def _matmul_row(scheme, tokens, ratio, n=8192, k=8192, backend="cuda"):
    numbers = {"N": n, "K": k, "M": tokens, "ratio": ratio, "share_of_read": 0.8}
    return {
        "section": "matmul",
        "scheme": scheme,
        "backend": backend,
        **{key: str(value) for key, value in numbers.items()},
    }


def _verdicts(lines, start):
    return [line.verdict for line in lines if line.what.startswith(start)]


def test_the_worst_large_shape_of_the_default_backend_decides():
    good, bad = _matmul_row("MXFP4", 1, 3.3), _matmul_row("MXFP4", 1, 3.1, n=16384)
    small, other = _matmul_row("MXFP4", 1, 9, n=4096), _matmul_row("MXFP4", 1, 1, backend="triton")
    assert _verdicts(gpu_summary.ratio_lines([good, small, other]), "MXFP4, M = 1,") == ["PASS"]
    assert _verdicts(gpu_summary.ratio_lines([good, bad]), "MXFP4, M = 1,") == ["FAIL"]
    assert _verdicts(gpu_summary.ratio_lines([small]), "MXFP4, M = 1,") == ["MISSING"]
    assert _verdicts(gpu_summary.ratio_lines([other]), "MXFP4, M = 1, triton") == ["FAIL"]
    near = [_matmul_row("W4A16", 1, 0.95 * 3.2 + e) for e in (1e-3, -1e-3)]
    assert _verdicts(gpu_summary.ratio_lines(near[:1]), "W4A16, M = 1,") == ["PASS"]
    assert _verdicts(gpu_summary.ratio_lines(near), "W4A16, M = 1,") == ["FAIL"]


def test_8_bit_floats_have_a_target_of_their_own_and_their_error_beside_it():
    def row(ratio, error, tokens=2048, scheme=gpu_summary.FP8):
        return {**_matmul_row(scheme, tokens, ratio), "relative_error": str(error)}

    line = gpu_summary.fp8_line([row(1.5, 0.02), row(1.41, 0.03), row(1.0, 0.1, tokens=1024)])
    assert (line.verdict, line.found, line.remark) == ("PASS", "1.41", "relative error 3.0e-02")
    assert gpu_summary.fp8_line([row(1.39, 0.02)]).verdict == "FAIL"
    assert gpu_summary.fp8_line([row(1.5, 0.0, scheme="MXFP4")]).verdict == "MISSING"


def test_every_target_has_a_line_and_nothing_passes_unmeasured():
    lines = gpu_summary.summary([], [{"stage": "build", "code": "skipped", "seconds": "0"}])
    assert len(lines) == 1 + 4 * len(gpu_summary.RATIOS) + 1 + 3 + 2
    assert {line.verdict for line in lines} == {"MISSING"}


def test_stages_bandwidths_and_sensitivity():
    stages = [
        {"stage": name, "code": code, "seconds": "3"}
        for name, code in (("build", "0"), ("tests", "1"), ("memcheck", "124"))
    ]
    assert [line.verdict for line in gpu_summary.stage_lines(stages)] == ["PASS", "FAIL", "FAIL"]
    row = {"section": "rounding", "backend": "cuda", "share_of_copy": "", "share_of_read": ""}
    rows = [
        {**row, "contender": "fake_quantize MXFP4", "share_of_copy": "0.9"},
        {**row, "contender": "fake_quantize W4A16", "share_of_copy": "0.8"},
        {**row, "contender": "fisher_statistics, 2 schemes", "share_of_read": "0.81"},
    ]
    lines = gpu_summary.bandwidth_lines(rows)
    assert [line.verdict for line in lines] == ["PASS", "FAIL", "PASS", "MISSING"]
    row = {"section": "sensitivity", "device": "GPU", "seconds": "30", "peak_gpu_gb": "20"}
    for note, verdicts in (
        (f"{gpu_summary.LLAMA_8B}, float32", ["PASS", "FAIL"]),
        ("4 layers", ["MISSING"] * 2),
    ):
        lines = gpu_summary.sensitivity_lines([{**row, "note": note}])
        assert [line.verdict for line in lines] == verdicts


@pytest.mark.slow
def test_the_whole_program_in_miniature(tmp_path, capsys):
    out = tmp_path / "gpu.csv"
    words = f"""--device cpu --backends reference,cuda --shapes 64x128 --tokens 1,3
        --schemes MXFP4,W4A16 --rounds 1 --cold-bytes 20000 --yardstick-bytes 65536
        --elements 8192 --layers 1 --width 128 --prompt 6 --new-tokens 3 --csv {out}"""
    gpu.main(words.split())
    printed = capsys.readouterr().out
    assert "skipped: backend cuda" in printed and "skipped: gemlite MXFP4" in printed
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    count = {name: sum(row["section"] == name for row in rows) for name in gpu.sections()}
    assert count == {"matmul": 2 * 3, "rounding": 15, "sensitivity": 2, "generate": 6}
    assert all(row["device"] == "cpu" and row["commit"] and row["date"] for row in rows)
    for row in rows:
        if row["section"] == "matmul":
            assert float(row["relative_error"]) < 0.01
    gpu_summary.main([str(out)])
    assert "0 PASS" in capsys.readouterr().out


def test_the_smoke_program_finds_the_reference_right():
    results = dict(gpu_smoke.checks("reference", "cpu"))
    assert len(results) > 90 and all(results.values())


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.main(["--sections", "rounding"])


CHECK = ROOT / "benchmarks" / "gpu_check.sh"


def test_the_script_is_valid_and_says_what_it_would_do(tmp_path):
    subprocess.run(["bash", "-n", str(CHECK)], check=True)
    command = ["bash", str(CHECK), "--dry-run", "--python", sys.executable, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for stage in ("build", "tests", "memcheck", "racecheck", "matmul", "sensitivity", "generate"):
        assert f"{stage} (at most " in done.stdout
    assert not (tmp_path / "stages.csv").exists()
    unknown = subprocess.run([*command, "--stages", "nothing"], capture_output=True, check=False)
    assert unknown.returncode == 2 and b"no stage nothing" in unknown.stderr


def test_without_a_gpu_the_script_skips_and_passes_nothing(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["bash", str(CHECK), "--stages", "build,matmul", "--python", sys.executable]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "skipped: build (no GPU" in done.stdout and "0 PASS, 0 FAIL" in done.stdout
    assert (tmp_path / "stages.csv").read_text().splitlines()[1:] == [
        "build,skipped,0",
        "matmul,skipped,0",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu_check.log",
        "stages.csv",
        "summary.txt",
    ]
