"""Names and defaults of rounding, for command lines: nothing here imports torch."""

from __future__ import annotations

METHODS = ("rtn", "search", "gptq")  # as `mixbits.rounding.whole_model.round_model` takes them
CORRECTION = 0.5  # share of the inputs' changes that gptq makes up for, where there is text enough
