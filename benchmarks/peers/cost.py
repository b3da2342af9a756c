"""What measuring costs, against AutoScheme: `python -m benchmarks.peers.cost`.

The same random Llama of 100 million parameters, the same token ids, the same schemes. Both run
in processes of their own, in turns, and are timed without imports and without opening the model:
mixbits from `measure` to the solved plan, AutoScheme the function that scores and solves. Medians
of the repeats. Memory is the process's peak resident size during that time, and its largest
anonymous memory above what it held before (no libraries, no open model, no mapped weights).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # inherited by both contenders

import numpy as np

from benchmarks.peers.autoscheme import METERS, Job, run_worker

SCHEMES = ("MXFP4,MXFP8", "MXFP4,MXFP8,W4A16,W8A16")
BUDGET = 5.0
COLUMNS = (
    *("model", "schemes", "nsamples", "seqlen", "batch_size", "repeat", "system"),
    *(f"measure_{meter}" for meter in METERS),
)


def measure_ours(model: str, ids_path: str, schemes: str, batch_size: int) -> dict[str, float]:
    """What `python -m mixbits.quantize --solve-only` does between reading and writing."""
    import torch

    from benchmarks.tools.meter import Meter
    from mixbits.formats.schemes import parse_scheme
    from mixbits.measuring.scores import Scores
    from mixbits.measuring.sensitivity import measure
    from mixbits.model.layout import find_linears
    from mixbits.model.streaming import StreamedModel, gradient_dtype
    from mixbits.model.units import make_units
    from mixbits.planning.plan import Budget, solve, unit_options
    from mixbits.source.source import open_source

    source = open_source(model)
    opened = source.load()
    linears = find_linears(opened)
    options = [parse_scheme(name) for name in schemes.split(",")]
    ids = torch.from_numpy(np.load(ids_path))
    units = make_units(linears)
    with Meter() as meter:
        streamed = StreamedModel(opened, gradient_dtype(source.dtype, "cpu"))
        slabs = measure(streamed, linears, options, ids, batch_size=batch_size)
        scores = Scores.build(slabs, linears, "fisher", ("floor", "floor"), {}, {})
        budget = Budget(BUDGET, ignore_scale_bits=True)
        solve(units, unit_options(units, options, []), scores, budget, "optimal")
    return meter.describe("measure")


def ours(job: Job) -> dict[str, Any]:
    words = [job.model, job.calibration, job.schemes, str(job.batch_size)]
    command = [sys.executable, "-m", "benchmarks.peers.cost", "--ours", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def theirs(job: Job) -> dict[str, Any]:
    (result,) = run_worker(job)
    return {f"measure_{meter}": result[f"measure_{meter}"] for meter in METERS}


CONTENDERS = {"mixbits": ours, "autoscheme": theirs}


def run(args: argparse.Namespace, folder: Path, records: Any) -> dict[str, dict[str, Any]]:
    """{schemes: {system: medians}}; every single run becomes a row of `records`."""
    from benchmarks.tools.random_llama import SHAPES, write_model

    model = write_model(folder / "model", args.shape, args.layers)
    # auto-round does not start without a tokenizer, which the ids make useless
    _write_tokenizer(model)
    shape = args.nsamples, args.seqlen
    ids = np.random.Generator(np.random.PCG64(0)).integers(
        0, SHAPES[args.shape]["vocab_size"], shape
    )
    np.save(folder / "ids.npy", ids)
    medians: dict[str, dict[str, Any]] = {}
    for schemes in args.schemes.split(";"):
        job = Job(
            str(model),
            str(folder / "ids.npy"),
            str(folder / "ids.npy"),
            schemes,
            [[BUDGET, "none"]],
            batch_size=args.batch_size,
        )
        common = {"model": args.shape, "schemes": schemes, "batch_size": args.batch_size}
        common.update(nsamples=args.nsamples, seqlen=args.seqlen)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for repeat in range(args.repeats):
            for system, contender in CONTENDERS.items():
                runs[system].append(contender(job))
                records.append({**common, "repeat": repeat, "system": system, **runs[system][-1]})
        medians[schemes] = {
            system: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
            for system, rows in runs.items()
        }
    return medians


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


def cost_table(medians: dict[str, dict[str, Any]]) -> str:
    from mixbits.report.tables import table

    lines = [["schemes", "system", "seconds", "times faster", "peak RSS, MB", "net, MB"]]
    for schemes, systems in medians.items():
        for system, row in systems.items():
            faster = systems["autoscheme"]["measure_seconds"] / row["measure_seconds"]
            numbers = row["measure_seconds"], faster, row["measure_peak_rss_mb"]
            cells = [f"{x:.1f}" for x in (*numbers, row["measure_peak_anonymous_mb"])]
            lines.append([schemes, system, *cells])
    return table(lines)


def main(argv: list[str] | None = None) -> None:
    if sys.argv[1:2] == ["--ours"]:  # a child
        model, ids, schemes, batch_size = sys.argv[2:]
        print(json.dumps(measure_ours(model, ids, schemes, int(batch_size))))
        return
    from benchmarks.tools.records import Records

    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.cost")
    parser.add_argument("--shape", default="llama-100m", help="of benchmarks.tools.random_llama")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--schemes", default=";".join(SCHEMES), help="sets, between semicolons")
    parser.add_argument("--nsamples", type=int, default=16, help="AutoScheme's default")
    parser.add_argument("--seqlen", type=int, default=256, help="AutoScheme's default")
    parser.add_argument("--batch-size", type=int, default=8, help="AutoScheme's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=Path("cost.csv"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        medians = run(args, Path(folder), Records(args.csv, COLUMNS, COLUMNS[:7]))
    print(cost_table(medians))


if __name__ == "__main__":
    main()
