"""`python -m mixbits.quantize`: measure, allocate, pack, run and score a model.

`quantize` runs the stages in their order, and is the table of contents of the package; what a
stage does until the plan is rounded stands in `stages`. Here are the command line, and what is
written, evaluated and printed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve shared cores

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .formats import UsageError, first_line, parse_scheme
from .options import parse_arguments

if TYPE_CHECKING:  # torch is imported by functions only: a wrong option should be told at once
    from .gate import Choice
    from .model import CausalLM
    from .scores import Scores
    from .stages import Run, Solved, Text

STAGES = ("open", "calibrate", "measure", "allocate", "round", "write", "evaluate")


def _check_evaluation(run: Run) -> None:
    """What would fail at the very end should fail at once."""
    args, source = run.args, run.source
    for option in ("tasks", "prompt"):
        if getattr(args, option) and not source.has_tokenizer:
            raise UsageError(f"--{option} needs a tokenizer, and {source.path} has none")
    if args.tasks:
        from .evaluate import task_manager

        task_manager(args.tasks.split(","), args.include_path)


def _check_device(args: argparse.Namespace) -> None:
    import torch

    from .ops import choose_backend

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {args.device} cannot be used: {first_line(error)}") from None
    choose_backend(torch.device(args.device).type, args.backend)


def _write(
    run: Run,
    folder: Path,
    model: CausalLM,
    choice: Choice,
    scores: Scores | None,
    report: dict[str, Any],
    curve: list[dict[str, Any]],
) -> int | None:
    """Write all but the report into `folder`; returns the bytes of the weight files, if any."""
    from . import checkpoint, findings

    plan = choice.winner.plan
    plan.write(folder / "plan.json")
    if scores is not None:
        scores.write(folder / "scores.json")
    if run.args.curve:
        findings.write_curve(run, folder, plan, report, curve)
    if run.args.solve_only:
        return None
    common = folder, run.source, model, run.linears, plan.assignment
    if run.args.fake:
        return checkpoint.save_fake(*common, choice.rounded)
    provenance = {
        **{k: plan.data[k] for k in ("weight_scale_mode", "act_scale_mode")},
        **{k: report[k] for k in ("rounding", "source", "calibration")},
    }
    return checkpoint.save(*common, provenance, choice.rounded)


def _load_result(run: Run) -> Any:
    if run.args.fake:
        from .source import open_source

        return open_source(str(run.args.out), run.args.trust_remote_code).load()
    from .checkpoint import load
    from .linear import PackedLinear

    model = load(run.args.out, trust_remote_code=run.args.trust_remote_code)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.backend = run.args.backend  # for the device that blocks are moved to
    return model


def _evaluate(
    run: Run, original: Any, quantized: Any, tokenizer: Any, held_out: Any, result: dict[str, Any]
) -> None:
    """Held-out scores, lm-eval's, and a sample, into `result`: `evaluation` of report.json."""
    from .evaluate import compare, run_tasks
    from .streaming import StreamedModel

    args = run.args
    if len(held_out.ids):
        p, q = (StreamedModel(m, device=args.device) for m in (original, quantized))
        scores = compare(p, q, held_out.ids, args.batch_size)
        result["held_out"] = {**held_out.describe(), **scores}
    if args.tasks:
        tasks = args.tasks.split(",")
        options = args.limit, args.add_bos_token, args.include_path, args.batch_size
        for name, model in (("original_tasks", original), ("tasks", quantized)):
            if name == "tasks" or args.eval_original:
                model.to(args.device)
                result[name] = run_tasks(model, tokenizer, tasks, *options)
    if args.prompt:
        result["sample"] = _generate(quantized, tokenizer, args)


