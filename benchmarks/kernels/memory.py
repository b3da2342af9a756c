"""Peak memory of the sensitivity measurement against depth: `python -m benchmarks.kernels.memory`.

Makes random Llamas of a few depths, measures each as `python -m mixbits.quantize` would, and
prints the largest anonymous memory above what the process held with the model open. Weights stay
mapped from the file and are not part of it; one block and the head in float32 are, and the
activations and logits of one batch. The peak should not grow with depth, but for the block
inputs that backward needs: tokens x hidden x 4 bytes per block.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixbits.command import quiet
from mixbits.formats.schemes import parse_scheme
from mixbits.measuring.sensitivity import METHODS, measure
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.report.clock import environment
from mixbits.report.tables import table
from mixbits.source.source import open_source


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark needs Linux: /proc/self/status has no RssAnon")


def make_model(folder: Path, layers: int) -> None:
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def measure_one(folder: Path, method: str, batch_size: int) -> None:
    """Print peak bytes above the open model, seconds, bytes of a block and of the head."""
    model = open_source(str(folder)).load()
    linears = find_linears(model)
    schemes = [parse_scheme("MXFP4"), parse_scheme("MXFP8")]
    ids = torch.randint(32000, (batch_size, 256), generator=torch.Generator().manual_seed(0))
    base, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    measure(StreamedModel(model), linears, schemes, ids, method, batch_size)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() * 4
    print(peak[0] - base, seconds, block, head)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.memory")
    parser.add_argument("--layers", default="4,16")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 256 tokens")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # a child measures one model
    parser.add_argument("--method", choices=METHODS, default="fisher")
    args = parser.parse_args()
    quiet()
    if args.one is not None:
        measure_one(args.one, args.method, args.batch_size)
        return
    rows = [["layers", "method", "peak, MB", "block + head, MB", "seconds"]]
    for layers in map(int, args.layers.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), layers)
            for method in METHODS:
                command = [sys.executable, "-m", "benchmarks.kernels.memory", "--one", folder]
                options = ["--method", method, "--batch-size", str(args.batch_size)]
                done = subprocess.run(
                    command + options, check=True, stdout=subprocess.PIPE, text=True
                )
                peak, seconds, block, head = map(float, done.stdout.split())
                size = f"{(block + head) / 1e6:.0f}"
                rows.append([str(layers), method, f"{peak / 1e6:.0f}", size, f"{seconds:.0f}"])
    where = environment()
    print(f"{where['machine']}, {where['cpus']} cores, torch {where['torch']}")
    print(table(rows))


if __name__ == "__main__":
    main()
