"""What the stages of a run do: they join the modules of the pipeline to the command's arguments.

In their order: `prepare` (all that arguments and config.json tell), `calibrate` (calibration),
`measure` (sensitivity), `make_plans` (plan), `refine_plan` (refine), `round_plans` (gate, rounded).
`quantize` runs them, and writes what they give.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from .. import demo
from ..checkpoint.folder import predicted_bytes
from ..errors import UsageError
from ..export.targets import TARGETS, advice, check_fused, check_together, default_schemes, fit
from ..files.io import last_part
from ..formats.arrange import Arrangement
from ..formats.schemes import Assignment, Scheme, parse_scheme
from ..measuring.scores import Scores
from ..measuring.sensitivity import measure as measure_sensitivity
from ..measuring.sensitivity import sorted_columns
from ..measuring.text import (
    CHARS_PER_TOKEN,
    Sequences,
    cut,
    prefix_tokens,
    read_sequences,
    split,
    tokenize,
)
from ..model.layout import (
    CausalLM,
    LinearInfo,
    Survey,
    Unit,
    check_layout,
    ignore,
    make_units,
    match_units,
    survey,
)
from ..model.streaming import StreamedModel, gradient_dtype
from ..planning.allocate import Allocation, Item, total
from ..planning.curve import frontier
from ..planning.plan import Budget, Plan, Problem, average_bits, slab_width, unit_options
from ..planning.smallest import smallest
from ..progress import part, say
from ..report.coverage import Coverage
from ..rounding.distill import distill, enough_text
from ..rounding.whole_model import round_model
from ..source.kept import NO_CODES, OwnCodes
from ..source.source import Source, open_source
from .early import check_seqlen
from .gate import Candidate, Choice, candidates, choose, judge
from .options import CORRECTION, parse_keep
from .refine import Options, halves, refine

PYTHON_TEXT = "modules of Python's standard library"
ENOUGH_TOKENS = 2  # of calibration for each column of the widest input
SEARCH_TOLERANCE = 0.02  # of --max-kl, in bits per weight


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
    coverage: Coverage  # and what else there is
    own: OwnCodes = NO_CODES  # of linears that the source has quantized

    @property
    def all_schemes(self) -> list[Scheme]:
        """Those to choose from, those of kept units, and those that the source has."""
        found = [*self.schemes, *(s for _, s in self.keep), *self.own_schemes]
        return list({s.name: s for s in found}.values())

    @property
    def own_schemes(self) -> list[Scheme]:
        """Those that the source has, as far as the target holds them."""
        if not self.args.target:
            return self.own.schemes
        target, found = TARGETS[self.args.target], []
        for scheme in self.own.schemes:
            linears = [i for i in self.linears if self.own.is_free(i.name, scheme)]
            with suppress(UsageError):
                fit(target, linears, dict.fromkeys((i.name for i in linears), scheme))
                found.append(scheme)
        return found

    @property
    def scale_modes(self) -> tuple[str, str]:
        return self.args.weight_scale_mode, self.args.act_scale_mode

    def predicted_bytes(self, assignment: Assignment) -> int:
        """Exact size of the weight files; of 16-bit weights, where only config.json is here."""
        here = self.source.has_weights
        weights = self.source.weights if here else None
        return predicted_bytes(self.shapes, self.linears, assignment, self.source.dtype, weights)

    def reached(self, assignment: Assignment) -> dict[str, Any]:
        """What a plan comes to, in both ways of counting."""
        return {
            "avg_bits": average_bits(self.linears, assignment),
            "avg_bits_without_scales": average_bits(self.linears, assignment, True),
            "predicted_bytes": self.predicted_bytes(assignment),
        }


def prepare(args: argparse.Namespace) -> Run:
    """Check everything that can be checked from the arguments and config.json."""
    modes = args.weight_scale_mode, args.act_scale_mode
    keep = [parse_keep(text, modes) for text in args.keep]
    source = open_source(args.model, args.trust_remote_code, config_only=args.dry_run)
    if not args.dry_run:
        source.scratch = args.out.absolute().parent
    check_seqlen(args, getattr(source.config.get_text_config(), "max_position_embeddings", None))
    shapes = source.shapes
    found = survey(shapes, include_head=args.quantize_lm_head)
    linears, coverage = _take_part(args, found)
    schemes = _schemes(args, linears)
    slabs = args.granularity == "slab"
    fuse = args.fuse or (slabs and not args.free_slabs)
    units = make_units(linears, fuse, args.per_expert, by_input=slabs)
    if slabs:
        slab_width([*schemes, *(scheme for _, scheme in keep)])
    for pattern, _ in keep:
        match_units(units, pattern)
    own = NO_CODES
    if source.quantization and not args.dry_run:
        own = OwnCodes.find(source.weights, linears)
    run = Run(args, schemes, keep, source, shapes, linears, units, coverage, own)
    if args.target:
        _check_target(run)
    return run


def _schemes(args: argparse.Namespace, linears: Sequence[LinearInfo]) -> list[Scheme]:
    """What to choose from: as asked for, or measured, or as the target holds it."""
    if args.schemes is None and args.scores is not None:
        args.schemes = ",".join(Scores.read(args.scores).schemes)
    if args.schemes is None:
        target = TARGETS[args.target] if args.target else None
        args.schemes = ",".join(default_schemes(target, linears))
    modes = args.weight_scale_mode, args.act_scale_mode
    parsed = [parse_scheme(name, *modes) for name in args.schemes.split(",")]
    return list({s.name: s for s in parsed}.values())


def _take_part(args: argparse.Namespace, found: Survey) -> tuple[list[LinearInfo], Coverage]:
    """The linears that the budget is for. Raises UsageError where that is not what is asked for."""
    if args.quantize_lm_head and all(info.block is not None for info in found.linears):
        raise UsageError(
            "--quantize-lm-head needs a head that is a plain nn.Linear: got one that does more"
        )
    left = [n for one in found.left for n in (one.name, one.name.rpartition(".")[0])]
    linears = ignore(found.linears, args.ignore, left)
    coverage = Coverage(found, args.ignore)
    if not (args.dry_run or args.allow_partial or args.plan):
        coverage.check("a budget")
    if args.rotate == "ffn" and not any(info.ffn_output for info in linears):
        leaves = ", ".join(dict.fromkeys(i.name.rpartition(".")[2] for i in linears))
        raise UsageError(
            "--rotate ffn rotates what the last linear of an FFN reads, made number by number by "
            f"the linears before it: got none among {leaves}"
        )
    return linears, coverage


def _check_target(run: Run) -> None:
    """Whatever is chosen, the target can hold. Raises UsageError that names what it cannot."""
    check_layout(run.shapes, run.linears, run.args.target)
    if run.args.plan is not None:
        given_plan(run)
        return
    target, options = TARGETS[run.args.target], unit_options(run.units, run.schemes, run.keep)
    kept = {scheme.name: f"--ignore '{pattern}' instead" for pattern, scheme in run.keep}
    instead = kept | dict.fromkeys((s.name for s in run.schemes), advice(target, run.linears))
    check_together(target, run.all_schemes)
    for scheme in [*run.schemes, *(scheme for _, scheme in run.keep)]:
        open_to = [u for u, of in zip(run.units, options, strict=True) if scheme in of]
        linears = [info for unit in open_to for info in unit.linears]
        try:
            fit(target, linears, dict.fromkeys((info.name for info in linears), scheme))
        except UsageError as error:
            raise UsageError(f"{error}; try {instead[scheme.name]}") from None


def given_plan(run: Run) -> Plan:
    """The plan of --plan. Raises UsageError where --target cannot hold it."""
    plan = Plan.read(run.args.plan, run.linears)
    if run.args.target:
        target = TARGETS[run.args.target]
        fit(target, run.linears, plan.assignment)
        groups = [[i.name for i in unit.linears] for unit in make_units(run.linears, fuse=True)]
        check_fused(target, groups, plan.assignment)
    return plan


@dataclass
class Text:
    """What to calibrate with, to choose by, and to judge by; any may be empty.

    `notes` are lines to tell of it.
    """

    calibration: Sequences
    gate: Sequences
    held_out: Sequences
    notes: list[str] = field(default_factory=list)


def calibrate(run: Run, tokenizer: Any) -> Text:
    """The run's text: three parts that share no token."""
    args = run.args
    prefix = prefix_tokens(tokenizer) if args.bos else ()
    gate = args.gate if is_gated(args) or args.diagnose else 0
    count = args.nsamples if _calibrates(args) or gate else 0
    if args.diagnose and count < 2:
        raise UsageError(f"--diagnose halves the calibration text: got {count} sequence")
    is_first = not (count or args.scores or args.plan)  # text that nothing else goes through
    seen = 0 if is_first else max(args.nsamples, _seen(args, len(prefix)))
    held_count = 0 if args.solve_only else args.eval_nsamples
    notes: list[str] = []
    if args.dataset is None and args.eval_dataset is None and held_count:
        notes.append(f"judged on {PYTHON_TEXT}, for want of other text (--dataset)")
        if tokenizer is None:
            notes, held_count = ["not judged: there is no --dataset, and no tokenizer"], 0
    first, held_out = _first_and_held_out(
        run, tokenizer, prefix, seen + gate if gate else count, seen + gate, held_count
    )
    text = Text(first[:count], first[seen : seen + gate], held_out, notes)
    settle_correction(run, text)
    return text


