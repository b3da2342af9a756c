"""`python -m mixbits.quantize`: measure, allocate, pack, run and score a model.

The stages, one function each, are the table of contents of the package: open (source),
calibrate (calibration), sensitivity, allocate (plan), round (gate, rounded), pack (checkpoint),
evaluate, report.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve shared cores

import argparse
import random
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .allocate import BudgetError
from .formats import Assignment, Scheme, UsageError, first_line, parse_scheme
from .options import parse_arguments

STAGES = ("open", "calibrate", "measure", "allocate", "round", "write", "evaluate")


@dataclass
class Run:
    """A run's arguments, and what config.json alone says of the model."""

    args: argparse.Namespace
    schemes: list[Scheme]
    keep: list[tuple[str, Scheme]]
    source: Any  # source.Source
    shapes: Any  # the model without storage
    linears: list[Any]  # LinearInfo: what may be quantized
    units: list[Any]  # Unit

    @property
    def scale_modes(self) -> tuple[str, str]:
        return self.args.weight_scale_mode, self.args.act_scale_mode

    def predicted_bytes(self, assignment: Assignment) -> int:
        from .checkpoint import predicted_bytes

        return predicted_bytes(self.shapes, self.linears, assignment, self.source.dtype)


def _prepare(args: argparse.Namespace) -> Run:
    """Check everything that can be checked from the arguments and config.json."""
    from .checkpoint import check_destination
    from .model import find_linears, make_units, match_units, meta_model
    from .plan import parse_keep, slab_width
    from .source import open_source

    modes = args.weight_scale_mode, args.act_scale_mode
    parsed = [parse_scheme(name, *modes) for name in args.schemes.split(",")]
    schemes = list({s.name: s for s in parsed}.values())
    keep = [parse_keep(text, modes) for text in args.keep]
    if not args.dry_run:
        check_destination(args.out, args.overwrite)
    source = open_source(args.model, args.trust_remote_code, config_only=args.dry_run)
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if longest and args.seqlen > longest:
        raise UsageError(f"--seqlen must be at most {longest} for this model: got {args.seqlen}")
    try:
        shapes = meta_model(source.config, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise UsageError(
            f"no causal language model is described in {source.path}: {first_line(error)}"
        ) from None
    linears = find_linears(shapes, include_head=args.quantize_lm_head)
    slabs = args.granularity == "slab"
    fuse = args.fuse or (slabs and not args.free_slabs)
    units = make_units(linears, fuse, args.per_expert, by_input=slabs)
    if slabs:
        slab_width([*schemes, *(scheme for _, scheme in keep)])
    for pattern, _ in keep:
        match_units(units, pattern)
    if not args.dry_run and not args.solve_only:
        _check_evaluation(args, source)
    return Run(args, schemes, keep, source, shapes, linears, units)


def _check_evaluation(args: argparse.Namespace, source: Any) -> None:
    """What would fail at the very end should fail at once."""
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


@dataclass
class Text:
    """calibration.Sequences to calibrate with, to choose by, and to judge by; any may be empty."""

    calibration: Any
    gate: Any
    held_out: Any


def _calibrate(run: Run, tokenizer: Any) -> Text:
    """The run's text: three parts that share no token."""
    import torch

    from .calibration import Sequences, split

    args = run.args
    gate = args.gate if _is_gated(args) else 0
    first, held_out = _first_and_held_out(run, tokenizer, gate)
    if not len(first.ids):
        empty = Sequences(torch.empty(0, args.seqlen, dtype=torch.int64), "nothing")
        return Text(empty, empty, held_out)
    return Text(*split(first, len(first.ids) - gate, gate), held_out)


def _is_gated(args: argparse.Namespace) -> bool:
    """Whether several plans are compared: not one that is given, or asked for by its strategy."""
    return bool(args.gate and not args.plan and not args.solve_only and args.strategy == "optimal")


def _first_and_held_out(run: Run, tokenizer: Any, gate: int) -> tuple[Any, Any]:
    """Sequences to calibrate with and `gate` more, and held-out ones; none where not needed."""
    import torch

    from .calibration import Sequences, load_sequences

    args = run.args
    vocab = run.source.config.get_text_config().vocab_size
    calibrates = not (args.scores or args.plan) or (
        args.rounding == "gptq" and not (args.solve_only or args.fake)
    )
    count = _calibrated(args) + gate if calibrates or gate else 0
    held_count = 0 if args.solve_only else args.eval_nsamples
    if not count and not held_count:
        empty = Sequences(torch.empty(0, args.seqlen, dtype=torch.int64), "nothing")
        return empty, empty
    if args.demo:
        return _demo_sequences(args, tokenizer, vocab, count)
    if args.eval_dataset is None:
        # Held-out sequences follow the others even where those are not needed now.
        before = _calibrated(args) + gate
        return load_sequences(args.dataset, tokenizer, vocab, before, held_count, args.seqlen)
    held = load_sequences(args.eval_dataset, tokenizer, vocab, 0, held_count, args.seqlen)[1]
    return load_sequences(args.dataset, tokenizer, vocab, count, 0, args.seqlen)[0], held


def _calibrated(args: argparse.Namespace) -> int:
    """Sequences at the head of the dataset that were, or will be, calibrated with."""
    if args.scores is None:
        return int(args.nsamples)
    from .scores import Scores

    used = Scores.read(args.scores).data["calibration"]
    return -(-int(used["nsamples"]) * int(used["seqlen"]) // args.seqlen)


def _demo_sequences(
    args: argparse.Namespace, tokenizer: Any, vocab: int, count: int
) -> tuple[Any, Any]:
    """Text that every Python has: modules trained on to calibrate, held-out ones to judge."""
    from . import calibration, demo

    try:
        files, held_out = demo.training_files(), demo.held_out_text()
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    random.Random(args.seed).shuffle(files)
    wanted, text = count * args.seqlen * calibration.CHARS_PER_TOKEN, ""
    for path in files:
        text += path.read_text(encoding="utf-8") + "\n\n"
        if len(text) > wanted:
            break
    pools = [
        calibration.cut(calibration.tokenize(tokenizer, part), args.seqlen, name, vocab)
        for part, name in ((text, "the standard library"), (held_out, "its held-out modules"))
    ]
    first = calibration.split(pools[0], count, 0)[0]
    return first, calibration.split(pools[1], 0, args.eval_nsamples)[1]


def _arrangements(run: Run, model: Any, sequences: Any) -> dict[str, Any]:
    """Orders of columns for slabs, and which linears are rotated."""
    from .arrange import Arrangement
    from .sensitivity import sorted_columns

    args, arrangements = run.args, {}
    if args.granularity == "slab":
        readers = [u.linears for u in run.units if len({_input(i) for i in u.linears}) == 1]
        cheapest = min(run.schemes, key=lambda s: s.element_bits)
        options = sequences.ids, args.batch_size, args.seed
        arrangements = sorted_columns(model, run.linears, readers, cheapest, *options)
    for info in run.linears if args.rotate == "ffn" else ():
        if info.name.endswith(".down_proj"):
            order = arrangements[info.name].order if info.name in arrangements else None
            arrangements[info.name] = Arrangement(order, rotated=True)
    return arrangements


def _input(info: Any) -> str:
    """What a linear reads, told apart as far as orders of columns need it."""
    is_down = info.is_expert and info.name.endswith(".down_proj")
    return info.name if is_down else ""  # an expert's intermediate is its own


def _measure(run: Run, model: Any, sequences: Any, sha256: str) -> Any:
    """Read scores.json, or make it."""
    from .scores import Scores
    from .sensitivity import measure
    from .streaming import StreamedModel, gradient_dtype

    args = run.args
    schemes = list({s.name: s for s in [*run.schemes, *(s for _, s in run.keep)]}.values())
    if args.scores is not None:
        scores = Scores.read(args.scores)
        scores.check(args.scores, run.linears, schemes, run.scale_modes, sha256)
        return scores
    dtype = gradient_dtype(run.source.dtype, args.device)
    streamed = StreamedModel(model, dtype, device=args.device)
    arranged = _arrangements(run, streamed, sequences)
    options = args.method, args.batch_size, args.seed, arranged
    slabs = measure(streamed, run.linears, schemes, sequences.ids, *options)
    described = {**sequences.describe(), "batch_size": args.batch_size, "seed": args.seed}
    name = {"name": run.source.name, "sha256": sha256}
    return Scores.build(slabs, run.linears, args.method, run.scale_modes, name, described, arranged)


def _allocate(run: Run, scores: Any, strategy: str, slabs: bool) -> Any:
    """Solve for a plan within the budget."""
    from .plan import Budget, solve, unit_options

    args = run.args
    budget = Budget(args.avg_bits, args.size, args.ignore_scale_bits)
    options = unit_options(run.units, run.schemes, run.keep)
    fixed = 0
    if args.size is not None:
        cheapest = min(run.schemes, key=lambda s: s.element_bits)
        least: Assignment = dict.fromkeys((i.name for i in run.linears), cheapest)
        stored = sum(cheapest.storage_bits(i.out_features, i.in_features) for i in run.linears)
        fixed = run.predicted_bytes(least) - stored // 8
    while True:
        plan = solve(run.units, options, scores, budget, strategy, args.seed, fixed, slabs)
        excess = run.predicted_bytes(plan.assignment) - args.size if args.size is not None else 0
        if excess <= 0:
            return plan
        fixed += excess  # the header's length depends a little on the plan


def _plans(run: Run, scores: Any) -> dict[str, Any]:
    """The plan to ship, first, and where several are compared, others of the same size."""
    slabs = run.args.granularity == "slab"
    plans = {run.args.strategy: _allocate(run, scores, run.args.strategy, slabs)}
    if not _is_gated(run.args):
        return plans
    if slabs:
        plans = {"slabs": plans["optimal"]}
    for strategy in ("optimal", "uniform", "head", "tail"):
        if strategy not in plans:
            with suppress(BudgetError):  # no single scheme may fit
                plans[strategy] = _allocate(run, scores, strategy, False)
    return plans


def _round(run: Run, model: Any, plans: dict[str, Any], text: Text) -> Any:
    """gate.Choice: the plan that ships, with its packed weights."""
    from .gate import Candidate, Choice, candidates, choose
    from .rounded import round_model
    from .streaming import StreamedModel

    args, streamed = run.args, StreamedModel(model, device=run.args.device)
    if len(plans) > 1:
        ids = text.calibration.ids, text.gate.ids
        found = candidates(plans, args.rounding, args.correction)
        return choose(streamed, run.linears, found, args.rounding, *ids, args.batch_size)
    (name, plan), *_ = plans.items()
    rounded = round_model(
        streamed,
        run.linears,
        plan.assignment,
        args.rounding,
        text.calibration.ids,
        args.correction,
    )
    return Choice(Candidate(name, plan, args.correction), rounded, [])


def _write(
    run: Run, folder: Path, model: Any, choice: Any, scores: Any, report: dict[str, Any]
) -> int | None:
    """Write all but report.json into `folder`; returns the bytes of the weight files, if any."""
    from . import checkpoint

    plan = choice.winner.plan
    plan.write(folder / "plan.json")
    if scores is not None:
        scores.write(folder / "scores.json")
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


def _reached(run: Run, plan: Any) -> dict[str, Any]:
    """What a plan comes to, in both ways of counting."""
    from .plan import average_bits

    return {
        "avg_bits": average_bits(run.linears, plan.assignment),
        "avg_bits_without_scales": average_bits(run.linears, plan.assignment, True),
        "predicted_bytes": run.predicted_bytes(plan.assignment),
    }


def _print_plan(run: Run, choice: Any, reached: dict[str, Any]) -> None:
    from .report import gate_table, scheme_table, size

    if choice.rows:
        print(gate_table(choice.rows))
    print(scheme_table(run.linears, choice.winner.plan.assignment))
    print(
        f"  {reached['avg_bits']:.4f} bits per weight with everything counted, "
        f"{reached['avg_bits_without_scales']:.4f} without scales; "
        f"weight files {size(reached['predicted_bytes'])}"
    )


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


def _report(run: Run, sha256: str, scores: Any, choice: Any, text: Text) -> dict[str, Any]:
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
        "reached": _reached(run, plan),
        "rounding": rounding,
        "gate": {**text.gate.describe(), "candidates": choice.rows} if choice.rows else None,
        "predicted_loss": None if scores is None else plan.data["predicted_loss"],
        "bytes_before": sum(path.stat().st_size for path in run.source.weight_files()),
    }


def quantize(run: Run) -> None:
    """All stages, in order. Raises UsageError; leaves a complete output folder or none."""
    from .checkpoint import atomic_folder
    from .gate import Candidate, Choice
    from .plan import Plan
    from .report import Stages
    from .scores import dump, write_text

    args, scores = run.args, None
    stages = Stages([s for s in STAGES if not (args.solve_only and s in ("round", "evaluate"))])
    with stages.run("open", run.source.name):
        model, sha256, tokenizer = _open(run)
    with stages.run("calibrate", "its own text" if args.demo else args.dataset):
        text = _calibrate(run, tokenizer)
    if args.plan is None:
        what = f"reuse {args.scores}" if args.scores else f"{args.method}, {args.schemes}"
        with stages.run("measure", what):
            scores = _measure(run, model, text.calibration, sha256)
    with stages.run("allocate", str(args.plan or args.strategy)):
        if scores is None:
            plans = {"given": Plan.read(args.plan, run.linears)}
        else:
            plans = _plans(run, scores)
    if args.solve_only:
        choice = Choice(Candidate("only", next(iter(plans.values())), 0.0), {}, [])
    else:
        what = f"{args.rounding}, " + ("the best of " * (len(plans) > 1)) + ", ".join(plans)
        with stages.run("round", what):
            choice = _round(run, model, plans, text)
    report = _report(run, sha256, scores, choice, text)
    _print_plan(run, choice, report["reached"])

    def write_report(folder: Path, evaluation: dict[str, Any] | None) -> None:
        report.update(evaluation=evaluation, stages=stages.rows)
        write_text(folder / "report.json", dump(report))

    needs = 0 if args.solve_only else report["reached"]["predicted_bytes"]
    with atomic_folder(args.out, args.overwrite, needs) as folder:
        with stages.run("write", str(args.out)):
            report["bytes_after"] = _write(run, folder, model, choice, scores, report)
        write_report(folder, None)
    if args.solve_only:
        print(f"  plan and scores are in {args.out}")
        return
    evaluation: dict[str, Any] = {}
    judges = ["held-out text"] * bool(args.eval_nsamples) + [args.tasks] * bool(args.tasks)
    try:
        with stages.run("evaluate", ", ".join(judges) or "nothing asked for"):
            if args.fake:  # its weights were rounded in place
                model = run.source.load()
            _evaluate(run, model, _load_result(run), tokenizer, text.held_out, evaluation)
    finally:  # a task that fails takes nothing else with it
        write_report(args.out, evaluation)
    _print_results(report, evaluation)
    print(f"\n  everything is in {args.out}; scores and timings in {args.out / 'report.json'}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from .report import quiet

    try:
        args = parse_arguments(argv)
        quiet()
        _check_device(args)
        run = _prepare(args)
        if args.dry_run:
            _dry_run(run)
        else:
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
