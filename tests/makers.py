"""All makers of checkpoints as they are published, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import published
import published_integers as integers
from published import Published
from published_integers import COMPRESSED

Maker = Callable[[Path], Published]
QUANTIZED: dict[str, Maker] = {
    "deepseek_v3": published.deepseek_v3,
    "deepseek_v31": lambda folder: published.deepseek_v3(folder, "ue8m0"),
    "qwen3_fp8": published.qwen3_fp8,
    "gpt_oss": published.gpt_oss,
    "kimi_k2": integers.kimi_k2,
    "awq": integers.awq,
    "gptq": integers.gptq,
    **{name: lambda f, name=name: integers.compressed(f, name) for name in COMPRESSED},
}
PLAIN: dict[str, Maker] = {"qwen3_5": published.qwen3_5, "gemma3": published.gemma3}
