"""Every stage on the shapes of real models: `python -m benchmarks.kernels.real_shapes`.

The widths, heads and vocabularies are those of the models; the weights are random and there are
--layers decoder blocks instead of the model's 28 to 64, because memory does not grow with depth
(weights stay mapped, one block is resident) and time grows in proportion. Each model is written,
quantized by `python -m mixbits.quantize`, packed, loaded back and compared; the table shows the
stages' seconds and peak resident memory, mapped weight files included.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tools.random_llama import SHAPES, write_model
from benchmarks.tools.records import Records
from benchmarks.tools.runs import quantize
from mixbits.report.tables import table

MODELS = [name for name in SHAPES if name != "llama-100m"]
KEY = ("model", "layers", "layers_of_the_model", "sequences", "seqlen", "batch_size", "options")
COLUMNS = (*KEY, "stage", "seconds", "peak_memory_mb", "bytes_before", "bytes_after", "kl")


def run_one(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one model: one per stage."""
    model = write_model(folder / name, name, args.layers)
    count = args.sequences
    generator = np.random.Generator(np.random.PCG64(0))
    ids = generator.integers(0, SHAPES[name]["vocab_size"], (2 * count, args.seqlen))
    np.save(folder / "ids.npy", ids)
    words = ["--dataset", str(folder / "ids.npy"), "--avg-bits", "4.75"]
    words += ["--nsamples", str(count), "--eval-nsamples", str(count)]
    words += ["--seqlen", str(args.seqlen), "--batch-size", str(args.batch_size)]
    out = folder / "packed"
    report = quantize(str(model), out, [*words, *shlex.split(args.options), "--overwrite"])
    common = {
        "model": name,
        "layers": args.layers,
        "layers_of_the_model": SHAPES[name]["num_hidden_layers"],
        "sequences": count,
        "seqlen": args.seqlen,
        "batch_size": args.batch_size,
        "options": args.options,
        "bytes_before": report["bytes_before"],
        "bytes_after": report["bytes_after"],
        "kl": report["evaluation"]["held_out"]["kl"],
    }
    shutil.rmtree(out)
    shutil.rmtree(model)
    return [
        {
            **common,
            "stage": stage["stage"],
            "seconds": stage["seconds"],
            "peak_memory_mb": round(stage["peak_memory_bytes"] / 1e6),
        }
        for stage in report["stages"]
    ]


def stage_table(rows: Sequence[dict[str, Any]]) -> str:
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    lines = [["seconds / peak MB", "layers", *stages]]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        cells = [f"{float(r['seconds']):.0f} / {r['peak_memory_mb']}" for r in mine]
        lines.append([name, f"{mine[0]['layers']} of {mine[0]['layers_of_the_model']}", *cells])
    return table(lines)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=",".join(MODELS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8, help="to calibrate, and held out")


def run(args: argparse.Namespace, records: Records) -> list[dict[str, Any]]:
    rows = []
    for name in args.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            for row in run_one(name, args, Path(folder)):
                rows.append(records.append(row))
        print(stage_table(rows[-6:]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.real_shapes")
    _add_options(parser)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--options", default="", help="further words for mixbits.quantize")
    parser.add_argument("--csv", type=Path, default=Path("real_shapes.csv"))
    args = parser.parse_args(argv)
    rows = run(args, Records(args.csv, COLUMNS, (*KEY, "stage")))
    print("\n" + stage_table(rows))


if __name__ == "__main__":
    main()
