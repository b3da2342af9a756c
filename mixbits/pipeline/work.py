"""How much work a run has ahead, in forwards of a block and a sequence: for its progress bar."""

from __future__ import annotations

from ..progress import BACKWARD
from .settings import Settings

PROPOSALS = 5  # of --max-kl: half of the searches need no more
PLANS = 4  # of the gate: optimal, uniform, head, tail; two more are compensated
CHOICES, DOCUMENTS = 4, 1000  # of an lm-eval task, before it is known


def planned_work(settings: Settings, blocks: int, units: int = 0) -> dict[str, float]:
    """Work of each stage that has any, as far as arguments and the number of blocks tell it.

    `units` are those that --diagnose measures alone. How many requests lm-eval's tasks have is
    known when they are read, and is guessed until then; plans of --refine are added as they come.
    """
    rounding = 2 * settings.nsamples if settings.rounding == "gptq" else 1
    judged = rounding + 2 * settings.gate
    compared = PLANS * (1 + 2 * settings.gate) + (2 * judged if rounding > 1 else 0)
    measured = BACKWARD * settings.nsamples
    passes = len(settings.schemes or ()) if settings.method == "deltaloss" else 1
    gated = settings.gate and not settings.plan and settings.strategy == "optimal"
    learned = settings.distill * settings.batch_size * (BACKWARD + 1) if settings.distill else 0
    # The calibration text is judged as well, but no more of it than of the others.
    others = min(settings.gate or settings.eval_nsamples, settings.eval_nsamples)
    again = min(settings.nsamples, others) if settings.calibrates else 0
    tasks = len(settings.tasks) * (2 if settings.eval_original else 1)
    requests = tasks * CHOICES * (settings.limit or DOCUMENTS)
    work = {
        "measure": 0 if settings.scores or settings.plan else measured * passes,
        "allocate": PROPOSALS * judged if settings.max_kl else 0,
        "diagnose": (units * settings.gate + measured * passes) if settings.diagnose else 0,
        "round": learned + (compared if gated else rounding),
        "evaluate": 2 * (settings.eval_nsamples + again) + requests,
    }
    if settings.granularity == "slab":
        work["measure"] *= 2  # once more for the order of columns
    return {stage: float(count * blocks) for stage, count in work.items()}
