"""What the stages of a run do: they join the modules of the pipeline to the command's arguments.

In their order: `prepare` (all that arguments and config.json tell), `calibrate` (calibration),
`measure` (sensitivity), `make_plans` (plan), `round_plans` (gate, rounded). `quantize` runs them,
and writes what they give.
"""

from __future__ import annotations

import argparse
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from . import demo
from .allocate import BudgetError
from .arrange import Arrangement
from .calibration import CHARS_PER_TOKEN, Sequences, cut, load_sequences, split, tokenize
from .checkpoint import check_destination, predicted_bytes
from .formats import Assignment, Scheme, UsageError, first_line, parse_scheme
from .gate import Candidate, Choice, candidates, choose
from .model import CausalLM, LinearInfo, Unit, find_linears, make_units, match_units, meta_model
from .plan import Budget, Plan, parse_keep, slab_width, solve, unit_options
from .rounded import round_model
from .scores import Scores
from .sensitivity import measure as measure_sensitivity
from .sensitivity import sorted_columns
from .source import Source, open_source
from .streaming import StreamedModel


@dataclass
class Run:
    """A run's arguments, and what config.json alone says of the model."""

    args: argparse.Namespace
    schemes: list[Scheme]
    keep: list[tuple[str, Scheme]]
    source: Source
    shapes: CausalLM  # without storage
    linears: list[LinearInfo]  # what may be quantized
    units: list[Unit]

    @property
    def scale_modes(self) -> tuple[str, str]:
        return self.args.weight_scale_mode, self.args.act_scale_mode

    def predicted_bytes(self, assignment: Assignment) -> int:
        return predicted_bytes(self.shapes, self.linears, assignment, self.source.dtype)


def prepare(args: argparse.Namespace) -> Run:
    """Check everything that can be checked from the arguments and config.json."""
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
    return Run(args, schemes, keep, source, shapes, linears, units)


@dataclass
class Text:
    """What to calibrate with, to choose by, and to judge by; any may be empty."""

    calibration: Sequences
    gate: Sequences
    held_out: Sequences


def calibrate(run: Run, tokenizer: Any) -> Text:
    """The run's text: three parts that share no token."""
    args = run.args
    gate = args.gate if is_gated(args) else 0
    first, held_out = _first_and_held_out(run, tokenizer, gate)
    if not len(first.ids):
        empty = Sequences(torch.empty(0, args.seqlen, dtype=torch.int64), "nothing")
        return Text(empty, empty, held_out)
    return Text(*split(first, len(first.ids) - gate, gate), held_out)


def is_gated(args: argparse.Namespace) -> bool:
    """Whether several plans are compared: not one that is given, or asked for by its strategy."""
    return bool(args.gate and not args.plan and not args.solve_only and args.strategy == "optimal")


def _first_and_held_out(run: Run, tokenizer: Any, gate: int) -> tuple[Sequences, Sequences]:
    """Sequences to calibrate with and `gate` more, and held-out ones; none where not needed."""
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
    used = Scores.read(args.scores).data["calibration"]
    return -(-int(used["nsamples"]) * int(used["seqlen"]) // args.seqlen)


def _demo_sequences(
    args: argparse.Namespace, tokenizer: Any, vocab: int, count: int
) -> tuple[Sequences, Sequences]:
    """Text that every Python has: modules trained on to calibrate, held-out ones to judge."""
    try:
        files, held_out = demo.training_files(), demo.held_out_text()
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    random.Random(args.seed).shuffle(files)
    wanted, text = count * args.seqlen * CHARS_PER_TOKEN, ""
    for path in files:
        text += path.read_text(encoding="utf-8") + "\n\n"
        if len(text) > wanted:
            break
    pools = [
        cut(tokenize(tokenizer, part), args.seqlen, name, vocab)
        for part, name in ((text, "the standard library"), (held_out, "its held-out modules"))
    ]
    first = split(pools[0], count, 0)[0]
    return first, split(pools[1], 0, args.eval_nsamples)[1]


def _arrangements(run: Run, model: StreamedModel, sequences: Sequences) -> dict[str, Arrangement]:
    """Orders of columns for slabs, and which linears are rotated."""
    args = run.args
    arrangements: dict[str, Arrangement] = {}
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


def _input(info: LinearInfo) -> str:
    """What a linear reads, told apart as far as orders of columns need it."""
    is_down = info.is_expert and info.name.endswith(".down_proj")
    return info.name if is_down else ""  # an expert's intermediate is its own


def measure(run: Run, model: CausalLM, sequences: Sequences, sha256: str) -> Scores:
    """Read scores.json, or make it."""
    args = run.args
    schemes = list({s.name: s for s in [*run.schemes, *(s for _, s in run.keep)]}.values())
    if args.scores is not None:
        scores = Scores.read(args.scores)
        scores.check(args.scores, run.linears, schemes, run.scale_modes, sha256)
        return scores
    streamed = StreamedModel(model, device=args.device)
    arranged = _arrangements(run, streamed, sequences)
    options = args.method, args.batch_size, args.seed, arranged
    slabs = measure_sensitivity(streamed, run.linears, schemes, sequences.ids, *options)
    described = {**sequences.describe(), "batch_size": args.batch_size, "seed": args.seed}
    name = {"name": run.source.name, "sha256": sha256}
    return Scores.build(slabs, run.linears, args.method, run.scale_modes, name, described, arranged)


def _allocate(run: Run, scores: Scores, strategy: str, slabs: bool) -> Plan:
    """Solve for a plan within the budget."""
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


def make_plans(run: Run, scores: Scores) -> dict[str, Plan]:
    """The plan to ship, first, and where several are compared, others of the same size."""
    slabs = run.args.granularity == "slab"
    plans = {run.args.strategy: _allocate(run, scores, run.args.strategy, slabs)}
    if not is_gated(run.args):
        return plans
    if slabs:
        plans = {"slabs": plans["optimal"]}
    for strategy in ("optimal", "uniform", "head", "tail"):
        if strategy not in plans:
            with suppress(BudgetError):  # no single scheme may fit
                plans[strategy] = _allocate(run, scores, strategy, False)
    return plans


def round_plans(run: Run, model: CausalLM, plans: dict[str, Plan], text: Text) -> Choice:
    """The plan that ships, with its packed weights."""
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
