"""The same token ids for every contender: calibration and held-out sequences as two .npy files."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixbits import demo
from mixbits.calibration import Sequences, cut, load_sequences, split, tokenize
from mixbits.source import open_source

DEMO = "demo"  # in place of a model's folder: the bundled model and its own text


@dataclass(frozen=True)
class Text:
    """A model and what it is calibrated with and judged by; hashes are those of the ids."""

    model: str
    calibration: Path
    held_out: Path
    calibration_sha256: str
    held_out_sha256: str


def _demo_sequences(count: int, held_count: int, length: int) -> tuple[Sequences, Sequences]:
    """Modules that the bundled model was trained on, shuffled, and those held out."""
    tokenizer = open_source(str(demo.MODEL_DIR)).tokenizer()
    files = demo.training_files()
    random.Random(0).shuffle(files)
    training = "\n\n".join(path.read_text(encoding="utf-8") for path in files[: 8 * count])
    first, held = (
        cut(tokenize(tokenizer, text), length, name, len(tokenizer))
        for text, name in ((training, "the standard library"), (demo.held_out_text(), "held out"))
    )
    return split(first, count, 0)[0], split(held, 0, held_count)[1]


def make_text(
    model: str,
    folder: Path,
    dataset: str | None,
    counts: tuple[int, int],
    length: int,
    marker: str | None = None,
) -> Text:
    """Write `counts` sequences of `length` tokens to calibrate with and to judge by.

    `marker` is what separates documents in a text file, if anything: it becomes a newline, so
    that no tokenizer splits it into letters.
    """
    if model == DEMO:
        model = str(demo.MODEL_DIR)
        pair = _demo_sequences(*counts, length)
    else:
        if dataset is None:
            raise SystemExit("--dataset is required: a text file, token ids, or a dataset name")
        if marker is not None:
            cleaned = folder / "text.txt"
            text = Path(dataset).read_text(encoding="utf-8")
            cleaned.write_text(text.replace(marker, "\n"), encoding="utf-8")
            dataset = str(cleaned)
        source = open_source(model)
        vocab = source.config.get_text_config().vocab_size
        pair = load_sequences(dataset, source.tokenizer(), vocab, *counts, length)
    paths = folder / "calibration.npy", folder / "held_out.npy"
    for path, sequences in zip(paths, pair, strict=True):
        np.save(path, sequences.ids.numpy())
    return Text(model, *paths, *(s.sha256 for s in pair))
