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
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import exit_code
from .errors import UsageError, first_line
from .formats.schemes import parse_scheme
from .pipeline import early
from .pipeline.options import parse_arguments

if TYPE_CHECKING:  # torch is imported by functions only: a wrong option should be told at once
    from .files.atomic import Destination
    from .model.layout import CausalLM, LeftAlone
    from .pipeline.gate import Choice
    from .pipeline.stages import Planned, Run, Text
    from .report.tables import Stages
    from .report.verdict import Circumstances

STAGES = ("open", "calibrate", "measure", "allocate", "round", "write", "evaluate")


def _check_evaluation(run: Run) -> None:
    """What would fail at the very end should fail at once."""
    args, source = run.args, run.source
    for option in ("tasks", "prompt"):
        if getattr(args, option) and not source.has_tokenizer:
            raise UsageError(f"--{option} needs a tokenizer, and {source.path} has none")
    if args.tasks:
        from .measuring.evaluate import task_manager

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
    from .checkpoint import saving as checkpoint
    from .pipeline import diagnose as findings

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
        from .report.tables import fake_column
        from .runtime.fake import round_activations
        from .source.source import open_source

        fake = open_source(str(run.args.out), run.args.trust_remote_code).load()
        rounded = round_activations(fake, choice.winner.plan.assignment)
        evaluation["scored"] = fake_column(rounded)
        return fake
    from .checkpoint.loading import load
    from .runtime.linear import PackedLinear

    model = load(run.args.out, trust_remote_code=run.args.trust_remote_code)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.backend = run.args.backend  # for the device that blocks are moved to
    return model


def _evaluate(
    run: Run,
    original: Any,
    quantized: Any,
    tokenizer: Any,
    held_out: Any,
    circumstances: Circumstances,
    result: dict[str, Any],
) -> None:
    """Held-out scores, lm-eval's, and a sample, into `result`: `evaluation` of report.json."""
    from .measuring.evaluate import compare, run_tasks
    from .model.streaming import StreamedModel
    from .progress import numbered
    from .report.verdict import verdict

    args, prefix = run.args, held_out.prefix
    if len(held_out.ids):
        p, q = (StreamedModel(m, device=args.device) for m in (original, quantized))
        scores = compare(p, q, held_out.ids, args.batch_size, held_out.judged_from)
        result["held_out"] = {**held_out.describe(), **scores}
        result["verdict"] = verdict(scores, circumstances)
    if args.tasks:
        tasks = args.tasks.split(",")
        add_bos = args.add_bos_token if args.bos or args.add_bos_token else False
        options = args.limit, add_bos, args.include_path, args.batch_size
        scored = [("original_tasks", original)] * args.eval_original + [("tasks", quantized)]
        for name, model in numbered(scored, "lm-eval, model"):
            model.to(args.device)
            result[name] = run_tasks(model, tokenizer, tasks, *options)
    if args.prompt:
        result["prompt"] = args.prompt
        result["sample"] = _generate(quantized, tokenizer, args, prefix)


def _generate(model: Any, tokenizer: Any, args: argparse.Namespace, prefix: tuple[int, ...]) -> str:
    """The prompt and 80 tokens after it, drawn with the seed: greedy small models repeat."""
    import torch

    from .measuring.text import begin, tokenize

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
    from .planning.plan import Plan, average_bits
    from .report.tables import scheme_rows, size, table

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
    from .progress import say
    from .report.tables import size

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
        say(f"  {line}")


def _of_how_much(run: Run) -> str:
    """What "everything" is, where it is not nearly all of the decoder blocks' weights."""
    share = run.coverage.share(run.linears)
    return f" (of {share:.1%} of the decoder blocks' weights)" if share < 0.99 else ""


def _print_plan(run: Run, choice: Choice, reached: dict[str, Any]) -> None:
    from .progress import say
    from .report.tables import gate_table, scheme_rows, size, table

    if choice.rows:
        say(gate_table(choice.rows))
    say(table(scheme_rows(run.linears, choice.winner.plan.assignment)))
    say(
        f"  {reached['avg_bits']:.4f} bits per weight with everything counted"
        f"{_of_how_much(run)}, "
        f"{reached['avg_bits_without_scales']:.4f} without scales; "
        f"weight files {size(reached['predicted_bytes'])}"
    )


