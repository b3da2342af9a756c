"""llama.cpp on a random Llama, tokens per second: `python -m benchmarks.peers.llama_cpp`.

Writes a GGUF of the given shape with random weights, runs it in a process of its own, and removes
it. All linears and the output head are of one type. Where the embedding is not tied to the head
it is Q4_0 whatever the type: one row of it is read per token, so that its type costs disk only.
The file has no tokenizer; tokens are random.

A prompt is evaluated as one batch, then tokens one by one after it. Each figure is a median.
Sampling is not part of it. Needs llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.peers import ggml
from mixbits.errors import first_line

_TILE = 256  # rows of a weight that are quantized; the others repeat them
_EMBEDDING = "Q4_0"


def llama_3_2_1b(tied: bool = True, layers: int = 16) -> LlamaConfig:
    """The shape of Llama-3.2-1B."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )


# --- the file ----------------------------------------------------------------------------------


def _heads(config: LlamaConfig) -> tuple[int, int, int]:
    """Heads of queries, heads of keys and values, columns of one head."""
    heads = config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // heads
    return heads, config.num_key_value_heads or heads, head_dim


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name in a block of a GGUF -> (rows N, columns K), for the linears of one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = _heads(config)
    queries, keys = heads * head_dim, kv_heads * head_dim
    return {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }


def weight_bytes(config: LlamaConfig, type_name: str) -> int:
    """Bytes of all linears and the head: what is read for every token."""
    shapes = list(linear_shapes(config).values()) * config.num_hidden_layers
    shapes.append((config.vocab_size, config.hidden_size))
    return sum(rows * ggml.row_bytes(type_name, columns) for rows, columns in shapes)


def _random_weight(type_name: str, rows: int, columns: int) -> Any:
    """numpy uint8 [rows, row_bytes]: normal values, as small as those of trained weights.

    A tile of rows is quantized and repeated. The time of a multiplication does not depend on the
    values as long as they are finite.
    """
    generator = torch.Generator().manual_seed(0)
    tile = 0.02 * torch.randn((min(rows, _TILE), columns), generator=generator)
    packed = ggml.quantize(type_name, tile)
    return packed.repeat(-(-rows // packed.shape[0]), 1)[:rows].numpy()


def _write_metadata(writer: Any, config: LlamaConfig) -> None:
    heads, kv_heads, head_dim = _heads(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def write_gguf(path: Path, config: LlamaConfig, type_name: str) -> None:
    """A random Llama of `config` whose linears and head are of `type_name` (see `ggml.TYPES`).

    Weights of one shape are the same array, so memory holds one layer.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, config)
    norm = torch.ones(config.hidden_size).numpy()
    arrays: dict[tuple[str, int, int], Any] = {}

    def add(name: str, type_name: str, shape: tuple[int, int]) -> None:
        key = (type_name, *shape)
        if key not in arrays:
            arrays[key] = _random_weight(type_name, *shape)
        kind = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(f"{name}.weight", arrays[key], raw_dtype=kind)

    head = (config.vocab_size, config.hidden_size)
    add("token_embd", type_name if config.tie_word_embeddings else _EMBEDDING, head)
    for layer in range(config.num_hidden_layers):
        for norm_name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm_name}.weight", norm)
        for name, shape in linear_shapes(config).items():
            add(f"blk.{layer}.{name}", type_name, shape)
    writer.add_tensor("output_norm.weight", norm)
    if not config.tie_word_embeddings:  # llama.cpp then takes token_embd for the head
        add("output", type_name, head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the process that runs it ------------------------------------------------------------------


def _open(path: Path, threads: int, prefill: int, decode: int) -> tuple[Any, Any]:
    """(model, context) with llama.cpp's defaults, but for threads and sizes."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path.name}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = prefill + decode
    params.n_batch = max(prefill, params.n_ubatch)
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
    return model, context


def _evaluate(context: Any, tokens: list[int]) -> float:
    """Seconds to evaluate `tokens` in one batch, after those before; logits of the last only."""
    import llama_cpp

    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    start = time.perf_counter()
    status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens)))
    llama_cpp.llama_synchronize(context)
    seconds = time.perf_counter() - start
    if status != 0:
        raise RuntimeError(f"llama_decode returned {status}")
    return seconds


