"""Shapes [N, K] of the linears that benchmarks multiply."""

from __future__ import annotations

# out_features, in_features of the linears of a block; gate and up are alike, as are k and v.
SHAPES = {
    "llama-3.1-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "qwen3-8b": [(4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288)],
    "qwen3-32b": [(8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600)],
    # Large and a power of two: how fast a kernel is when nothing but the kernel matters.
    "ideal": [(16384, 8192)],
    "ideal-gpu": [(8192, 8192), (16384, 8192)],
}


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Names of SHAPES and pairs NxK, separated by commas -> shapes, each once."""
    shapes: list[tuple[int, int]] = []
    for word in text.split(","):
        if word in SHAPES:
            shapes += SHAPES[word]
            continue
        rows, _, columns = word.partition("x")
        if not (rows.isdigit() and columns.isdigit()):
            raise SystemExit(f"--shapes takes {', '.join(SHAPES)} or NxK: got {word!r}")
        shapes.append((int(rows), int(columns)))
    return list(dict.fromkeys(shapes))
