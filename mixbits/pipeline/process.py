"""A whole run: measure, allocate, round, write and evaluate. The table of contents of mixbits.

`quantize` goes through the stages in their order; what each does stands in a module of its name or
near it: `texts` (calibrate), `scoring` (measure), `plans` (allocate, refine), `diagnose`,
`candidates` and `gate` (round), `output` (write), `evaluation` (evaluate).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..errors import UsageError, first_line
from ..files.atomic import Destination, reserved
from ..files.io import write_text
from ..measuring.scores import dump
from ..model.layout import decoder_blocks
from ..ops import choose_backend
from ..progress import Progress, Watch, duration, say
from ..report.clock import Clock
from ..report.report import Report
from ..report.tables import diagnosis, refinement
from . import early, feasibility, telling
from .candidates import Candidate, contest
from .diagnose import POINTS, circumstances, diagnose, frontier_rows, report
from .evaluation import check_evaluation, evaluate
from .gate import Decision, choose
from .output import Reports, write
from .plans import Planned, make_plans, refine_plan
from .roundings import Outcome, Subject, lost_groups, plain
from .run import Run, given_plan, prepare
from .scoring import measure
from .settings import Settings
from .texts import Text, calibrate, text_read
from .work import planned_work

STAGES = ("open", "calibrate", "measure", "allocate", "round", "write", "evaluate")


def start(settings: Settings, watch: Watch | None = None) -> tuple[Run, list[str]]:
    """All that is known before any weight is read, and lines to tell of it.

    What `early.check` tells is known before; `watch` as of `quantize`. Raises UsageError for
    whatever could not come to its end.
    """
    settings = with_device(settings)
    with Progress({}, watch=watch).stage("look at the source"):
        run = prepare(settings)
        lines = feasibility.check(run)
    if not (settings.dry_run or settings.solve_only):
        check_evaluation(run)
    return run, lines


def with_device(settings: Settings) -> Settings:
    """With a device that is there. Raises UsageError for another, and for a backend without it."""
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {first_line(error)}") from error
    choose_backend(torch.device(device).type, settings.backend)
    return replace(settings, device=device)


def quantize(run: Run, watch: Watch | None = None) -> Report:
    """All stages, in order; report.json. Leaves a complete output folder or none.

    What was measured for an output that did not come about lies beside it. `watch` is told of the
    progress: the share that is done, and a line. Raises UsageError.
    """
    settings = run.settings
    inputs = early.inputs(settings)
    with reserved(settings.folder, settings.overwrite, inputs) as place, _told_of_scores(place):
        return _quantize(run, place, watch)


@contextmanager
def _told_of_scores(place: Destination) -> Iterator[None]:
    """Whatever ends the run says where the scores are that it had measured by then."""
    try:
        yield
    except BaseException as error:  # signals too; it goes on as it is
        if place.aside is not None:
            path = shlex.quote(str(place.aside))
            error.add_note(f"to go on from what was measured: --scores {path}")
        raise


def _quantize(run: Run, place: Destination, watch: Watch | None) -> Report:
    settings, source = run.settings, run.source
    blocks = len(decoder_blocks(run.shapes)[1])
    progress = Progress(planned_work(settings, blocks, len(run.units)), watch=watch)
    clock = Clock(stage_names(settings), progress)
    with clock.run("open", source.name):
        model, sha256, tokenizer = source.load(), source.sha256(), source.tokenizer()
        original = source.original.load() if run.is_folded else model
    telling.source(run)
    with clock.run("calibrate", text_read(settings)):
        text = calibrate(run, tokenizer)
        telling.text(text, tokenizer)
    subject = make_subject(run, model, text, original)
    planned = _planned(run, clock, place, subject, sha256, text)
    decision = _rounded(run, clock, subject, planned, text)
    told = report(run, sha256, planned, decision, text)
    telling.plan(run, decision, told)
    needs = 0 if settings.solve_only else told.reached.predicted_bytes or 0
    with place.folder(needs, () if settings.solve_only else Reports.NAMES) as folder:
        with clock.run("write", str(settings.out)):
            told.bytes_after = write(run, folder, model, decision, planned, told)
        reports = Reports(run, decision, told, folder)
        for name, content in reports.texts(None, clock.rows).items():
            write_text(folder / name, content)
    place.drop_aside()  # it is in the folder now
    if settings.solve_only:
        say(f"  plan and scores are in {settings.out}")
        telling.curve(settings)
        return told
    evaluation: dict[str, Any] = {}
    judges = [settings.comma("tasks")] if settings.tasks else []
    if settings.eval_nsamples:
        judges.insert(0, "held-out text")
    try:
        with clock.run("evaluate", ", ".join(judges) or "nothing asked for"):
            about = circumstances(run, decision, told.rounding)
            evaluate(run, place, original, tokenizer, text, decision, about, evaluation)
    finally:  # a task that fails takes nothing else with it
        place.rewrite(reports.texts(evaluation, clock.rows))
    telling.results(told)
    took = duration(sum(row["seconds"] for row in clock.rows))
    out = settings.out
    say(f"\n  everything is in {out} after {took}; what it came to in {out}/report.html")
    telling.curve(settings)
    telling.next_step(settings)
    return told


def make_subject(run: Run, model: Any, text: Text, original: Any = None) -> Subject:
    """What the run rounds, and with what; `original` is what it is compared with, if not itself."""
    settings = run.settings
    return Subject(
        source=run.source,
        model=model,
        linears=run.linears,
        text=text.calibration,
        own=run.own,
        batch_size=settings.batch_size,
        seed=settings.seed,
        device=settings.computes_on,
        original=original,
    )


def stage_names(settings: Settings) -> list[str]:
    """The stages that the run has, in their order."""
    names = [s for s in STAGES if not (settings.solve_only and s in ("round", "evaluate"))]
    for name in ("diagnose", "refine"):
        if getattr(settings, name):
            names.insert(names.index("allocate") + 1, name)
    return names


def _planned(
    run: Run, clock: Clock, place: Destination, subject: Subject, sha256: str, text: Text
) -> Planned:
    """The plan that is given, or those that are measured for and solved."""
    settings = run.settings
    if settings.plan is not None:
        with clock.run("allocate", str(settings.plan)):
            return Planned({"given": given_plan(run)})
    what = f"{settings.method}, {settings.comma('schemes')}"
    with clock.run("measure", f"reuse {settings.scores}" if settings.scores else what):
        scores = measure(run, subject.model, text.calibration, sha256)
        if not settings.scores:
            place.set_aside(".scores.json", dump(scores.data))
    with clock.run("allocate", settings.strategy):
        planned = make_plans(run, scores, subject, text)
        planned.curve = frontier_rows(run, planned.first.problem, settings.curve or POINTS)
    if settings.refine:
        what = f"units in their other schemes, up to {settings.refine} rounds"
        with clock.run("refine", what):
            refine_plan(run, subject, planned, text)
        say(refinement(planned.found["refine"]["rounds"]))
    if settings.diagnose:
        with clock.run("diagnose", "units one by one, the text in halves"):
            planned.found |= diagnose(run, subject, planned, text)
        say(diagnosis(Report.of(planned.found)))
    return planned


def _rounded(run: Run, clock: Clock, subject: Subject, planned: Planned, text: Text) -> Decision:
    """The plan that ships: the best of those that are compared, or the only one."""
    settings, plans = run.settings, planned.plans
    name, plan = next(iter(plans.items()))
    if settings.solve_only:
        how = plain(settings.rounding, 0.0)
        return Decision(Candidate("only", plan, how), Outcome({}, how.describe()), [])
    what = settings.rounding
    if settings.distill:
        what += ", distilled"
    is_compared = settings.is_gated and len(plans) > 1
    listed = f"the best of {', '.join(plans)}" if is_compared else name
    with clock.run("round", f"{what}, {listed}"):
        found = contest(settings, plans, text.correction, planned.rounded)
        decision = choose(subject, found, text.gate.ids, text.gate.judged_from)
    weights = decision.outcome.weights
    if lost := lost_groups(subject, decision.winner.plan.assignment, weights):
        decision.outcome.told["lost_groups"] = lost
    return decision