def _generate(model: Any, tokenizer: Any, args: argparse.Namespace) -> str:
    """The prompt and 80 tokens after it, drawn with the seed: greedy small models repeat."""
    import torch

    torch.manual_seed(args.seed)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(args.device)
    inputs.pop("token_type_ids", None)
    model.to(args.device)
    ids = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.8, top_p=0.9)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def _dry_run(run: Run) -> None:
    """Shapes and sizes, from config.json alone."""
    from .plan import Plan, average_bits
    from .report import scheme_table, size, table

    elements = sum(i.numel for i in run.linears)
    print(f"{len(run.linears)} linears in {len(run.units)} units, {elements:,} weights")
    kinds: dict[str, list[Any]] = {}
    for info in run.linears:
        kinds.setdefault(info.name.rpartition(".")[2], []).append(info)
    rows = [["module", "count", "out", "in"]]
    for kind, members in kinds.items():
        for shape in sorted({(i.out_features, i.in_features) for i in members}):
            count = sum((i.out_features, i.in_features) == shape for i in members)
            rows.append([kind, str(count), *map(str, shape)])
    print(table(rows) + "\n")
    rows = [["all linears in", "bits", "without scales", "weight files"]]
    for scheme in [*run.schemes, parse_scheme("BF16")]:
        plan = {i.name: scheme for i in run.linears}
        bits = [f"{average_bits(run.linears, plan, ignore):.4f}" for ignore in (False, True)]
        rows.append([scheme.name, *bits, size(run.predicted_bytes(plan))])
    print(table(rows))
    if run.args.plan is not None:
        given = Plan.read(run.args.plan, run.linears).assignment
        print("\n" + scheme_table(run.linears, given))
        print(f"  predicted size {size(run.predicted_bytes(given))}")


def _print_plan(run: Run, choice: Choice, reached: dict[str, Any]) -> None:
    from .report import gate_table, scheme_table, size

    if choice.rows:
        print(gate_table(choice.rows))
    print(scheme_table(run.linears, choice.winner.plan.assignment))
    print(
        f"  {reached['avg_bits']:.4f} bits per weight with everything counted, "
        f"{reached['avg_bits_without_scales']:.4f} without scales; "
        f"weight files {size(reached['predicted_bytes'])}"
    )


