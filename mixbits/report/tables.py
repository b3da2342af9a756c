"""What a run did: stages with their time and memory, tables for the terminal, report.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import printable
from ..formats.schemes import BF16, Assignment
from ..model.layout import LinearInfo
from ..planning.plan import average_bits


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


def scheme_rows(linears: Sequence[LinearInfo], assignment: Assignment) -> list[list[str]]:
    """Of a table: how many linears of each kind got which scheme; average bits, scales counted.

    Where linears are divided among schemes: the share of weights instead.
    """
    kinds: dict[str, list[LinearInfo]] = {}
    for info in linears:
        leaf = info.name.rpartition(".")[2]
        kinds.setdefault(f"experts.{leaf}" if info.is_expert else leaf, []).append(info)
    parts = {i.name: assignment.get(i.name, BF16).parts(i.in_features) for i in linears}
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


def size(nbytes: float) -> str:
    """Bytes for people, decimal units as in `--size`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"


def plus_minus(value: float, stderr: float, digits: int = 4) -> str:
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def search_line(report: dict[str, Any]) -> list[str]:
    """Of --max-kl: what was promised, on which text, and what came out on another."""
    found = report.get("search")
    held_out = (report.get("evaluation") or {}).get("held_out")
    if not found:
        return []
    gate = report.get("gate") or {}
    kl = gate["candidates"][0]["kl"] if gate else found["kl"]
    line = f"--max-kl {found['max_kl']:g}: KL is {kl:.4f} on the gate's text, where it was sought"
    if held_out:
        line += f", and {plus_minus(held_out['kl'], held_out['kl_stderr'])} on other text"
    return [line + "."]


def gate_table(rows: Sequence[dict[str, Any]]) -> str:
    """Candidates on held-out text, the one that ships first."""
    cells = [["candidate", "KL, nats/token", "behind the best, 95 %"]]
    for row in rows:
        behind = plus_minus(row["behind"], row["interval"]) if "behind" in row else "-"
        cells.append([row["name"], f"{row['kl']:.4f}", behind])
    return table(cells)


def diagnosis(found: dict[str, Any]) -> str:
    """A line for what predictions are worth, and one for how far the plan depends on the text."""
    stable = found["stability"]
    excess = " and ".join(f"{x:+.2%}" for x in stable["excess_loss"])
    return (
        f"  rank correlation of predicted and measured KL: {found['rank_correlation']:.3f} "
        f"({len(found['measured'])} units, each alone in its cheapest scheme)\n"
        f"  plans from either half of the text agree on {stable['same_units']:.1%} of the choices "
        f"and {stable['same_bits']:.1%} of the bits; they lose {excess} by all of it"
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


def result_rows(before: int, after: int, evaluation: dict[str, Any]) -> list[list[str]]:
    """Of a table: size, KL and perplexity of the original and of the quantized model.

    `evaluation` is that of report.json.
    """
    rows = [["", "original", evaluation.get("scored", "quantized")]]
    rows.append(["weight files", size(before), size(after)])
    scores = evaluation.get("held_out")
    if scores:
        rows.append(["KL, nats/token", "0", plus_minus(scores["kl"], scores["kl_stderr"])])
        pair = [
            plus_minus(scores[k], scores[f"{k}_stderr"], 3)
            for k in ("perplexity_reference", "perplexity")
        ]
        rows.append(["perplexity", *pair])
        agreement = scores["top1_agreement"], scores["top1_agreement_stderr"]
        rows.append(["top-1 agreement", "1", plus_minus(*agreement)])
    return rows


def task_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """Of a table: lm-eval's metrics with standard errors, of both models where both were scored."""
    original, quantized = evaluation.get("original_tasks"), evaluation["tasks"]
    scored = evaluation.get("scored", "quantized")
    rows = [["task", "metric", *(["original"] if original else []), scored]]
    models = [m for m in (original, quantized) if m]
    for task, metrics in quantized["tasks"].items():
        for name in metrics:
            if name.endswith("_stderr"):
                continue
            cells = [
                plus_minus(m["tasks"][task][name], m["tasks"][task].get(f"{name}_stderr", 0.0))
                for m in models
            ]
            rows.append([task, name, *cells])
    if quantized["average"] is not None and len(quantized["tasks"]) > 1:
        rows.append([average_name(quantized), "acc", *map(_average, models)])
    return rows


def average_name(tasks: dict[str, Any]) -> str:
    """What lm-eval's average is over: not every task has an accuracy."""
    count = len(tasks.get("averaged", [n for n, s in tasks["tasks"].items() if "acc" in s]))
    return f"mean of {count} tasks"


def _average(tasks: dict[str, Any]) -> str:
    stderr = tasks.get("average_stderr")  # of older reports: not known
    return plus_minus(tasks["average"], stderr) if stderr else f"{tasks['average']:.4f}"
