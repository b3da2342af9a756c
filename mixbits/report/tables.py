"""Tables of a run: figures as text, and rows that terminal, card and page show alike.

Rows are lists of cells, the first row the heading. `table` shows them in the terminal, `card` in
Markdown, `html` on the page. Figures that are not known are "-", and errors that are not known are
not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

from ..errors import printable
from ..formats.schemes import LEFT_ALONE, Assignment
from ..measuring.evaluate import interval, mean_stderr
from ..model.layout import LinearInfo
from ..planning.plan import average_bits
from .report import Candidate, Evaluation, Report, Stability, Tasks

Rows = list[list[str]]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: Any, digits: str = ".4g") -> str:
    """A figure in a format; "-" where it is not known."""
    return f"{value:{digits}}" if is_number(value) else "-"


def plus_minus(value: Any, error: Any, digits: int = 4) -> str:
    """A figure with its error, if that is known."""
    shown = number(value, f".{digits}f")
    return f"{shown} ± {error:.{digits}f}" if is_number(error) else shown


def size(nbytes: float) -> str:
    """Bytes for people, decimal units as in `--size`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows (the first is the heading) as aligned text: first column left, the others right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(indent + "  ".join(cells).rstrip())
        if number == 0:
            lines.append(indent + "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def scheme_rows(linears: Sequence[LinearInfo], assignment: Assignment) -> Rows:
    """How many linears of each kind got which scheme; average bits, scales counted.

    Where linears are divided among schemes: the share of weights instead.
    """
    kinds: dict[str, list[LinearInfo]] = {}
    for info in linears:
        leaf = info.name.rpartition(".")[2]
        kinds.setdefault(f"experts.{leaf}" if info.is_expert else leaf, []).append(info)
    parts = {i.name: assignment.get(i.name, LEFT_ALONE).parts(i.in_features) for i in linears}
    used = {s.name: s for p in parts.values() for s, _ in p}
    schemes = sorted(used, key=lambda name: (used[name].storage_bits(128, 4096), name))
    divided = any(len(p) > 1 for p in parts.values())
    rows = [["module", *schemes, "bits"]]
    for kind, members in [*kinds.items(), ("all", list(linears))]:
        amounts = dict.fromkeys(schemes, 0)
        for info in members:
            for scheme, columns in parts[info.name]:
                amounts[scheme.name] += columns * info.out_features if divided else 1
        whole = sum(amounts.values())
        cells = [f"{n / whole:.0%}" if divided and n else str(n or "-") for n in amounts.values()]
        rows.append([kind, *cells, f"{average_bits(members, assignment):.3f}"])
    return rows


def result_rows(report: Report) -> Rows:
    """Size, KL and perplexity of the original and of the quantized model."""
    evaluation = report.evaluation or Evaluation()
    rows = [["", "original", evaluation.scored]]
    sizes = report.bytes_before or 0, report.bytes_after or 0
    rows.append(["weight files", *map(size, sizes)])
    if scores := evaluation.held_out:
        rows.append(["KL, nats/token", "0", plus_minus(scores.kl, scores.kl_stderr)])
        pair = [
            plus_minus(scores.perplexity_reference, scores.perplexity_reference_stderr, 3),
            plus_minus(scores.perplexity, scores.perplexity_stderr, 3),
        ]
        rows.append(["perplexity", *pair])
        agreement = plus_minus(scores.top1_agreement, scores.top1_agreement_stderr)
        rows.append(["top-1 agreement", "1", agreement])
    return rows


def task_rows(evaluation: Evaluation) -> Rows:
    """lm-eval's metrics with standard errors, of both models where both were scored.

    There accuracies are paired, too, by document: a difference's interval is narrower than the
    errors of what it is the difference of.
    """
    original, quantized = evaluation.original_tasks, evaluation.tasks
    if quantized is None:
        return []
    models = [m for m in (original, quantized) if m]
    rows = [["task", "metric", *(["original"] if original else []), evaluation.scored]]
    for task, metrics in quantized.tasks.items():
        for name in metrics:
            if not name.endswith("_stderr"):
                scores = [m.tasks.get(task, {}) for m in models]
                cells = [plus_minus(s.get(name), s.get(f"{name}_stderr")) for s in scores]
                rows.append([task, name, *cells])
    if quantized.average is not None and len(quantized.tasks) > 1:
        cells = [plus_minus(m.average, m.average_stderr) for m in models]
        rows.append([_average_name(quantized), "acc", *cells])
    if original and original.documents and quantized.documents:
        rows[0].append("difference, 95 %")
        for row in rows[1:]:
            tasks = [row[0]] if row[0] in quantized.tasks else list(quantized.documents)
            pair = paired_accuracy(original, quantized, tasks) if row[1] == "acc" else None
            row.append(plus_minus(*pair) if pair else "")
    return rows


def paired_accuracy(
    original: Tasks, quantized: Tasks, tasks: Sequence[str]
) -> tuple[float, float] | None:
    """By how much the mean acc of `tasks` changed, and half the width of its 95 % interval.

    None unless both models were scored on the same documents, two or more of each task.
    """
    changes = []
    for task in tasks:
        before, after = original.documents.get(task, []), quantized.documents.get(task, [])
        if len(before) != len(after) or len(after) < 2:
            return None
        pairs = zip(before, after, strict=True)
        change = torch.tensor([(b or 0) - (a or 0) for a, b in pairs], dtype=torch.float64)
        changes.append(mean_stderr(change))
    if not changes:
        return None
    means, stderrs = zip(*changes, strict=True)
    return sum(means) / len(means), interval(*stderrs) / len(means)


def _average_name(tasks: Tasks) -> str:
    """What lm-eval's average is over: not every task has an accuracy."""
    averaged = tasks.averaged
    if averaged is None:  # of older reports
        averaged = [name for name, scores in tasks.tasks.items() if "acc" in scores]
    return f"mean of {len(averaged)} tasks"


def text_rows(evaluation: Evaluation | None) -> Rows:
    """KL of the quantized model on each text of the run; nothing where there is but one."""
    compared = evaluation.texts.compared if evaluation and evaluation.texts else []
    if len(compared) < 2:
        return []
    rows = [["text", "from", "sequences", "KL, nats/token"]]
    for row in compared:
        cells = row.source or "-", number(row.nsamples, "d"), plus_minus(row.kl, row.kl_stderr)
        rows.append([row.text, *cells])
    return rows


def text_lines(evaluation: Evaluation | None) -> list[str]:
    """Where KL on these texts parts: a sentence, and what helps."""
    found = evaluation.texts if evaluation else None
    return [said for said in (found.sentence, found.advice) if said] if found else []


def gate_rows(candidates: Sequence[Candidate]) -> Rows:
    """Candidates on the gate's text, the one that ships first."""
    rows = [["candidate", "KL, nats/token", "behind the best, 95 %"]]
    for row in candidates:
        rows.append([row.name, number(row.kl, ".4f"), plus_minus(row.behind, row.interval)])
    return rows


def excess_loss(stability: Stability) -> str:
    """What plans from either half of the text lose by all of it, such as `+0.41% and +0.63%`."""
    return " and ".join(number(x, "+.2%") for x in stability.excess_loss)


# --- lines of the terminal ------------------------------------------------------------------------


def search_line(report: Report) -> list[str]:
    """Of --max-kl: what was promised, on which text, and what came out on another."""
    if report.search is None:
        return []
    kl = report.candidates[0].kl if report.candidates else report.search.kl
    line = (
        f"--max-kl {number(report.search.max_kl, 'g')}: KL is {number(kl, '.4f')} on the gate's "
        "text, where it was sought"
    )
    if held_out := report.held_out:
        line += f", and {plus_minus(held_out.kl, held_out.kl_stderr)} on other text"
    return [line + "."]


def diagnosis(report: Report) -> str:
    """A line for what predictions are worth, and one for how far the plan depends on the text."""
    stable, measured = report.stability or Stability(), report.measured or []
    return (
        "  rank correlation of predicted and measured KL: "
        f"{number(report.rank_correlation, '.3f')} "
        f"({len(measured)} units, each alone in its cheapest scheme)\n"
        f"  plans from either half of the text agree on {number(stable.same_units, '.1%')} of the "
        f"choices and {number(stable.same_bits, '.1%')} of the bits; they lose "
        f"{excess_loss(stable)} by all of it"
    )


def refinement(rounds: Sequence[dict[str, Any]]) -> str:
    """A line for each round: what was measured, and whether the plan changed."""
    lines = [
        f"  KL on the calibration text {row['kl_before']:.4f}, and {row['kl']:.4f} with "
        f"{row['changed']} units changed" + ("" if row["kl"] < row["kl_before"] else ": not taken")
        for row in rounds
    ]
    return "\n".join(lines or ["  no other plan was proposed"])


def fake_column(rounded: bool) -> str:
    """What the scores of `--fake` are headed by: what has been scored, and what the files are."""
    return f"fake, activations {'rounded' if rounded else 'in 16 bits'}"
