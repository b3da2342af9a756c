"""What a run writes into its folder: weights, plan and scores, and the reports told again later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoint import saving as checkpoint
from ..model.layout import CausalLM
from ..report import card
from ..report.html import render
from ..report.report import Evaluation, Report, Stage
from ..report.tables import scheme_rows
from .diagnose import write_curve
from .gate import Decision
from .plans import Planned
from .run import Run


def write(
    run: Run, folder: Path, model: CausalLM, decision: Decision, planned: Planned, told: Report
) -> int | None:
    """Write all but the report into `folder`; returns the bytes of the weight files, if any."""
    settings, plan = run.settings, decision.winner.plan
    plan.write(folder / "plan.json")
    if planned.scores is not None:
        planned.scores.write(folder / "scores.json")
    if settings.curve:
        write_curve(run, folder, plan, told, planned.curve)
    if settings.solve_only:
        return None
    weights = decision.outcome.weights
    if settings.fake:
        return checkpoint.save_fake(
            folder, run.source, model, run.linears, plan.assignment, weights
        )
    provenance = {
        **{k: plan.data[k] for k in ("weight_scale_mode", "act_scale_mode")},
        **{k: told.data()[k] for k in ("rounding", "source", "calibration")},
    }
    return checkpoint.save(
        folder, run.source, model, run.linears, plan.assignment, provenance, weights
    )


class Reports:
    """The files of an output that are written again when it has been scored: name -> text.

    report.json; report.html, from the contents of the files alone, so that it can be made from
    them again; and README.md, which the hub shows and whoever finds the folder reads.
    """

    NAMES = ("report.json", "report.html", "README.md")

    def __init__(self, run: Run, decision: Decision, report: Report, folder: Path) -> None:
        self.run, self.decision, self.report = run, decision, report
        self.plan, self.scores = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            for path in (folder / f"{name}.json" for name in ("plan", "scores"))
        )

    def texts(
        self, evaluation: dict[str, Any] | None, stages: list[dict[str, Any]]
    ) -> dict[str, str]:
        settings = self.run.settings
        self.report.evaluation = None if evaluation is None else Evaluation.of(evaluation)
        self.report.stages = [Stage.of(row) for row in stages]
        texts = [self.report.text(), render(self.report, self.plan, self.scores)]
        if not settings.solve_only:
            rows = scheme_rows(self.run.linears, self.decision.winner.plan.assignment)
            name, source = settings.folder.name, self.run.source
            texts.append(card.render(name, source, rows, self.report, settings.fake))
        return dict(zip(self.NAMES, texts, strict=False))
