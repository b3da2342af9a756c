"""auto-round's own AutoScheme on our tokens, judged by our evaluator.

    python -m benchmarks.peers.autoscheme MODEL --dataset text.txt --bits 4.25,4.5,5,6,7

MODEL is a folder, or `demo` for the bundled model and its text. Every budget is allocated once by
the installed package, which then rounds the model in three ways of its own:

    plain   round to nearest (disable_opt_rtn)
    opt     its search of scales (opt-RTN, the default of iters=0)
    tuned   SignRound, --iters steps per block

The package runs in a process of its own with private caches (benchmarks/peers/autoscheme_worker.py
says how it is given token ids). Rows are appended to the CSV as they are made, and rows that are
there already are skipped. `measure_*` is what scoring and solving took, without imports and
loading of the model; scores are measured once per run and cached for its other budgets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mixbits.formats.schemes import Scheme, parse_scheme

ROUNDINGS = ("plain", "opt", "tuned")
METERS = ("seconds", "cpu_seconds", "peak_rss_mb", "peak_anonymous_mb")
FIGURES = (
    *("kl", "kl_stderr", "perplexity", "perplexity_stderr"),
    *("perplexity_reference", "perplexity_reference_stderr"),
    *("top1_agreement", "top1_agreement_stderr"),
)
KEY = (
    "model",
    "schemes",
    "scale_modes",
    "counted",
    "asked",
    "rounding",
    "iters",
    "calibration_sha256",
)
COLUMNS = (
    *KEY,
    *("bits", "bits_without_scales", *FIGURES, "tasks", "documents", "differs_from_ours"),
    *(f"{stage}_{meter}" for stage in ("measure", "rounding") for meter in METERS),
    *("nsamples", "seqlen", "eval_nsamples", "held_out_sha256", "plan"),
)


@dataclass(frozen=True)
class Peer:
    """One budget and one way of rounding; `none` stops at the allocation."""

    bits: float
    rounding: str


@dataclass(frozen=True)
class Job:
    """What a worker is asked for; files hold int64 ids [sequences, length]."""

    model: str
    calibration: str
    held_out: str
    schemes: str
    peers: list[list[Any]]  # [bits, rounding]
    scale_modes: list[str] = field(default_factory=lambda: ["floor", "floor"])
    ignore_scale_bits: bool = True
    batch_size: int = 8
    iters: int = 200
    device: str = "cpu"
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    add_bos_token: bool | None = None
    include_path: str | None = None

    def parsed_schemes(self) -> list[Scheme]:
        weights, activations = self.scale_modes
        return [parse_scheme(name, weights, activations) for name in self.schemes.split(",")]

    def parsed_peers(self) -> list[Peer]:
        return [Peer(float(bits), rounding) for bits, rounding in self.peers]


def private_environment(home: Path) -> dict[str, str]:
    """Nothing read from or left in the user's caches, no network, no kernels from a hub."""
    return {
        **os.environ,
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "AR_AUTO_SCHEME_CACHE": str(home / "auto_round"),
        "AR_WORK_SPACE": str(home / "workspace"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "USE_HUB_KERNELS": "NO",
    }


def run_worker(job: Job, log: Path | None = None) -> Iterator[dict[str, Any]]:
    """Results of a job as they come: the columns of a row, and `plan`, linear -> scheme.

    Raises RuntimeError with the end of the worker's log if it fails.
    """
    with tempfile.TemporaryDirectory() as home:
        path = log or Path(home) / "log"
        with path.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.autoscheme_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=private_environment(Path(home)),
            )
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(asdict(job)))
            process.stdin.close()
            try:
                for line in process.stdout:
                    yield json.loads(line)
            except BaseException:
                process.terminate()
                raise
            process.wait()
        if process.returncode:
            tail = path.read_text().strip().splitlines()[-5:]
            raise RuntimeError("auto-round failed: " + "\n".join(tail))


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which tokens are used; `benchmarks.tools.text.make_text` reads them."""
    parser.add_argument("model", help="a model folder, or `demo` for the bundled one")
    parser.add_argument("--dataset", help="text, .jsonl, .npy or .json of token ids, or a name")
    parser.add_argument("--marker", help="what separates documents in the text, such as </s>")
    parser.add_argument("--nsamples", type=int, default=64, help="to calibrate (%(default)s)")
    parser.add_argument("--eval-nsamples", type=int, default=128, help="held out (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens (%(default)s)")


def run(args: argparse.Namespace, folder: Path, records: Any) -> list[dict[str, str]]:
    """Every budget and rounding of the arguments; rows of `records`, old and new."""
    from benchmarks.tools.text import make_text

    counts = args.nsamples, args.eval_nsamples
    text = make_text(args.model, folder, args.dataset, counts, args.seqlen, args.marker)
    shared = {
        "model": args.model if args.model == "demo" else Path(args.model).resolve().name,
        "schemes": args.schemes,
        "scale_modes": args.scale_modes,
        "counted": "all" if args.count_scales else "elements",
        "iters": args.iters,
        "calibration_sha256": text.calibration_sha256[:16],
    }
    wanted = [(b, r) for b in args.bits.split(",") for r in args.roundings.split(",")]
    missing = [p for p in wanted if records.find(**shared, asked=p[0], rounding=p[1]) is None]
    job = Job(
        text.model,
        str(text.calibration),
        str(text.held_out),
        args.schemes,
        [list(peer) for peer in missing],
        args.scale_modes.split("/"),
        ignore_scale_bits=not args.count_scales,
        batch_size=args.batch_size,
        iters=args.iters,
        device=args.device,
    )
    sizes = {k: getattr(args, k) for k in ("nsamples", "seqlen", "eval_nsamples")}
    sizes["held_out_sha256"] = text.held_out_sha256[:16]
    for peer, result in zip(missing, run_worker(job) if missing else [], strict=True):
        result["plan"] = " ".join(f"{n}={s}" for n, s in result["plan"].items())
        known = {k: v for k, v in result.items() if k in COLUMNS}
        records.append({**shared, "asked": peer[0], "rounding": peer[1], **sizes, **known})
        print(f"{peer[1]:>6} at {peer[0]} bits: {result['kl'] * 1e3:.1f}", flush=True)
    found = [records.find(**shared, asked=b, rounding=r) for b, r in wanted]
    return [row for row in found if row is not None]


def result_table(rows: Sequence[dict[str, str]], bits: Sequence[str]) -> str:
    from mixbits.report.tables import table

    lines = [[f"{rows[0]['model']}, {rows[0]['schemes']}", *bits]]
    for rounding in dict.fromkeys(row["rounding"] for row in rows):
        cells = {r["asked"]: float(r["kl"]) * 1e3 for r in rows if r["rounding"] == rounding}
        lines.append([rounding, *(f"{cells[b]:.1f}" if b in cells else "-" for b in bits)])
    return table(lines)


def main(argv: list[str] | None = None) -> None:
    from benchmarks.tools.records import Records

    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.autoscheme")
    add_text_options(parser)
    parser.add_argument("--schemes", default="MXFP4,MXFP8")
    parser.add_argument("--scale-modes", default="floor/floor", help="of weights/activations")
    parser.add_argument("--bits", default="4.25,4.5,5,6,7")
    parser.add_argument("--count-scales", action="store_true", help="the budget counts scales too")
    parser.add_argument("--roundings", default="plain,opt", help=", ".join(ROUNDINGS))
    parser.add_argument("--iters", type=int, default=200, help="of SignRound (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=Path("autoscheme.csv"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args, Path(folder), Records(args.csv, COLUMNS, KEY))
    print("\nKL to the original, 1e-3 nats per token")
    print(result_table(rows, args.bits.split(",")))


if __name__ == "__main__":
    main()
