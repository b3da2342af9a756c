"""The sections of `benchmarks.kernels.gpu` that take a whole model: random weights, a real shape.

The weights repeat one another (benchmarks.kernels.decode.random_model): values do not change how
long a step takes, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, StaticCache

from benchmarks.kernels.decode import choose, pack, random_model, weight_bytes
from benchmarks.kernels.gpu_timing import WARM_UP, AppendedRows, Budget, spread
from benchmarks.tools.timing import percentile
from mixbits.formats.schemes import parse_scheme
from mixbits.measuring.sensitivity import measure
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.runtime.graphs import Record, capture, drop_graphs, use_graphs

SAMPLES = 16  # sequences that the scores are measured with
SEQLEN = 256
AVG_BITS = 4.5


def llama(layers: int, width: int) -> LlamaConfig:
    """Llama-3.1-8B for 32 layers of width 4096; others have its proportions."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        vocab_size=min(128256, 32 * width),
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _ids(config: LlamaConfig, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (rows, length), generator=generator)


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 1e9


def sensitivity(args: argparse.Namespace, out: AppendedRows, budget: Budget) -> None:
    """Scores of MXFP4 and MXFP8 for every linear, weights on the host in bfloat16."""
    device = torch.device(args.device)
    config = llama(args.layers, args.width)
    model = random_model(config, torch.bfloat16)
    linears = find_linears(model)
    schemes = [parse_scheme("MXFP4"), parse_scheme("MXFP8")]
    ids = _ids(config, SAMPLES, SEQLEN)
    for batch_size in budget.take([SAMPLES, SAMPLES // 2]):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        streamed = StreamedModel(model, device=device)
        measure(streamed, linears, schemes, ids, batch_size=batch_size)
        seconds = time.perf_counter() - start
        peak = _peak(device)
        note = f"{args.layers} layers of {args.width}, {SAMPLES} x {SEQLEN} tokens"
        out.append(
            {
                "section": "sensitivity",
                "contender": f"mixbits fisher, batches of {batch_size}",
                "scheme": "MXFP4+MXFP8",
                "seconds": seconds,
                "peak_gpu_gb": peak,
                "note": f"{note}, float32, weights streamed from the host's memory",
            }
        )
        print(f"  batches of {batch_size}: {seconds:.1f} s, peak {peak or 0:.2f} GB", flush=True)


# --- generate --------------------------------------------------------------------------------


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generate_seconds(model: Any, ids: Tensor, new_tokens: int, rounds: int = 3) -> list[float]:
    """Seconds per token of `generate`: of what `new_tokens` more take than a few do."""
    few, seconds = 4, []

    def run(count: int) -> float:
        _synchronize(ids.device)
        start = time.perf_counter()
        # The same length each time: a static cache of another size would be captured anew.
        model.generate(
            ids,
            max_length=ids.shape[1] + few + new_tokens,
            stopping_criteria=[lambda tokens, _: tokens.shape[1] >= ids.shape[1] + count],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        _synchronize(ids.device)
        return time.perf_counter() - start

    run(few)  # compiles, and captures
    for _ in range(rounds):
        seconds.append((run(few + new_tokens) - run(few)) / new_tokens)
    return seconds


@torch.no_grad()
def loop_seconds(
    model: Any, ids: Tensor, new_tokens: int, record: Record = capture, rounds: int = 3
) -> list[float]:
    """Seconds per greedy step where nothing but replays of one graph comes from the host."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new_tokens + WARM_UP + 1)
    first = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    token = first[:, -1:].argmax(-1)

    def step() -> Tensor:
        logits = model(input_ids=token, past_key_values=cache).logits
        token.copy_(logits[:, -1:].argmax(-1))
        return token

    lengths = [layer.cumulative_length.clone() for layer in cache.layers]

    def rewind() -> None:
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)

    for _ in range(WARM_UP):
        step()
    rewind()
    replay, _ = record(step)
    seconds = []
    for _ in range(rounds):
        rewind()
        _synchronize(ids.device)
        start = time.perf_counter()
        for _ in range(new_tokens):
            replay()
        _synchronize(ids.device)
        seconds.append((time.perf_counter() - start) / new_tokens)
    return seconds


def _rerun(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """`capture` for a CPU, where nothing can be captured."""

    def replay() -> None:
        step()

    return replay, step()


def generate(args: argparse.Namespace, out: AppendedRows, budget: Budget) -> None:
    """Tokens per second of one sequence: bfloat16, then the same model packed."""
    device = torch.device(args.device)
    config = llama(args.layers, args.width)
    record = capture if device.type == "cuda" else _rerun
    ids = _ids(config, 1, args.prompt).to(device)
    model = random_model(config, torch.bfloat16, device)
    ways: dict[str, Callable[[], list[float]]] = {
        "generate": lambda: generate_seconds(model, ids, args.new_tokens),
        "generate, CUDA graphs": lambda: generate_seconds(model, ids, args.new_tokens),
        "one graph per step": lambda: loop_seconds(model, ids, args.new_tokens, record),
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    cases = [(kind, way) for kind in ("torch bfloat16", "mixbits 4.5 bits") for way in ways]
    for kind, way in budget.take(cases):
        if kind.startswith("mixbits") and not rows.keys() & {(kind, w) for w in ways}:
            schemes = choose(model, parse_scheme("MXFP4"), parse_scheme("MXFP8"), AVG_BITS)
            pack(model, schemes)
        if "CUDA graphs" in way:
            use_graphs(model, record)
        seconds = ways[way]()
        drop_graphs(model)
        rows[kind, way] = generate_row(kind, way, seconds, weight_bytes(model))
        if (base := rows.get(("torch bfloat16", way))) is not None:
            rows[kind, way]["ratio"] = base["us"] / rows[kind, way]["us"]
        note = f"{args.layers} layers of {args.width}, prompt {args.prompt}"
        out.append({**rows[kind, way], "peak_gpu_gb": _peak(device), "note": note})
        speed = rows[kind, way]["tokens_per_s"]
        ratio = rows[kind, way].get("ratio", float("nan"))
        print(f"  {kind:<18} {way:<22} {speed:8.1f} tokens/s  {ratio:.2f}", flush=True)


def generate_row(kind: str, way: str, seconds: list[float], size: int) -> dict[str, Any]:
    median = percentile(seconds, 50)
    return {
        "section": "generate",
        "contender": f"{kind}, {way}",
        "scheme": "BF16" if kind.startswith("torch") else "MXFP4+MXFP8",
        **spread(seconds),
        "tokens_per_s": 1 / median,
        "gb_per_s": size / median / 1e9,
    }