def settle_correction(run: Run, text: Text) -> None:
    """Set --correction where it is not given: with little text, it follows this too closely."""
    args, tokens = run.args, text.calibration.ids.numel()
    widest = max(info.in_features for info in run.linears)
    is_short = tokens < ENOUGH_TOKENS * widest
    compensates = args.rounding == "gptq" and not args.solve_only
    if args.correction is None:
        is_judged = is_gated(args)  # against no correction
        args.correction = 0.0 if is_short and not is_judged else CORRECTION
        what = "" if is_judged else "so that --correction is 0"
    else:
        what = "which --correction follows closely" if args.correction else ""
    if is_short and compensates:
        text.notes.append(
            f"the text is short for gptq: {tokens:,} tokens, and inputs of {widest:,} columns want "
            f"{ENOUGH_TOKENS * widest:,}{', ' * bool(what)}{what}; more --nsamples round better"
        )


def text_read(args: argparse.Namespace) -> str:
    """The text that `calibrate` reads, for people."""
    judges = args.eval_nsamples and not args.solve_only
    reads_first = _calibrates(args) or is_gated(args) or args.diagnose
    if args.demo:
        return "its own text"
    found = [args.dataset or PYTHON_TEXT] * bool(reads_first or (judges and not args.eval_dataset))
    found += [args.eval_dataset] * bool(judges and args.eval_dataset)
    return ", ".join(found) or "no text is needed"


