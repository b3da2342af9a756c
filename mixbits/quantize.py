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

from . import early
from .command import exit_code
from .formats import UsageError, first_line, parse_scheme
from .options import parse_arguments

if TYPE_CHECKING:  # torch is imported by functions only: a wrong option should be told at once
    from .gate import Choice
    from .model import CausalLM, LeftAlone
    from .report import Stages
    from .stages import Planned, Run, Text

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
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device} cannot be used: {first_line(error)}") from None
    choose_backend(torch.device(args.device).type, args.backend)


def _write(
    run: Run,
    folder: Path,
    model: CausalLM,
    choice: Choice,
    planned: Planned,
    report: dict[str, Any],
) -> int | None:
    """Write all but the report into `folder`; returns the bytes of the weight files, if any."""
    from . import checkpoint, findings

    plan = choice.winner.plan
    plan.write(folder / "plan.json")
    if planned.scores is not None:
        planned.scores.write(folder / "scores.json")
    if run.args.curve:
        findings.write_curve(run, folder, plan, report, planned.curve)
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


def _load_result(run: Run, choice: Choice, evaluation: dict[str, Any]) -> Any:
    """The model to score: as it was written, but --fake as the packed model would run."""
    if run.args.fake:
        from .fake import round_activations
        from .report import fake_column
        from .source import open_source

        fake = open_source(str(run.args.out), run.args.trust_remote_code).load()
        rounded = round_activations(fake, choice.winner.plan.assignment)
        evaluation["scored"] = fake_column(rounded)
        return fake
    from .linear import PackedLinear
    from .loading import load

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

    args, prefix = run.args, held_out.prefix
    if len(held_out.ids):
        p, q = (StreamedModel(m, device=args.device) for m in (original, quantized))
        scores = compare(p, q, held_out.ids, args.batch_size, held_out.judged_from)
        result["held_out"] = {**held_out.describe(), **scores}
    if args.tasks:
        tasks = args.tasks.split(",")
        add_bos = args.add_bos_token if args.bos or args.add_bos_token else False
        options = args.limit, add_bos, args.include_path, args.batch_size
        for name, model in (("original_tasks", original), ("tasks", quantized)):
            if name == "tasks" or args.eval_original:
                model.to(args.device)
                result[name] = run_tasks(model, tokenizer, tasks, *options)
    if args.prompt:
        result["sample"] = _generate(quantized, tokenizer, args, prefix)


def _generate(model: Any, tokenizer: Any, args: argparse.Namespace, prefix: tuple[int, ...]) -> str:
    """The prompt and 80 tokens after it, drawn with the seed: greedy small models repeat."""
    import torch

    from .calibration import begin, tokenize

    torch.manual_seed(args.seed)
    prompt = begin(tokenize(tokenizer, args.prompt), prefix)[None].to(args.device)
    model.to(args.device)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=80,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def _dry_run(run: Run) -> None:
    """Shapes and sizes, from config.json alone."""
    from .plan import Plan, average_bits
    from .report import scheme_rows, size, table

    elements = sum(i.numel for i in run.linears)
    print(f"{len(run.linears)} linears in {len(run.units)} units, {elements:,} weights")
    _print_findings(run)
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
        print("\n" + table(scheme_rows(run.linears, given)))
        print(f"  predicted size {size(run.predicted_bytes(given))}")


def _print_findings(run: Run) -> None:
    """What else than plain linears in 16 bits the source holds."""
    from .report import size

    weights = run.source.weights if run.source.has_weights else None  # or config.json alone
    own, kind, itemsize = run.own, type(run.shapes).__name__, run.source.dtype.itemsize

    def nbytes(one: LeftAlone) -> int:
        if weights is None or one.name not in weights.groups:
            return one.numel * itemsize
        return weights.nbytes(one.name)

    lines = run.coverage.lines(nbytes)
    if weights and (parts := weights.carried_parts):
        lines.append(
            f"{size(weights.files.nbytes(parts))} in {len(parts)} tensors that {kind} does not "
            f"take are carried over as they are ({parts[0]}{' ...' if len(parts) > 1 else ''})"
        )
    if own.formats:
        names = ", ".join(scheme.name for scheme in own.schemes)
        lines.append(f"{len(own.formats)} linears are stored in {names}: a plan can keep that")
    for line in lines:
        print(f"  {line}")


def _of_how_much(run: Run) -> str:
    """What "everything" is, where it is not nearly all of the decoder blocks' weights."""
    share = run.coverage.share(run.linears)
    return f" (of {share:.1%} of the decoder blocks' weights)" if share < 0.99 else ""


