"""The text of a run: to calibrate with, to choose by, and to judge by; none shares a token."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from .. import demo
from ..errors import UsageError
from ..measuring.scores import Scores
from ..measuring.text import (
    CHARS_PER_TOKEN,
    Sequences,
    cut,
    prefix_tokens,
    read_sequences,
    split,
    tokenize,
)
from ..rounding.methods import CORRECTION
from .run import Run
from .settings import Settings

PYTHON_TEXT = "modules of Python's standard library"
ENOUGH_TOKENS = 2  # of calibration for each column of the widest input


@dataclass
class Text:
    """What to calibrate with, to choose by, and to judge by; any may be empty.

    `notes` are lines to tell of it, `correction` is the share that gptq makes up for with it.
    """

    calibration: Sequences
    gate: Sequences
    held_out: Sequences
    notes: list[str] = field(default_factory=list)
    correction: float = 0.0


def calibrate(run: Run, tokenizer: Any) -> Text:
    """The run's text: three parts that share no token."""
    settings = run.settings
    prefix = prefix_tokens(tokenizer) if settings.bos else ()
    gate = settings.gate if settings.is_gated or settings.diagnose else 0
    count = settings.nsamples if settings.calibrates or gate else 0
    if settings.diagnose and count < 2:
        raise UsageError(f"--diagnose halves the calibration text: got {count} sequence")
    # Text that nothing else goes through is read from its beginning.
    is_first = not (count or settings.scores or settings.plan)
    seen = 0 if is_first else max(settings.nsamples, _seen(settings, len(prefix)))
    held_count = 0 if settings.solve_only else settings.eval_nsamples
    notes: list[str] = []
    if settings.dataset is None and settings.eval_dataset is None and held_count:
        notes.append(f"judged on {PYTHON_TEXT}, for want of other text (--dataset)")
        if tokenizer is None:
            notes, held_count = ["not judged: there is no --dataset, and no tokenizer"], 0
    first, held_out = _first_and_held_out(
        run, tokenizer, prefix, seen + gate if gate else count, seen + gate, held_count
    )
    text = Text(first[:count], first[seen : seen + gate], held_out, notes)
    settle_correction(run, text)
    return text


def settle_correction(run: Run, text: Text) -> None:
    """--correction, or its default: with little text, it follows this too closely."""
    settings, tokens = run.settings, text.calibration.ids.numel()
    widest = max(info.in_features for info in run.linears)
    is_short = tokens < ENOUGH_TOKENS * widest
    compensates = settings.rounding == "gptq" and not settings.solve_only
    text.correction = CORRECTION if settings.correction is None else settings.correction
    if settings.correction is None:
        is_judged = settings.is_gated  # against no correction
        if is_short and not is_judged:
            text.correction = 0.0
        what = "" if is_judged else ", so that --correction is 0"
    else:
        what = ", which --correction follows closely" if settings.correction else ""
    if is_short and compensates:
        text.notes.append(
            f"the text is short for gptq: {tokens:,} tokens, and inputs of {widest:,} columns want "
            f"{ENOUGH_TOKENS * widest:,}{what}; more --nsamples round better"
        )


def text_read(settings: Settings) -> str:
    """The text that `calibrate` reads, for people."""
    judges = settings.eval_nsamples and not settings.solve_only
    reads_first = settings.calibrates or settings.is_gated or settings.diagnose
    if settings.demo:
        return "its own text"
    found = []
    if reads_first or (judges and not settings.eval_dataset):
        found.append(settings.dataset or PYTHON_TEXT)
    if judges and settings.eval_dataset:
        found.append(settings.eval_dataset)
    return ", ".join(found) or "no text is needed"


def _seen(settings: Settings, prefix: int) -> int:
    """Sequences at the head of the dataset, `prefix` tokens of each its prefix, that --scores saw.

    At least so many, where theirs were of another length.
    """
    if settings.scores is None:
        return 0
    used = Scores.read(settings.scores).data["calibration"]
    count, length = int(used["nsamples"]), int(used["seqlen"])
    text = settings.seqlen - prefix
    return count if length == settings.seqlen or text < 1 else -(-count * length // text)


def _first_and_held_out(
    run: Run, tokenizer: Any, prefix: tuple[int, ...], count: int, before: int, held_count: int
) -> tuple[Sequences, Sequences]:
    """The first `count` sequences, and `held_count` others; none where 0 are needed.

    The others are of --eval-dataset, or come after the first `before`.
    """
    settings, vocab = run.settings, run.source.config.get_text_config().vocab_size
    is_bundled = settings.dataset is None and settings.eval_dataset is None and held_count
    if settings.demo or is_bundled:  # the latter where nothing calibrates
        return _demo_sequences(settings, tokenizer, vocab, prefix, count, held_count)
    if settings.eval_dataset is not None or not held_count:
        before = count
    first = held_out = Sequences.none(settings.seqlen, prefix)
    after = held_count if settings.eval_dataset is None else 0
    if count or after:
        total = before + after
        assert settings.dataset is not None
        pool = read_sequences(settings.dataset, tokenizer, vocab, total, settings.seqlen, prefix)
        first, held_out = split(pool, before, after)
    if settings.eval_dataset is not None and held_count:
        pool = read_sequences(
            settings.eval_dataset, tokenizer, vocab, held_count, settings.seqlen, prefix
        )
        held_out = split(pool, 0, held_count)[1]
    return first, held_out


def _demo_sequences(
    settings: Settings,
    tokenizer: Any,
    vocab: int,
    prefix: tuple[int, ...],
    count: int,
    held_count: int,
) -> tuple[Sequences, Sequences]:
    """Text that every Python has: modules trained on to calibrate, held-out ones to judge."""
    try:
        files, held_out = demo.training_files(), demo.held_out_text()
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    random.Random(settings.seed).shuffle(files)
    wanted, text = count * settings.seqlen * CHARS_PER_TOKEN, ""
    for path in files:
        text += path.read_text(encoding="utf-8") + "\n\n"
        if len(text) > wanted:
            break
    pools = [
        cut(tokenize(tokenizer, part), settings.seqlen, name, vocab, prefix)
        for part, name in ((text, "the standard library"), (held_out, "its held-out modules"))
    ]
    return split(pools[0], count, 0)[0], split(pools[1], 0, held_count)[1]
