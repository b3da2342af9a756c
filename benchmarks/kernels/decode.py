"""Tokens per second of a whole model: `python -m benchmarks.kernels.decode`.

A Llama of about 1B parameters (the shape of Llama-3.2-1B) with random weights, run by
transformers: in bfloat16, in float32, and packed in mixed precision, the output head included.
llama.cpp runs the same shape in MXFP4, in a process of its own and with threads that spin, as its
users run it, where it is installed.

A prompt of 512 tokens is followed by 128 greedy steps. Contenders take turns, round by round;
figures are medians over all steps of all rounds, with the 20th and 80th percentile. For the packed
model the share of a step that is spent outside the matmuls is measured too: Python, attention,
norms, and the waits of the first thread for the others.
"""

from __future__ import annotations

import os

# Before torch is imported. Threads that spin between two kernels slow each other down as soon as
# anything else wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers import llama_cpp
from benchmarks.tools.timing import machine, percentile, write_csv
from mixbits.backends import cpu
from mixbits.errors import first_line
from mixbits.formats.schemes import Recipe, Scheme, parse_scheme
from mixbits.model.layout import find_linears
from mixbits.report.tables import table
from mixbits.runtime.attention import use_grouped_attention
from mixbits.runtime.linear import PackedLinear, share_inputs
from mixbits.runtime.pages import use_large_pages
from mixbits.runtime.swap import swap_linears
from mixbits.runtime.token_step import use_token_step