class _Reports:
    """The files of an output that are written again when it has been scored: name -> text.

    report.json; report.html, from the contents of the files alone, so that it can be made from
    them again; and README.md, which the hub shows and whoever finds the folder reads.
    """

    NAMES = ("report.json", "report.html", "README.md")

    def __init__(self, run: Run, choice: Choice, report: dict[str, Any], folder: Path) -> None:
        self.run, self.choice, self.report = run, choice, report
        self.plan, self.scores = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            for path in (folder / f"{name}.json" for name in ("plan", "scores"))
        )

    def texts(
        self, evaluation: dict[str, Any] | None, stages: list[dict[str, Any]]
    ) -> dict[str, str]:
        from .measuring.scores import dump
        from .report import card
        from .report.html import render
        from .report.tables import scheme_rows

        run = self.run
        self.report.update(evaluation=evaluation, stages=stages)
        told = dump(self.report)
        texts = [told, render(json.loads(told), self.plan, self.scores)]
        if not run.args.solve_only:
            rows = scheme_rows(run.linears, self.choice.winner.plan.assignment)
            how = self.report, run.args.fake
            texts.append(card.render(run.args.out.name, run.source, rows, *how))
        return dict(zip(self.NAMES, texts, strict=False))


def _print_results(report: dict[str, Any], evaluation: dict[str, Any]) -> None:
    from .progress import say
    from .report.tables import result_rows, search_line, table, task_rows
    from .report.verdict import lines

    sizes = report["bytes_before"], report["bytes_after"]
    say("\n" + table(result_rows(*sizes, evaluation)) + "\n")
    for line in [*lines(evaluation), *search_line(report)]:
        say(f"  {line}")
    if "tasks" in evaluation:
        say("\n" + table(task_rows(evaluation)))
    if "sample" in evaluation:
        say("\n  the quantized model writes:\n")
        say("\n".join("    " + line for line in evaluation["sample"].expandtabs(4).splitlines()))


def _print_curve(args: argparse.Namespace) -> None:
    from .progress import say

    if args.curve:
        say(f"  what every budget buys is in {args.out}/curve.png and curve.csv")


def _open(run: Run) -> tuple[Any, str, Any]:
    """The original model, its hash, and its tokenizer."""
    return run.source.load(), run.source.sha256(), run.source.tokenizer()


def _stage_names(args: argparse.Namespace) -> list[str]:
    names = [s for s in STAGES if not (args.solve_only and s in ("round", "evaluate"))]
    for name in ("diagnose", "refine"):
        if getattr(args, name):
            names.insert(names.index("allocate") + 1, name)
    return names


def _planned(
    run: Run, clock: Stages, place: Destination, model: CausalLM, sha256: str, text: Text
) -> Planned:
    """The plan that is given, or those that are measured for and solved."""
    from .measuring.scores import dump
    from .pipeline import diagnose as findings
    from .pipeline import stages
    from .progress import say
    from .report.tables import diagnosis, refinement

    args = run.args
    if args.plan is not None:
        with clock.run("allocate", str(args.plan)):
            return stages.Planned({"given": stages.given_plan(run)})
    what = f"reuse {args.scores}" if args.scores else f"{args.method}, {args.schemes}"
    with clock.run("measure", what):
        scores = stages.measure(run, model, text.calibration, sha256)
        if not args.scores:
            place.set_aside(".scores.json", dump(scores.data))
    with clock.run("allocate", args.strategy):
        planned = stages.make_plans(run, model, scores, text)
        planned.curve = findings.curve_rows(run, planned)
    if args.refine:
        with clock.run("refine", f"units in their other schemes, up to {args.refine} rounds"):
            stages.refine_plan(run, model, planned, text)
        say(refinement(planned.found["refine"]["rounds"]))
    if args.diagnose:
        with clock.run("diagnose", "units one by one, the text in halves"):
            planned.found |= findings.diagnose(run, model, planned, text)
        say(diagnosis(planned.found))
    return planned


def _rounded(run: Run, clock: Stages, model: CausalLM, planned: Planned, text: Text) -> Choice:
    """The plan that ships: the best of those that are compared, or the only one."""
    from .pipeline import stages
    from .pipeline.gate import Candidate, Choice

    plans = planned.plans
    if not stages.is_gated(run.args):
        plans = dict([next(iter(plans.items()))])
    if run.args.solve_only:
        return Choice(Candidate("only", next(iter(plans.values())), 0.0), {}, [])
    what = f"{run.args.rounding}, " + "distilled, " * bool(run.args.distill)
    what += ("the best of " * (len(plans) > 1)) + ", ".join(plans)
    with clock.run("round", what):
        return stages.round_plans(run, model, plans, text, planned.rounded)


