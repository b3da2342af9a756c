"""The text of a run: to calibrate with, to choose by, and to judge by; none shares a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import demo
from ..errors import UsageError
from ..measuring.hub_data import dataset_key
from ..measuring.scores import Scores
from ..measuring.text import (
    CHARS_PER_TOKEN,
    Sequences,
    cut,
    in_turn,
    listed,
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
    seen = 0 if is_first else _seen(settings, len(prefix))
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
        found.append(_in_words(settings.dataset))
    if judges and settings.eval_dataset:
        found.append(f"judged by {_in_words(settings.eval_dataset)}")
    return "; ".join(found) or "no text is needed"


def _in_words(datasets: tuple[str, ...] | None) -> str:
    names = list(datasets or [PYTHON_TEXT])
    return listed(names) + (", a sequence of each in turn" if len(names) > 1 else "")


def _seen(settings: Settings, prefix: int) -> int:
    """Sequences at the head of the datasets that calibrate here, or have for --scores.

    `prefix` tokens of each are its prefix. As many of every dataset, for the scores may have taken
    them in another order, or from other datasets too; at least so many, where theirs were of
    another length.
    """
    several = len(settings.dataset or [""])
    of_each = -(-settings.nsamples // several)
    if settings.scores is not None:
        used = Scores.read(settings.scores).data["calibration"]
        count, length = int(used["nsamples"]), int(used["seqlen"])
        count = -(-count // int(used.get("datasets", 1)))
        text = settings.seqlen - prefix
        if length != settings.seqlen and text >= 1:
            count = -(-count * length // text)
        of_each = max(of_each, count)
    return several * of_each


def _first_and_held_out(
    run: Run, tokenizer: Any, prefix: tuple[int, ...], count: int, before: int, held_count: int
) -> tuple[Sequences, Sequences]:
    """The first `count` sequences, and `held_count` others; none where 0 are needed.

    The others are of --eval-dataset, or come after the first `before`; none of them is among these
    where both options name a dataset.
    """
    settings = run.settings
    is_bundled = settings.dataset is None and settings.eval_dataset is None and held_count
    if settings.demo or is_bundled:  # the latter where nothing calibrates
        return _demo_sequences(run, tokenizer, prefix, count, held_count)
    sources = settings.dataset or ()
    first = held_out = Sequences.none(settings.seqlen, prefix)
    if held_count and settings.eval_dataset is None:
        first, held_out = _taken(run, tokenizer, prefix, sources, (before, held_count))
    elif count:
        first, _ = _taken(run, tokenizer, prefix, sources, (count, 0))
    if held_count and settings.eval_dataset is not None:
        used = {dataset_key(s): in_turn(before, i, len(sources)) for i, s in enumerate(sources)}
        skips = [used.get(dataset_key(source), 0) for source in settings.eval_dataset]
        counts = 0, held_count
        held_out = _taken(run, tokenizer, prefix, settings.eval_dataset, counts, skips)[1]
    return first, held_out


def _taken(
    run: Run,
    tokenizer: Any,
    prefix: tuple[int, ...],
    sources: tuple[str, ...],
    counts: tuple[int, int],
    skips: Sequence[int] = (),
) -> tuple[Sequences, Sequences]:
    """As many sequences as `counts` say, of datasets in turn, behind the first `skips` of each."""
    vocab, length = run.source.config.get_text_config().vocab_size, run.settings.seqlen
    pools = []
    for number, source in enumerate(sources):
        count, skip = in_turn(sum(counts), number, len(sources)), skips[number] if skips else 0
        pool = read_sequences(source, tokenizer, vocab, skip + count, length, prefix)
        if skip and len(pool.ids) < skip + count:
            raise UsageError(
                f"--eval-dataset must have {count} sequences of {length} tokens behind the first "
                f"{skip}, which --dataset takes: got {len(pool.ids)} in all from {source}; give "
                "more text, or lower --nsamples, --eval-nsamples or --seqlen"
            )
        pools.append(pool[skip:])
    return split(pools, *counts)


def _demo_sequences(
    run: Run, tokenizer: Any, prefix: tuple[int, ...], count: int, held_count: int
) -> tuple[Sequences, Sequences]:
    """Text that every Python has: modules trained on to calibrate, held-out ones to judge."""
    settings, vocab = run.settings, run.source.config.get_text_config().vocab_size
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
    return split(pools[:1], count, 0)[0], split(pools[1:], 0, held_count)[1]
