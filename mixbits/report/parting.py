"""Whether the result depends on which text it meets: its KL on each of a run's texts, side by side.

Plan and rounding are made with the calibration text, and may follow it more closely than what the
model will meet. The text that judges the result shows that, and the gate's shows why: it goes on
where the calibration text ends, but nothing was made with it. What is said goes by differences that
are both sure (beyond the confidence interval) and worth a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..measuring.evaluate import interval
from .tables import is_number, plus_minus

CALIBRATION, GATE, HELD_OUT = "calibration", "gate", "held-out"  # `text` of a row
WORTH_A_WORD = 1.5  # times the KL on the calibration text
FEWEST = 8  # sequences of a text: the spread of fewer says too little

Row = Mapping[str, Any]


def texts_compared(rows: Sequence[Row]) -> dict[str, Any]:
    """`evaluation.texts` of report.json: `compared` are the rows, one for each text that there is.

    A row has `text` (one of the names above), `nsamples`, `kl` (nats per token) and `kl_stderr`.
    `sentence` and `advice` are None where the texts do not part, or too little is known.
    """
    by_name = {row["text"]: row for row in rows}
    calibration, gate, held_out = (by_name.get(n) for n in (CALIBRATION, GATE, HELD_OUT))
    sentence = advice = None
    if calibration and held_out and _parts(calibration, held_out):
        there, last = _shown(calibration), _shown(held_out)
        between = f"{_shown(gate)} on the gate's, " if gate else ""
        if gate and _parts(gate, held_out) and not _parts(calibration, gate):
            sentence = (
                "The text that judges is harder to keep to than the calibration text, or of "
                f"another kind: KL is {last} on it, {there} on the calibration text, and "
                f"{_shown(gate)} on the gate's, which follows in the same dataset."
            )
            advice = (
                "Where the model is to meet such text, calibrate with some (several --dataset)."
            )
        else:
            sentence = (
                f"It keeps closer to its calibration text than to other text: KL is {there} there, "
                f"{between}{last} on the text that judges."
            )
            advice = (
                "More text to calibrate with, or more varied text, should help (--nsamples, "
                "several --dataset)."
            )
    return {"compared": [dict(row) for row in rows], "sentence": sentence, "advice": advice}


def _parts(less: Row, more: Row) -> bool:
    """Whether KL is higher on one text than on another, surely and by enough to speak of."""
    figures = [row.get(key) for row in (less, more) for key in ("kl", "kl_stderr")]
    if not all(map(is_number, figures)) or min(less["nsamples"], more["nsamples"]) < FEWEST:
        return False
    difference = more["kl"] - less["kl"]
    is_sure = difference > interval(less["kl_stderr"], more["kl_stderr"])
    return bool(is_sure and more["kl"] > WORTH_A_WORD * less["kl"])


def _shown(row: Row) -> str:
    return plus_minus(row["kl"], row["kl_stderr"])