def quantize(run: Run) -> None:
    """All stages, in order. Raises UsageError; leaves a complete output folder or none.

    What was measured for an output that did not come about lies beside it.
    """
    from .files.atomic import reserved
    from .pipeline.early import inputs

    args = run.args
    with reserved(args.out, args.overwrite, inputs(args)) as place, _told_of_scores(place):
        _quantize(run, place)


@contextmanager
def _told_of_scores(place: Destination) -> Iterator[None]:
    """Whatever ends the run says where the scores are that it had measured by then."""
    try:
        yield
    except BaseException as error:
        if place.aside is not None:
            path = shlex.quote(str(place.aside))
            error.add_note(f"to go on from what was measured: --scores {path}")
        raise


def _quantize(run: Run, place: Destination) -> None:
    from .files.io import write_text
    from .model.layout import decoder_blocks
    from .pipeline import diagnose as findings
    from .pipeline import stages
    from .progress import Progress, duration, planned_work, say
    from .report.tables import Stages
    from .report.verdict import verdict

    blocks = len(decoder_blocks(run.shapes)[1])
    progress = Progress(planned_work(run.args, blocks, len(run.units)))
    args, clock = run.args, Stages(_stage_names(run.args), progress)
    with clock.run("open", run.source.name):
        model, sha256, tokenizer = _open(run)
    _print_findings(run)
    with clock.run("calibrate", stages.text_read(args)):
        text = stages.calibrate(run, tokenizer)
        for note in text.notes:
            say(f"      {note}")
        if prefix := text.calibration.prefix:
            say(f"      every sequence begins with {tokenizer.decode(prefix)}")
    planned = _planned(run, clock, place, model, sha256, text)
    choice = _rounded(run, clock, model, planned, text)
    report = findings.report(run, sha256, planned, choice, text)
    _print_plan(run, choice, report["reached"])
    needs = 0 if args.solve_only else report["reached"]["predicted_bytes"]
    later = () if args.solve_only else _Reports.NAMES
    with place.folder(needs, later) as folder:
        with clock.run("write", str(args.out)):
            report["bytes_after"] = _write(run, folder, model, choice, planned, report)
        reports = _Reports(run, choice, report, folder)
        for name, content in reports.texts(None, clock.rows).items():
            write_text(folder / name, content)
    place.drop_aside()  # it is in the folder now
    if args.solve_only:
        say(f"  plan and scores are in {args.out}")
        _print_curve(args)
        return
    evaluation: dict[str, Any] = {"verdict": verdict(None)}
    circumstances = findings.circumstances(run, choice, report["rounding"])
    judges = ["held-out text"] * bool(args.eval_nsamples) + [args.tasks] * bool(args.tasks)
    try:
        with clock.run("evaluate", ", ".join(judges) or "nothing asked for"):
            if args.fake:  # its weights were rounded in place
                model = run.source.load()
            place.check_in_place()
            quantized = _load_result(run, choice, evaluation)
            place.check_in_place()  # and so is what was loaded by its name
            texts = tokenizer, text.held_out
            _evaluate(run, model, quantized, *texts, circumstances, evaluation)
    finally:  # a task that fails takes nothing else with it
        place.rewrite(reports.texts(evaluation, clock.rows))
    _print_results(report, evaluation)
    took = duration(sum(row["seconds"] for row in clock.rows))
    say(f"\n  everything is in {args.out} after {took}; what it came to in {args.out}/report.html")
    _print_curve(args)
    if args.target:
        name = "compressed-tensors" if args.target == "vllm" else args.target
        folders = shlex.quote(str(args.out)), shlex.quote(f"{args.out}-{name}")
        say(
            f"  for {args.target}: python -m mixbits.export {folders[0]} --format {name} "
            f"--out {folders[1]}"
        )


def _command(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    from .files.atomic import recover

    if not args.dry_run:
        recover(args.out)
    early.check(args)
    from .pipeline import feasibility, stages
    from .progress import Progress
    from .report.tables import quiet

    quiet()
    _check_device(args)
    with Progress({}).stage("look at the source"):
        run = stages.prepare(args)
        lines = feasibility.check(run)
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