def _print_plan(run: Run, choice: Choice, reached: dict[str, Any]) -> None:
    from .report import gate_table, scheme_rows, size, table

    if choice.rows:
        print(gate_table(choice.rows))
    print(table(scheme_rows(run.linears, choice.winner.plan.assignment)))
    print(
        f"  {reached['avg_bits']:.4f} bits per weight with everything counted"
        f"{_of_how_much(run)}, "
        f"{reached['avg_bits_without_scales']:.4f} without scales; "
        f"weight files {size(reached['predicted_bytes'])}"
    )


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json; and report.html from the files alone, so that it can be made from them again."""
    from .files import write_text
    from .report_html import render
    from .scores import dump

    write_text(folder / "report.json", dump(report))
    told, plan, scores = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for path in (folder / f"{name}.json" for name in ("report", "plan", "scores"))
    )
    write_text(folder / "report.html", render(told, plan, scores))


def _write_card(run: Run, folder: Path, choice: Choice, report: dict[str, Any]) -> None:
    """README.md: what the hub shows of the model, and whoever finds its folder reads."""
    from . import card
    from .files import write_text
    from .report import scheme_rows

    rows = scheme_rows(run.linears, choice.winner.plan.assignment)
    text = card.render(run.args.out.name, run.source, rows, report, run.args.fake)
    write_text(folder / "README.md", text)


def _print_results(report: dict[str, Any], evaluation: dict[str, Any]) -> None:
    from .report import result_rows, table, task_rows

    sizes = report["bytes_before"], report["bytes_after"]
    print("\n" + table(result_rows(*sizes, evaluation)))
    if "tasks" in evaluation:
        print("\n" + table(task_rows(evaluation)))
    if "sample" in evaluation:
        print("\n  the quantized model writes:\n")
        print("\n".join("    " + line for line in evaluation["sample"].splitlines()))


def _open(run: Run) -> tuple[Any, str, Any]:
    """The original model, its hash, and its tokenizer."""
    return run.source.load(), run.source.sha256(), run.source.tokenizer()


def _stage_names(args: argparse.Namespace) -> list[str]:
    names = [s for s in STAGES if not (args.solve_only and s in ("round", "evaluate"))]
    for name in ("diagnose", "refine"):
        if getattr(args, name):
            names.insert(names.index("allocate") + 1, name)
    return names


def _planned(run: Run, clock: Stages, model: CausalLM, sha256: str, text: Text) -> Planned:
    """The plan that is given, or those that are measured for and solved."""
    from . import findings, stages
    from .report import diagnosis, refinement

    args = run.args
    if args.plan is not None:
        with clock.run("allocate", str(args.plan)):
            return stages.Planned({"given": stages.given_plan(run)})
    what = f"reuse {args.scores}" if args.scores else f"{args.method}, {args.schemes}"
    with clock.run("measure", what):
        scores = stages.measure(run, model, text.calibration, sha256)
    with clock.run("allocate", args.strategy):
        planned = stages.make_plans(run, model, scores, text)
        planned.curve = findings.curve_rows(run, planned)
    if args.refine:
        with clock.run("refine", f"units in their other schemes, up to {args.refine} rounds"):
            stages.refine_plan(run, model, planned, text)
        print(refinement(planned.found["refine"]["rounds"]))
    if args.diagnose:
        with clock.run("diagnose", "units one by one, the text in halves"):
            planned.found |= findings.diagnose(run, model, planned, text)
        print(diagnosis(planned.found))
    return planned


def _rounded(run: Run, clock: Stages, model: CausalLM, planned: Planned, text: Text) -> Choice:
    """The plan that ships: the best of those that are compared, or the only one."""
    from . import stages
    from .gate import Candidate, Choice

    plans = planned.plans
    if not stages.is_gated(run.args):
        plans = dict([next(iter(plans.items()))])
    if run.args.solve_only:
        return Choice(Candidate("only", next(iter(plans.values())), 0.0), {}, [])
    what = f"{run.args.rounding}, " + "distilled, " * bool(run.args.distill)
    what += ("the best of " * (len(plans) > 1)) + ", ".join(plans)
    with clock.run("round", what):
        return stages.round_plans(run, model, plans, text)


def quantize(run: Run) -> None:
    """All stages, in order. Raises UsageError; leaves a complete output folder or none."""
    from . import findings, stages
    from .atomic import atomic_folder
    from .report import Stages

    args, clock = run.args, Stages(_stage_names(run.args))
    with clock.run("open", run.source.name):
        model, sha256, tokenizer = _open(run)
    _print_findings(run)
    with clock.run("calibrate", stages.text_read(args)):
        text = stages.calibrate(run, tokenizer)
        for note in text.notes:
            print(f"      {note}", flush=True)
        if prefix := text.calibration.prefix:
            print(f"      every sequence begins with {tokenizer.decode(prefix)}", flush=True)
    planned = _planned(run, clock, model, sha256, text)
    choice = _rounded(run, clock, model, planned, text)
    report = findings.report(run, sha256, planned, choice, text)
    _print_plan(run, choice, report["reached"])

    def write_report(folder: Path, evaluation: dict[str, Any] | None) -> None:
        report.update(evaluation=evaluation, stages=clock.rows)
        _write_report(folder, report)
        if not args.solve_only:
            _write_card(run, folder, choice, report)

    needs = 0 if args.solve_only else report["reached"]["predicted_bytes"]
    with atomic_folder(args.out, args.overwrite, needs) as folder:
        with clock.run("write", str(args.out)):
            report["bytes_after"] = _write(run, folder, model, choice, planned, report)
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
            quantized = _load_result(run, choice, evaluation)
            _evaluate(run, model, quantized, tokenizer, text.held_out, evaluation)
    finally:  # a task that fails takes nothing else with it
        write_report(args.out, evaluation)
    _print_results(report, evaluation)
    print(f"\n  everything is in {args.out}; what it came to in {args.out / 'report.html'}")
    if args.target:
        name = "compressed-tensors" if args.target == "vllm" else args.target
        print(f"  for {args.target}: python -m mixbits.export {args.out} --format {name} --out ...")


def _command(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    early.check(args)
    from . import checks, stages
    from .report import quiet

    quiet()
    _check_device(args)
    run = stages.prepare(args)
    lines = checks.check(run)
    if args.dry_run:
        _dry_run(run)
    for line in lines:
        print(f"  {line}")
    if not args.dry_run:
        if not args.solve_only:
            _check_evaluation(run)
        quantize(run)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: _command(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