def random_model(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LlamaForCausalLM:
    """A model whose layers repeat one another's values: quick to make, as slow to run as any."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    tile = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    tile = tile.to(device, dtype)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), tile.numel()):
            flat[start : start + tile.numel()] = tile[: flat.numel() - start]
    model.tie_weights()
    return model.eval().requires_grad_(False)


def choose(model: nn.Module, low: Scheme, high: Scheme, avg_bits: float) -> dict[str, Scheme]:
    """All linears in `low`, but as many whole ones in `high` as `avg_bits` has room for."""
    linears = find_linears(model, include_head=True)
    total = sum(info.in_features * info.out_features for info in linears)
    spare = avg_bits * total - 8 * sum(
        low.weight.row_bytes(info.in_features) * info.out_features for info in linears
    )
    chosen = {}
    for info in linears:
        more = (
            8
            * info.out_features
            * (high.weight.row_bytes(info.in_features) - low.weight.row_bytes(info.in_features))
        )
        chosen[info.name] = high if more <= spare else low
        spare -= more if more <= spare else 0
    return chosen


def pack(model: LlamaForCausalLM, schemes: dict[str, Scheme]) -> None:
    """Replace the linears of `model` by packed ones, in place."""
    swap_linears(
        model,
        list(schemes),
        lambda n, w, b: PackedLinear.from_weight(w, Recipe.plain(schemes[n]), b, n),
    )
    share_inputs(model)
    use_grouped_attention(model)
    use_token_step(model)
    use_large_pages(model)


class KernelClock:
    """Seconds spent in matmuls of the native library while it is installed."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._native, self._step = cpu._native, cpu.token_step

    def install(self) -> None:
        cpu._native, cpu.token_step = self, self.token_step

    def token_step(self, *args: Any) -> float:
        seconds = self._step(*args)
        self.seconds += seconds
        return seconds

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._native, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - start
            return result

        setattr(self, name, timed)
        return timed


@torch.inference_mode()
def generate(
    model: nn.Module, prefill: int, decode: int, clock: KernelClock
) -> tuple[float, list[float], float]:
    """Seconds of the prompt, of every greedy step after it, and of the matmuls in all steps."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, prefill), generator=generator)
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    prompt = time.perf_counter() - start
    clock.seconds, steps = 0.0, []
    for _ in range(decode):
        start = time.perf_counter()
        ids = out.logits[:, -1:].float().argmax(-1)  # in bfloat16 it takes ten times as long
        out = model(ids, past_key_values=out.past_key_values, use_cache=True)
        steps.append(time.perf_counter() - start)
    return prompt, steps, clock.seconds


def measure(models: dict[str, nn.Module], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per model; models take turns, and the first round is not counted."""
    prompts: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    kernels = dict.fromkeys(models, 0.0)
    clock = KernelClock()
    clock.install()
    for number in range(args.rounds + 1):
        for name, model in models.items():
            prompt, taken, inside = generate(model, args.prefill, args.decode, clock)
            if number:
                prompts[name].append(prompt)
                steps[name] += taken
                kernels[name] += inside
    return [
        describe(name, prompts[name], steps[name], kernels[name], args, weight_bytes(model))
        for name, model in models.items()
    ]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the linears and the head: what a step reads."""
    head = model.lm_head
    linears = [m for m in model.modules() if isinstance(m, PackedLinear | nn.Linear)]
    assert head in linears
    return sum(
        tensor.nbytes for linear in linears for tensor in (*linear.parameters(), *linear.buffers())
    )


def describe(
    name: str,
    prompts: list[float],
    steps: list[float],
    kernels: float,
    args: argparse.Namespace,
    size: int,
) -> dict[str, Any]:
    median = percentile(steps, 50)
    return {
        "contender": name,
        "prefill_tokens_per_s": args.prefill / percentile(prompts, 50),
        "decode_tokens_per_s": 1 / median,
        "ms_per_token": 1e3 * median,
        "ms_p20": 1e3 * percentile(steps, 20),
        "ms_p80": 1e3 * percentile(steps, 80),
        "weights_mb": size / 1e6,
        "gb_per_s": size / median / 1e9,
        "outside_kernels": 1 - kernels / sum(steps) if kernels else None,
    }


def packed_model(
    config: LlamaConfig, schemes: str, avg_bits: float, int8_activations: bool = False
) -> tuple[str, nn.Module]:
    """Its name and a bfloat16 model packed in `schemes` ("LOW+HIGH"), head included."""
    low, high = (parse_scheme(name) for name in schemes.split("+"))
    model = random_model(config, torch.bfloat16)
    pack(model, choose(model, low, high, avg_bits))
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.int8_activations = int8_activations
    mode = ", int8 activations" if int8_activations else ""
    return f"mixbits {schemes} {avg_bits:g} bits{mode}", model


def llama_cpp_row(config: LlamaConfig, args: argparse.Namespace) -> dict[str, Any] | None:
    """llama.cpp's figures, or None and the reason printed."""
    if os.environ["OMP_WAIT_POLICY"].lower() == "active":
        print("skipped: llama.cpp (the threads of this process would spin beside it)")
        return None
    try:
        found = llama_cpp.measure(config, "MXFP4", args.threads, args.prefill, args.decode)
    except Exception as error:
        print(f"skipped: llama.cpp ({first_line(error)})")
        return None
    return describe(
        "llama.cpp MXFP4",
        found["prefill_seconds"],
        found["decode_seconds"],
        0.0,
        args,
        found["weight_bytes"],
    )


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """How many times faster each decodes than the others that are not ours."""
    for row in rows:
        for other in rows:
            if not other["contender"].startswith("mixbits"):
                row[f"x {other['contender']}"] = other["ms_per_token"] / row["ms_per_token"]


def print_rows(rows: list[dict[str, Any]]) -> None:
    others = [key for key in rows[0] if key.startswith("x ")]
    cells = [["", "prefill tok/s", "decode tok/s", "ms", "p20-p80", "GB/s", "outside", *others]]
    for row in rows:
        outside = row["outside_kernels"]
        cells.append(
            [
                row["contender"],
                f"{row['prefill_tokens_per_s']:.0f}",
                f"{row['decode_tokens_per_s']:.1f}",
                f"{row['ms_per_token']:.1f}",
                f"{row['ms_p20']:.1f}-{row['ms_p80']:.1f}",
                f"{row['gb_per_s']:.1f}",
                "" if outside is None else f"{outside:.0%}",
                *(f"{row[key]:.2f}" for key in others),
            ]
        )
    print(table(cells))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.decode")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=128, help="greedy steps after it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--avg-bits", type=float, default=4.5)
    parser.add_argument("--schemes", default="MXFP4+MXFP8,W4A16+W8A16", help="LOW+HIGH, ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-float32", action="store_true")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(machine())
    config = llama_cpp.llama_3_2_1b(layers=args.layers)
    models: dict[str, nn.Module] = {"torch bfloat16": random_model(config, torch.bfloat16)}
    if not args.no_float32:
        models["torch float32"] = random_model(config, torch.float32)
    models.update(packed_model(config, s, args.avg_bits) for s in args.schemes.split(","))
    rows = measure(models, args)
    models.clear()
    peer = llama_cpp_row(config, args)
    rows += [peer] if peer else []
    add_ratios(rows)
    print_rows(rows)
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