def run(path: Path, threads: int, prefill: int, decode: int) -> dict[str, list[float]]:
    """Seconds of every prompt and of every token, in this process."""
    import llama_cpp

    model, context = _open(path, threads, prefill, decode)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens = torch.randint(vocab, (prefill + decode,)).tolist()
    prompts = []
    for _ in range(4):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        prompts.append(_evaluate(context, tokens[:prefill]))
    steps = [_evaluate(context, [token]) for token in tokens[prefill:]]
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    if not torch.tensor(logits[:vocab]).isfinite().all():
        raise RuntimeError("llama.cpp's logits are not finite")
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    # The first prompt brings the file and the buffers into memory.
    return {"prefill_seconds": prompts[1:], "decode_seconds": steps}


# --- the benchmark -----------------------------------------------------------------------------


def why_unavailable() -> str | None:
    """Why `measure` cannot run here, or None."""
    try:
        importlib.import_module("gguf")
        ggml.library()
    except (ImportError, OSError, AttributeError) as error:
        return first_line(error)
    return None


def measure(
    config: LlamaConfig,
    type_name: str = "MXFP4",
    threads: int = 2,
    prefill: int = 512,
    decode: int = 128,
) -> dict[str, Any]:
    """Speed of llama.cpp on a random Llama of `config`; `type_name` is one of `ggml.TYPES`.

    Keys: type, threads, prefill, decode (tokens); prefill_seconds (of each of three prompts),
    decode_seconds (of each token); prefill_tokens_per_second, decode_tokens_per_second (medians);
    weight_bytes (linears and head), file_bytes.
    """
    if type_name not in ggml.TYPES:
        raise ValueError(f"type must be one of {', '.join(ggml.TYPES)}: got {type_name!r}")
    # Its threads wait for each other as they do for its users, spinning for a while. Asleep at
    # once (OMP_WAIT_POLICY=passive), they would be slower. Spinning does need the cores alone.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, config, type_name)
        command = [sys.executable, "-m", "benchmarks.peers.llama_cpp", "--run", str(path)]
        sizes = ["--threads", threads, "--prefill", prefill, "--decode", decode]
        done = subprocess.run(
            [*command, *map(str, sizes)], capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            raise RuntimeError(f"llama.cpp failed:\n{done.stderr[-2000:]}")
        file_bytes = path.stat().st_size
    seconds = json.loads(done.stdout.splitlines()[-1])
    return {
        "type": type_name,
        "threads": threads,
        "prefill": prefill,
        "decode": decode,
        **seconds,
        "prefill_tokens_per_second": prefill / statistics.median(seconds["prefill_seconds"]),
        "decode_tokens_per_second": 1 / statistics.median(seconds["decode_seconds"]),
        "weight_bytes": weight_bytes(config, type_name),
        "file_bytes": file_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.llama_cpp")
    parser.add_argument("--type", choices=tuple(ggml.TYPES), default="MXFP4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=128, help="tokens after it")
    parser.add_argument("--layers", type=int, default=16, help="of Llama-3.2-1B's shape")
    parser.add_argument("--untied", action="store_true", help="a head apart from the embedding")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the child runs a GGUF
    args = parser.parse_args()
    if args.run is not None:
        print(json.dumps(run(args.run, args.threads, args.prefill, args.decode)))
        return
    config = llama_3_2_1b(not args.untied, args.layers)
    result = measure(config, args.type, args.threads, args.prefill, args.decode)
    print(
        f"llama.cpp {result['type']}, {args.threads} threads, "
        f"{result['weight_bytes'] / 1e6:.0f} MB of weights: "
        f"prefill {result['prefill_tokens_per_second']:.1f} tokens/s, "
        f"decode {result['decode_tokens_per_second']:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
