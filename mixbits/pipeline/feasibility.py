"""Whether a run can come to its end: asked of shapes and headers, before anything is measured.

Whatever would be refused at the end of hours is refused here: a budget that no plan meets, a
folder that could not be loaded, a head that would be stored twice, a disk or a memory that is
surely too small.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.stock import rehearse
from ..errors import UsageError
from ..files.atomic import check_room
from ..formats.schemes import LEFT_ALONE, Assignment, Recipe
from ..measuring.scores import Scores
from ..model.layout import decoder_blocks, head_is_tied, output_head
from ..planning.plan import unit_options
from ..report.tables import size
from .plans import budget_of, make_problem, solve
from .run import Run, given_plan

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check(run: Run) -> list[str]:
    """Lines to tell. Raises UsageError for what cannot be done."""
    lines = check_head(run)
    expected = check_budget(run)
    if run.settings.dry_run:
        return lines
    if not (run.settings.fake or run.settings.solve_only):
        rehearse(run.source, run.shapes, run.linears, cheapest(run))
    check_room(run.settings.folder.absolute().parent, room(run, expected))
    if run.settings.device == "cpu":
        check_memory(run, available_memory())
    return lines


def cheapest(run: Run) -> Assignment:
    """The plan that is given, or every unit in the cheapest scheme that it may take."""
    if run.settings.plan is not None:
        return given_plan(run).assignment
    options = unit_options(run.units, run.schemes, run.keep)
    rotated = set(run.rotated)
    return {
        info.name: Recipe.whole(
            min(of, key=lambda s: s.storage_bits(info.out_features, info.in_features)),
            info.in_features,
            info.name in rotated,
        )
        for unit, of in zip(run.units, options, strict=True)
        for info in unit.linears
    }


def check_budget(run: Run) -> int:
    """About the bytes of the weight files within the budget, of --max-kl the fewest.

    Raises UsageError for a budget that no plan meets, whatever the scores will be.
    """
    settings = run.settings
    is_unasked = settings.dry_run and (not settings.asks_budget or run.source.quantization)
    if settings.plan is not None or settings.max_kl is not None or is_unasked:
        return run.predicted_bytes(cheapest(run))
    slabs = settings.slabs
    scores = Scores.unknown(run.linears, run.all_schemes, run.scale_modes, slabs, run.rotated)
    strategy = "uniform" if settings.strategy == "uniform" else "head"  # which spends all of it
    problem = make_problem(run, scores, slabs, settings.strategy)
    try:
        found = solve(run, problem, budget_of(settings), strategy)
    except UsageError as error:
        default = (
            "" if settings.asks_budget else f", which is the default ({settings.comma('schemes')})"
        )
        raise UsageError(f"{error}{default}") from error
    return run.predicted_bytes(found.plan.assignment)


def check_head(run: Run) -> list[str]:
    """What a tied head costs that is stored beside its embedding. Raises UsageError, if unasked."""
    settings = run.settings
    if not (settings.quantize_lm_head and head_is_tied(run.shapes)):
        return []
    plan = cheapest(run)
    head = output_head(run.shapes)[0]
    if not plan.get(head, LEFT_ALONE).packed:
        return []
    without = {name: recipe for name, recipe in plan.items() if name != head}
    more, scheme = run.predicted_bytes(plan) - run.predicted_bytes(without), plan[head].name
    told = (
        f"the head is tied to the embedding, which stays in 16 bits: in {scheme} beside it, it "
        f"makes the files {size(more)} larger"
    )
    if settings.dry_run or settings.untie_head or settings.plan:
        return [told]
    raise UsageError(f"{told}; leave out --quantize-lm-head, or pass --untie-head to have that")


def room(run: Run, expected: int) -> int:
    """Bytes that the disk must have: the output's, and those of what is made plain before."""
    settings, source = run.settings, run.source
    plain = source.scratch_bytes()
    if settings.solve_only:
        return plain
    return plain + (run.predicted_bytes({}) if settings.fake else expected)


# --- memory ----------------------------------------------------------------------------------


def available_memory() -> int:
    """Bytes that this process may come to use: of the machine, its control group, and its limit."""
    found = [n for n in (_meminfo(), *map(_limit, _CGROUPS)) if n is not None]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(limit)
    return min(found, default=1 << 62)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemAvailable", sizes["MemTotal"]) + sizes.get("SwapFree", 0)


def _limit(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # there is none
        return None


def needs(run: Run) -> Iterator[tuple[int, str, str]]:
    """Bytes that must be in memory at once, what for, and the options that lower them.

    Lower bounds: weights in 16 bits are mapped from files and do not count.
    """
    settings, text = run.settings, run.source.config.get_text_config()
    vocabulary, hidden = (getattr(text, name, 0) for name in ("vocab_size", "hidden_size"))
    measures = settings.method != "weight" and not (settings.scores or settings.plan)
    compares = (settings.eval_nsamples and not settings.solve_only) or settings.is_gated
    count = max(
        settings.nsamples if measures else 0,
        settings.eval_nsamples if compares else 0,
        settings.gate if settings.is_gated else 0,
    )
    logits = (
        2 * min(settings.batch_size, count) * settings.seqlen * vocabulary * 4
    )  # and their gradient
    yield logits, "the logits of a batch, twice", "--batch-size or --seqlen"
    if settings.rounding == "gptq" and not settings.solve_only:
        tokens = settings.nsamples * settings.seqlen
        widest = max(info.in_features for info in run.linears)
        streams = 4 * tokens * (2 * hidden + widest)
        yield (
            streams,
            "hidden states",
            "--nsamples, --seqlen, or --rounding search",
        )
        yield 4 * 8 * widest**2, "second moments of the widest input", "--rounding search"
    block = max(sum(p.numel() for p in b.parameters()) for b in decoder_blocks(run.shapes)[1])
    yield 4 * block, "one decoder block in float32", "a model with smaller blocks"


def check_memory(run: Run, available: int) -> None:
    """Raises UsageError for a memory that is surely too small."""
    for wanted, what, option in needs(run):
        if wanted > available:
            raise UsageError(
                f"{what} takes {size(wanted)} of memory, and {size(available)} are there: lower "
                f"it with {option}"
            )
