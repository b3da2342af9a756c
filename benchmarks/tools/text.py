"""The same token ids for every contender: calibration and held-out sequences as .npy files."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mixbits import demo
from mixbits.measuring.text import Sequences, cut, load_sequences, split, tokenize
from mixbits.source.source import open_source

GATE = 32  # more sequences, on which mixbits compares candidate plans
DEMO = "demo"  # in place of a model's folder: the bundled model and its own text


@dataclass(frozen=True)
class Text:
    """A model and what it is calibrated with and judged by; hashes are those of the ids.

    `dataset` is `calibration` and then the sequences of mixbits' gate, none of them held out.
    """

    model: str
    calibration: Path
    dataset: Path
    held_out: Path
    calibration_sha256: str
    held_out_sha256: str


Parts = tuple[Sequences, Sequences, Sequences]  # to calibrate, of the gate, held out


def _demo_parts(count: int, held_count: int, length: int) -> Parts:
    """Modules that the bundled model was trained on, shuffled as `--demo` does, and held-out ones.

    The ids are those of `python -m mixbits.quantize --demo` with seed 0.
    """
    tokenizer = open_source(str(demo.MODEL_DIR)).tokenizer()
    files = demo.training_files()
    random.Random(0).shuffle(files)
    training = "\n\n".join(path.read_text(encoding="utf-8") for path in files[: 8 * count])
    first, held = (
        cut(tokenize(tokenizer, text), length, name, len(tokenizer))
        for text, name in ((training, "the standard library"), (demo.held_out_text(), "held out"))
    )
    return *split([first], count, GATE), split([held], 0, held_count)[1]


def _parts(model: str, dataset: str, counts: tuple[int, int], length: int) -> Parts:
    """From the head of a dataset: to calibrate, held out, and what follows for the gate."""
    source = open_source(model)
    vocab = source.config.get_text_config().vocab_size
    count, held_count = counts
    first, rest = load_sequences(
        dataset, source.tokenizer(), vocab, count, held_count + GATE, length
    )
    held, gate = split([rest], held_count, GATE)
    return first, gate, held


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
        first, gate, held = _demo_parts(*counts, length)
    elif dataset is None:
        raise SystemExit("--dataset is required: a text file, token ids, or a dataset name")
    else:
        if marker is not None:
            cleaned = folder / "text.txt"
            text = Path(dataset).read_text(encoding="utf-8")
            cleaned.write_text(text.replace(marker, "\n"), encoding="utf-8")
            dataset = str(cleaned)
        first, gate, held = _parts(model, dataset, counts, length)
    arrays = {
        "calibration": first.ids,
        "dataset": torch.cat([first.ids, gate.ids]),
        "held_out": held.ids,
    }
    paths = {name: folder / f"{name}.npy" for name in arrays}
    for name, ids in arrays.items():
        np.save(paths[name], ids.numpy())
    return Text(model, **paths, calibration_sha256=first.sha256, held_out_sha256=held.sha256)