def _print_diagnosis(found: dict[str, Any]) -> None:
    pairs, stable = found["measured"], found["stability"]
    print(
        f"  rank correlation of predicted and measured KL: {found['rank_correlation']:.3f} "
        f"({len(pairs)} units, each alone in its cheapest scheme)"
    )
    excess = " and ".join(f"{x:+.2%}" for x in stable["excess_loss"])
    print(
        f"  plans from either half of the text agree on {stable['same_units']:.1%} of the choices "
        f"and {stable['same_bits']:.1%} of the bits; they lose {excess} by all of it"
    )


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json; and report.html from the files alone, so that it can be made from them again."""
    from .report_html import render
    from .scores import dump, write_text

    write_text(folder / "report.json", dump(report))
    told, plan, scores = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for path in (folder / f"{name}.json" for name in ("report", "plan", "scores"))
    )
    write_text(folder / "report.html", render(told, plan, scores))


def _print_results(report: dict[str, Any], evaluation: dict[str, Any]) -> None:
    from .report import result_table, task_table

    sizes = report["bytes_before"], report["bytes_after"]
    print("\n" + result_table(*sizes, evaluation.get("held_out")))
    if "tasks" in evaluation:
        print("\n" + task_table(evaluation.get("original_tasks"), evaluation["tasks"]))
    if "sample" in evaluation:
        print("\n  the quantized model writes:\n")
        print("\n".join("    " + line for line in evaluation["sample"].splitlines()))


def _open(run: Run) -> tuple[Any, str, Any]:
    """The original model, its hash, and its tokenizer."""
    return run.source.load(), run.source.sha256(), run.source.tokenizer()


def _report(
    run: Run, sha256: str, scores: Scores | None, choice: Choice, text: Text
) -> dict[str, Any]:
    """report.json as far as it is known before anything is packed."""
    from .report import environment

    args, plan = run.args, choice.winner.plan
    rounding: dict[str, Any] = {"method": args.rounding}
    if args.rounding == "gptq":
        rounding |= {"correction": choice.winner.share, **text.calibration.describe()}
    return {
        "mixbits_report": 1,
        "command": run.args.command,
        "environment": environment(),
        "source": {"name": run.source.name, "sha256": sha256},
        "calibration": None if scores is None else scores.data["calibration"],
        # An edited plan still says what it was once made for.
        "budget": None if scores is None else plan.data["budget"],
        "reached": run.reached(plan.assignment),
        "rounding": rounding,
        "gate": {**text.gate.describe(), "candidates": choice.rows} if choice.rows else None,
        "predicted_loss": None if scores is None else plan.data["predicted_loss"],
        "bytes_before": sum(path.stat().st_size for path in run.source.weight_files()),
    }


def _stage_names(args: argparse.Namespace) -> list[str]:
    names = [s for s in STAGES if not (args.solve_only and s in ("round", "evaluate"))]
    if args.diagnose:
        names.insert(names.index("allocate") + 1, "diagnose")
    return names


def quantize(run: Run) -> None:
    """All stages, in order. Raises UsageError; leaves a complete output folder or none."""
    from . import findings, stages
    from .checkpoint import atomic_folder
    from .gate import Candidate, Choice
    from .plan import Plan
    from .report import Stages

    args, scores = run.args, None
    solved: dict[str, Solved] = {}
    found: dict[str, Any] = {}
    curve: list[dict[str, Any]] = []
    clock = Stages(_stage_names(args))
    with clock.run("open", run.source.name):
        model, sha256, tokenizer = _open(run)
    with clock.run("calibrate", "its own text" if args.demo else args.dataset):
        text = stages.calibrate(run, tokenizer)
    if args.plan is None:
        what = f"reuse {args.scores}" if args.scores else f"{args.method}, {args.schemes}"
        with clock.run("measure", what):
            scores = stages.measure(run, model, text.calibration, sha256)
    with clock.run("allocate", str(args.plan or args.strategy)):
        if scores is None:
            plans = {"given": Plan.read(args.plan, run.linears)}
        else:
            solved, found = stages.make_plans(run, model, scores, text)
            plans = {name: entry.plan for name, entry in solved.items()}
            curve = findings.curve_rows(run, next(iter(solved.values())).problem)
    if args.diagnose:
        assert scores is not None
        with clock.run("diagnose", "units one by one, the text in halves"):
            found |= findings.diagnose(run, model, scores, next(iter(solved.values())), text)
        _print_diagnosis(found)
    if args.solve_only:
        choice = Choice(Candidate("only", next(iter(plans.values())), 0.0), {}, [])
    else:
        if not stages.is_gated(args):
            plans = dict([next(iter(plans.items()))])
        what = f"{args.rounding}, " + ("the best of " * (len(plans) > 1)) + ", ".join(plans)
        with clock.run("round", what):
            choice = stages.round_plans(run, model, plans, text)
    report = _report(run, sha256, scores, choice, text)
    report |= found | findings.describe(run, choice.winner.plan, solved, curve)
    _print_plan(run, choice, report["reached"])

    def write_report(folder: Path, evaluation: dict[str, Any] | None) -> None:
        report.update(evaluation=evaluation, stages=clock.rows)
        _write_report(folder, report)

    needs = 0 if args.solve_only else report["reached"]["predicted_bytes"]
    with atomic_folder(args.out, args.overwrite, needs) as folder:
        with clock.run("write", str(args.out)):
            report["bytes_after"] = _write(run, folder, model, choice, scores, report, curve)
        write_report(folder, None)
    if args.solve_only:
        print(f"  plan and scores are in {args.out}")
        return
    evaluation: dict[str, Any] = {}
    judges = ["held-out text"] * bool(args.eval_nsamples) + [args.tasks] * bool(args.tasks)
    try:
        with clock.run("evaluate", ", ".join(judges) or "nothing asked for"):
            if args.fake:  # its weights were rounded in place
                model = run.source.load()
            _evaluate(run, model, _load_result(run), tokenizer, text.held_out, evaluation)
    finally:  # a task that fails takes nothing else with it
        write_report(args.out, evaluation)
    _print_results(report, evaluation)
    print(f"\n  everything is in {args.out}; what it came to in {args.out / 'report.html'}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        args = parse_arguments(argv)
        from . import stages
        from .report import quiet

        quiet()
        _check_device(args)
        run = stages.prepare(args)
        if args.dry_run:
            _dry_run(run)
        else:
            if not args.solve_only:
                _check_evaluation(run)
            quantize(run)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no output is half written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