def is_gated(args: argparse.Namespace) -> bool:
    """Whether several plans are compared: not one that is given, or asked for by its strategy."""
    return bool(args.gate and not args.plan and not args.solve_only and args.strategy == "optimal")


def _calibrates(args: argparse.Namespace) -> bool:
    """Whether anything is measured, or rounded, with calibration text."""
    rounds = args.rounding == "gptq" or args.tune or args.distill
    is_blind = args.scores or args.plan or args.method == "weight"
    measures = not is_blind or args.diagnose or args.refine
    return bool(measures or (rounds and not args.solve_only))


def _seen(args: argparse.Namespace, prefix: int) -> int:
    """Sequences at the head of the dataset, `prefix` tokens of each its prefix, that --scores saw.

    At least so many, where theirs were of another length.
    """
    if args.scores is None:
        return 0
    used = Scores.read(args.scores).data["calibration"]
    count, length = int(used["nsamples"]), int(used["seqlen"])
    text = args.seqlen - prefix
    return count if length == args.seqlen or text < 1 else -(-count * length // text)


def _first_and_held_out(
    run: Run, tokenizer: Any, prefix: tuple[int, ...], count: int, before: int, held_count: int
) -> tuple[Sequences, Sequences]:
    """The first `count` sequences, and `held_count` others; none where 0 are needed.

    The others are of --eval-dataset, or come after the first `before`.
    """
    args, vocab = run.args, run.source.config.get_text_config().vocab_size
    is_bundled = args.dataset is None and args.eval_dataset is None and held_count
    if args.demo or is_bundled:  # the latter where nothing calibrates
        return _demo_sequences(args, tokenizer, vocab, prefix, count, held_count)
    sizes = args.seqlen, prefix
    if args.eval_dataset is not None or not held_count:
        before = count
    first = held_out = Sequences.none(*sizes)
    after = held_count if args.eval_dataset is None else 0
    if count or after:
        total = before + after
        pool = read_sequences(args.dataset, tokenizer, vocab, total, *sizes)
        first, held_out = split(pool, before, after)
    if args.eval_dataset is not None and held_count:
        pool = read_sequences(args.eval_dataset, tokenizer, vocab, held_count, *sizes)
        held_out = split(pool, 0, held_count)[1]
    return first, held_out


def _demo_sequences(
    args: argparse.Namespace,
    tokenizer: Any,
    vocab: int,
    prefix: tuple[int, ...],
    count: int,
    held_count: int,
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
        cut(tokenize(tokenizer, part), args.seqlen, name, vocab, prefix)
        for part, name in ((text, "the standard library"), (held_out, "its held-out modules"))
    ]
    return split(pools[0], count, 0)[0], split(pools[1], 0, held_count)[1]


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
        if info.ffn_output:
            order = arrangements[info.name].order if info.name in arrangements else None
            arrangements[info.name] = Arrangement(order, rotated=True)
    return arrangements


def _input(info: LinearInfo) -> str:
    """What a linear reads, told apart as far as orders of columns need it."""
    return (
        info.name if info.is_expert and info.ffn_output else ""
    )  # an expert's intermediate is its own


def measure(run: Run, model: CausalLM, sequences: Sequences, sha256: str) -> Scores:
    """Read scores.json, or make it."""
    args = run.args
    if args.scores is not None:
        scores = Scores.read(args.scores)
        modes, prefix = run.scale_modes, sequences.prefix
        scores.check(args.scores, run.linears, run.all_schemes, modes, sha256, prefix)
        if args.rotate == "ffn" and not any(scores.rotated(i.name) for i in run.linears):
            raise UsageError(f"{args.scores} was measured without --rotate ffn: measure again")
        return scores
    dtype = gradient_dtype(run.source.dtype, args.device)
    streamed = StreamedModel(model, dtype, args.device)
    arranged = _arrangements(run, streamed, sequences)
    return score(run, streamed, sequences, args.method, arranged, sha256)


def score(
    run: Run,
    model: StreamedModel,
    sequences: Sequences,
    method: str,
    arranged: dict[str, Arrangement],
    sha256: str,
) -> Scores:
    """Scores of every scheme on every linear, its columns arranged."""
    args = run.args
    options = method, args.batch_size, args.seed, arranged
    slabs = measure_sensitivity(model, run.linears, run.all_schemes, sequences.ids, *options)
    described = {**sequences.describe(), "batch_size": args.batch_size, "seed": args.seed}
    for linear, scores in slabs.items():
        free = [s.name for s in run.all_schemes if run.own.is_free(linear, s)]
        scores |= {name: [0.0] * len(scores[name]) for name in free}
    name = {"name": last_part(run.source.name), "sha256": sha256}
    return Scores.build(slabs, run.linears, method, run.scale_modes, name, described, arranged)


@dataclass(frozen=True)
class Solved:
    """A plan, and the knapsack that it is an allocation of."""

    problem: Problem
    allocation: Allocation
    plan: Plan


@dataclass
class Planned:
    """The plan that was asked for, first, and others of the same size to compare it with.

    Without scores there is the plan that was given, and nothing else. `curve` has the rows of
    `curve.rows`, `found` what report.json says of the search and of `findings.diagnose`, and
    `rounded` the candidate that the search has ended with, its weights rounded.
    """

    plans: dict[str, Plan]
    scores: Scores | None = None
    solved: dict[str, Solved] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    rounded: Candidate | None = None


def make_problem(run: Run, scores: Scores, slabs: bool, strategy: str = "optimal") -> Problem:
    """The knapsack; of strategies that give units the same option, all units have the same."""
    options = unit_options(run.units, run.schemes, run.keep)
    if strategy == "optimal" and not slabs:
        options = run.own.offer(run.units, options, run.own_schemes)
    return Problem.build(run.units, options, scores, run.args.ignore_scale_bits, slabs)


def solve(run: Run, problem: Problem, budget: Budget, strategy: str) -> Solved:
    """A plan within the budget."""
    args = run.args

    def solved(allocation: Allocation) -> Solved:
        return Solved(problem, allocation, problem.plan(allocation, strategy, budget))

    if args.size is None:
        return solved(problem.allocate(budget, strategy, args.seed))
    cheapest = solved(problem.cheapest())
    least = run.predicted_bytes(cheapest.plan.assignment)
    fixed = least - cheapest.allocation.cost // 8
    found = solved(problem.allocate(budget, strategy, args.seed, fixed))
    while (excess := run.predicted_bytes(found.plan.assignment) - args.size) > 0:
        fixed += excess  # the header's length depends a little on the plan
        try:
            found = solved(problem.allocate(budget, strategy, args.seed, fixed))
        except UsageError:
            if least > args.size or strategy == "uniform":
                raise
            return cheapest
    return found


def budget_of(args: argparse.Namespace) -> Budget:
    """The one that is asked for, where it is not to be searched."""
    return Budget(args.avg_bits, args.size, args.ignore_scale_bits)


def make_plans(run: Run, model: CausalLM, scores: Scores, text: Text) -> Planned:
    """Solve within the budget, or within the smallest one that meets --max-kl."""
    args, found, rounded = run.args, {}, None
    problem = make_problem(run, scores, args.granularity == "slab", args.strategy)
    if args.max_kl is None:
        budget = budget_of(args)
    else:
        budget, found["search"], rounded = _smallest_budget(run, model, problem, text)
    solved = _of_one_size(run, scores, problem, budget)
    plans = {name: entry.plan for name, entry in solved.items()}
    return Planned(plans, scores, solved, found=found, rounded=rounded)


def _of_one_size(run: Run, scores: Scores, problem: Problem, budget: Budget) -> dict[str, Solved]:
    slabs = run.args.granularity == "slab"
    layers = make_problem(run, scores, False) if slabs or run.own.formats else problem
    alike = make_problem(run, scores, False, "uniform") if run.own.formats else layers
    name = "slabs" if slabs and run.args.strategy == "optimal" else run.args.strategy
    plans = {name: solve(run, problem, budget, run.args.strategy)}
    for strategy in ("optimal", "uniform", "head", "tail"):
        if strategy not in plans:
            with suppress(UsageError):  # no single scheme may fit
                of = layers if strategy == "optimal" else alike
                plans[strategy] = solve(run, of, budget, strategy)
    return plans


def _smallest_budget(
    run: Run, model: CausalLM, problem: Problem, text: Text
) -> tuple[Budget, dict[str, Any], Candidate | None]:
    """For --max-kl: the budget of the smallest plan found, `search` of report.json, and that plan
    with its rounded weights.
    """
    args, streamed = run.args, StreamedModel(model, device=run.args.device)
    known: dict[tuple[int, ...], float] = {}  # budgets close to each other may buy the same plan
    best: tuple[int, Candidate] | None = None  # the smallest budget that met the limit

    def measured(bits: int) -> float:
        nonlocal best
        solved = solve(run, problem, Budget(total_bits=bits), "optimal")
        choice = solved.allocation.choice
        if choice not in known:
            tried = f"proposal {len(known) + 1}, {bits / problem.elements:.3f} bits"
            candidate = Candidate("optimal", solved.plan, args.correction)
            ids, how = text.calibration.ids, (args.batch_size, text.gate.judged_from, run.own)
            texts = args.rounding, ids, text.gate.ids
            with part(tried):
                rounded, kls = judge(streamed, run.linears, candidate, *texts, *how)
            known[choice] = float(kls.mean())
            if known[choice] <= args.max_kl and (best is None or bits < best[0]):
                best = bits, replace(candidate, learned=rounded)
        kl = known[choice]
        say(f"      {bits / problem.elements:.4f} bits per weight: KL {kl:.4f}")
        return kl

    tolerance = max(1, round(SEARCH_TOLERANCE * problem.elements))
    found = smallest(frontier(problem.items), measured, args.max_kl, tolerance)
    rows = [{"avg_bits": b / problem.elements, "kl": kl} for b, kl in found.measured.items()]
    search = {"max_kl": args.max_kl, "kl": found.kl, "tolerance": SEARCH_TOLERANCE}
    budget = Budget(total_bits=found.budget, max_kl=args.max_kl)
    return budget, {**search, "measured": rows}, best[1] if best else None


def refine_plan(run: Run, model: CausalLM, planned: Planned, text: Text) -> None:
    """Put a better plan first, if measuring finds one; `refine` of report.json says how."""
    args, start = run.args, planned.solved["optimal"]
    problem, budget = start.problem, budget_of(args)

    def chosen(items: Sequence[Item]) -> Options:
        measured = replace(problem, items=items)
        return solve(run, measured, budget, "optimal").allocation.choice

    streamed = StreamedModel(model, device=args.device)
    ids, how = text.calibration.ids, (args.batch_size, text.calibration.judged_from)
    meters = halves(streamed, problem, ids, *how)
    found = refine(problem.items, start.allocation.choice, *meters, chosen, args.refine)
    planned.found["refine"] = {"nsamples": [len(m.ids) for m in meters], "rounds": found.rounds}
    if found.plan == start.allocation.choice:
        return
    name, bound = "optimal, refined", start.allocation.lower_bound
    allocation = Allocation(found.plan, *total(problem.items, found.plan), bound)
    plan = problem.plan(allocation, name, budget)
    planned.solved = {name: Solved(problem, allocation, plan), **planned.solved}
    planned.plans = {name: plan, **planned.plans}


def _tuned(run: Run, name: str, plan: Plan, text: Text) -> Candidate:
    """A plan rounded by auto-round, from a copy of the model."""
    from ..rounding.signround import tune

    args, source = run.args, run.source
    ids, sizes = text.calibration.ids, (args.tune, args.batch_size, args.device)
    model, tokenizer = source.load(), source.tokenizer()
    rounded = tune(model, tokenizer, run.linears, plan.assignment, ids, *sizes)
    rounded = dict(rounded) | run.own.rounded(plan.assignment)
    how = {"method": "signround", "iterations": args.tune}
    return Candidate(f"{name}, tuned", plan, 0.0, rounded, how)


def _distilled(run: Run, model: CausalLM, name: str, plan: Plan, text: Text) -> Candidate:
    """A plan whose rounding is learned from the model, from where `--rounding` ends."""
    args, ids, recipes = run.args, text.calibration.ids, plan.assignment
    streamed = StreamedModel(model, device=args.device)
    own = run.own.rounded(recipes)
    rounded = round_model(streamed, run.linears, recipes, args.rounding, ids, args.correction, own)
    differentiated = StreamedModel(
        model, gradient_dtype(run.source.dtype, args.device), args.device
    )
    sizes = args.distill, args.batch_size, args.seed
    prefix = text.calibration.prefix
    enough = enough_text(run.source.load().to(args.device), ids, *sizes, prefix)
    learned = distill(differentiated, run.linears, recipes, rounded, enough, *sizes)
    learned = dict(learned) | own
    how = {"distilled": args.distill, "written_sequences": len(enough) - len(ids)}
    return Candidate(f"{name}, distilled", plan, args.correction, learned, how)


def round_plans(
    run: Run,
    model: CausalLM,
    plans: dict[str, Plan],
    text: Text,
    known: Candidate | None = None,
) -> Choice:
    """The plan that ships, with its packed weights; what is `known` is not rounded again."""
    args, streamed = run.args, StreamedModel(model, device=run.args.device)
    (name, plan), *_ = plans.items()
    learned = [_tuned(run, name, plan, text)] if args.tune else []
    learned += [_distilled(run, model, name, plan, text)] if args.distill else []
    if len(plans) > 1:
        texts = args.rounding, text.calibration.ids, text.gate.ids
        found = learned + candidates(plans, args.rounding, args.correction)
        if known is not None:
            same = known.plan.assignment, known.share
            plain = [(c.plan.assignment, c.share) == same and not c.how for c in found]
            found = [
                replace(c, learned=known.learned) if is_known else c
                for c, is_known in zip(found, plain, strict=True)
            ]
        how = args.batch_size, text.gate.judged_from, run.own
        return choose(streamed, run.linears, found, *texts, *how)
    for candidate in learned[-1:]:
        return Choice(candidate, candidate.learned or {}, [])
    rounded = round_model(
        streamed,
        run.linears,
        plan.assignment,
        args.rounding,
        text.calibration.ids,
        args.correction,
        run.own.rounded(plan.assignment),
    )
    return Choice(Candidate(name, plan, args.correction), rounded, [])
