"""A newcomer's first result, and llama.cpp's: `python -m benchmarks.quality.first_result MODEL`.

    default   python -m mixbits.quantize MODEL, calibrated on --dataset
    quick     the same with --effort quick
    Q4_K_M    llama.cpp's, from a GGUF of the model as it is, with nothing calibrated

Each in a process of its own, one after the other, timed from its start to its end; sizes are of all
weights. KL, perplexity and top-1 agreement are on the same sequences of --eval-dataset, against
the original in 16 bits; Q4_K_M's are of llama.cpp's own logits, with keys and values in float32.
Needs llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.exports import LlamaCpp
from benchmarks.tools.records import Records
from benchmarks.tools.runs import quantize
from mixbits.command import quiet
from mixbits.measuring.evaluate import compare
from mixbits.measuring.text import prefix_tokens, read_sequences
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.report.tables import table
from mixbits.report.verdict import verdict
from mixbits.source.source import open_source

KEY = ["model", "what"]
FIGURES = ["seconds", "megabytes", "kl", "perplexity", "perplexity_reference", "top1_agreement"]
OURS = {"quick": ["--effort", "quick"], "default": []}
PEER = "Q4_K_M"
SEQLEN = 256
MODES = {"weight_scale_mode": "floor", "act_scale_mode": "even"}


def run_ours(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    text = ["--dataset", args.dataset, "--eval-dataset", args.eval_dataset]
    text += ["--eval-nsamples", str(args.eval_nsamples), "--seqlen", str(SEQLEN)]
    for what, words in OURS.items():
        if what not in args.what:
            continue
        start = time.perf_counter()
        report = quantize(args.model, folder / what, [*text, *words])
        seconds = time.perf_counter() - start
        found = report["evaluation"]["held_out"]
        yield {"what": what, "seconds": seconds, "bytes": report["bytes_after"], **found}


def plain_gguf(model: str, folder: Path) -> Path:
    """The model as it is, but for one linear in Q8_0: an export is of a model that is packed."""
    name = find_linears(open_source(model).shapes)[0].name
    unit = {"unit": name, "scheme": "W8A16G32", "linears": {name: "all"}}
    plan = folder / "nothing.json"
    plan.write_text(json.dumps({"mixbits_plan": 1, **MODES, "units": [unit]}))
    words = ["--plan", str(plan), "--rounding", "rtn", "--eval-nsamples", "0"]
    quantize(model, folder / "plain", words)
    command = [sys.executable, "-m", "mixbits.export", str(folder / "plain")]
    out = folder / "plain-gguf"
    subprocess.run([*command, "--format", "gguf", "--out", str(out)], check=True)
    return out / "model.gguf"


def run_peer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import llama_cpp

    source, target = plain_gguf(args.model, folder), folder / "Q4_K_M.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    options.allow_requantize = True  # that linear
    start = time.perf_counter()
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    seconds = time.perf_counter() - start
    if code:
        raise SystemExit(f"llama.cpp could not quantize {source}: {code}")
    opened = open_source(args.model)
    tokenizer, vocab = opened.tokenizer(), opened.config.get_text_config().vocab_size
    prefix, count = prefix_tokens(tokenizer), args.eval_nsamples
    held_out = read_sequences(args.eval_dataset, tokenizer, vocab, count, SEQLEN, prefix)
    peer, original = LlamaCpp(target), StreamedModel(opened.load())
    found = compare(original, peer, held_out.ids, 1, held_out.judged_from)
    return {"what": PEER, "seconds": seconds, "bytes": target.stat().st_size, **found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.first_result")
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True, help="text to calibrate with")
    parser.add_argument("--eval-dataset", required=True, help="text to judge by")
    parser.add_argument("--eval-nsamples", type=int, default=32)
    parser.add_argument("--what", type=lambda text: text.split(","), default=[*OURS, PEER])
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    quiet()
    records = Records(args.csv, [*KEY, *FIGURES, "verdict"], KEY)
    with tempfile.TemporaryDirectory() as temporary:
        rows = list(run_ours(args, Path(temporary)))
        rows += [run_peer(args, Path(temporary))] if PEER in args.what else []
    cells = []
    for row in rows:
        row |= {"model": Path(args.model).name, "megabytes": row.pop("bytes") / 1e6}
        row["verdict"] = verdict(row)["word"]
        kept = {name: row[name] for name in (*KEY, *FIGURES, "verdict")}
        records.append(kept)
        cells.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in kept.values()])
    print(table([[*KEY, *FIGURES, "verdict"], *cells]))


if __name__ == "__main__":
    main()
