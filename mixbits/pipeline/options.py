"""The command line of `python -m mixbits.quantize`: its options, their defaults, their checks."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from pathlib import Path

from ..command import Parser
from ..errors import UsageError
from ..export.targets import DEFAULT_SCHEMES, TARGETS
from ..formats.schemes import SCALE_MODES, SCHEME_NAMES, ScaleMode, Scheme, parse_scheme
from ..planning.allocate import STRATEGIES

METHODS = ("fisher", "deltaloss", "weight")  # as in measuring.sensitivity, which imports torch
ROUNDINGS = ("rtn", "search", "gptq")  # as in mixbits.rounding.gptq
CORRECTION = 0.5  # of errors, where there is text enough
DISTILL_STEPS = 300
REFINE_ROUNDS = 4  # by the last ones little is gained
DEFAULT_BITS = 4.5
LEAST_BYTES = 10_000  # of a model's files; a --size below that has lost its unit
# What --effort presets, where nothing else is asked for.
EFFORTS: dict[str, dict[str, object]] = {
    "quick": {
        "method": "weight",
        "rounding": "search",
        "gate": 0,
        "eval_nsamples": 8,
        "seqlen": 128,
        "dataset": None,
    },
    "normal": {},
}
DEFAULT_DATASET = "NeelNanda/pile-10k"  # AutoRound's default
DEMO_OUT = Path("mixbits-demo")

_EXAMPLES = f"""\
examples:
  python -m mixbits.quantize --demo
      everything in one go, on the bundled model: nothing is downloaded
  python -m mixbits.quantize ./Llama-3.1-8B --effort quick
      a first look in minutes, without any text
  python -m mixbits.quantize ./Llama-3.1-8B --avg-bits 4.5 --dataset text.txt --out llama-4.5
      4 and 8 bits mixed at 4.5 bits per weight, scales counted
  python -m mixbits.quantize ./Llama-3.1-8B --size 4.2GB --schemes W2A16,W4A16,W8A16 \\
      --scores llama-4.5/scores.json --solve-only --out plans
      another budget; works when the scores hold these schemes
  python -m mixbits.quantize ./Llama-3.1-8B --avg-bits 5.5 --keep '*.down_proj=W8A16G64' --fuse \\
      --dataset text.jsonl --tasks lambada_openai,hellaswag,piqa,winogrande,mmlu --out llama-5.5
  python -m mixbits.quantize ./Llama-3.1-8B --plan llama-5.5/plan.json --eval-nsamples 0 \\
      --rounding search --out llama-edited
      a plan of your own; unscored, and rounded without error compensation, it needs no text
  python -m mixbits.quantize ./Llama-3.1-8B --max-kl 0.05 --granularity slab --dataset text.txt \\
      --curve --diagnose --out llama-good
      the smallest model of that quality, what every budget buys, and whether to trust it all

schemes: {SCHEME_NAMES}
exit codes: 0 done, 2 wrong usage or input, 1 failure
"""


def _size(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*(|k|M|G|T)(i?)(B?)", text.strip())
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if match and not (match[2] or match[4]) and 0 < value < LEAST_BYTES:
        raise argparse.ArgumentTypeError(f"must have a unit: got {text!r} ({text.strip()}GB?)")
    if match is None or not value > 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 4.2GB or 800MiB: got {text!r}")
    return int(value * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1: got {text!r}")
    return value


def _bits(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 16:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 16: got {text!r}")
    return value


def _nats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0: got {text!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1: got {text!r}")
    return value


def parse_keep(text: str, modes: tuple[ScaleMode, ScaleMode]) -> tuple[str, Scheme]:
    """`PATTERN=SCHEME` of a `--keep` option."""
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"--keep must be PATTERN=SCHEME, such as '*.down_proj=W8A16G64': got {text!r}"
        )
    return pattern, parse_scheme(name, *modes)


def _input_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and output")
    group.add_argument("model", nargs="?", help="a model folder or a Hugging Face name")
    group.add_argument("--demo", action="store_true", help="use the bundled model and text")
    group.add_argument("--out", type=Path, help="output folder (default: <model>-<bits>)")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    group.add_argument("--fake", action="store_true", help="write a plain model, weights rounded")
    group.add_argument("--solve-only", action="store_true", help="stop at scores.json, plan.json")
    group.add_argument(
        "--dry-run", action="store_true", help="print shapes and sizes, write nothing"
    )
    group.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        default="normal",
        help="quick: a minute for a small model, without calibration text: --method weight, "
        "--rounding search, --gate 0, a short evaluation; what is given beside it wins",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget and plan")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--avg-bits", type=_bits, help="bits per weight of the linears")
    budget.add_argument("--size", type=_size, help="size of all weight files, such as 4.2GB")
    budget.add_argument(
        "--max-kl",
        type=_nats,
        metavar="NATS",
        help="the smallest model whose KL on the gate's text is at most this, in nats per token",
    )
    budget.add_argument("--plan", type=Path, help="apply this plan.json")
    group.add_argument(
        "--schemes",
        help=f"what to choose from ({','.join(DEFAULT_SCHEMES)}; with --target, what it holds; "
        "with --scores, what was measured)",
    )
    group.add_argument(
        "--ignore-scale-bits",
        action="store_true",
        help="let --avg-bits count elements only, as published tables do",
    )
    group.add_argument("--strategy", choices=STRATEGIES, default="optimal")
    group.add_argument(
        "--refine",
        type=_positive,
        nargs="?",
        const=REFINE_ROUNDS,
        metavar="ROUNDS",
        help="improve the plan by measured KL: on calibration text, with each unit in each other "
        f"scheme (at most {REFINE_ROUNDS} rounds, until nothing is better); whole linears only",
    )
    group.add_argument(
        "--target",
        choices=tuple(TARGETS),
        help="keep to what it can hold, for mixbits.export; vllm implies --fuse, auto-round "
        "--act-scale-mode floor",
    )
    group.add_argument("--fuse", action="store_true", help="one scheme for q/k/v, and for gate/up")
    group.add_argument("--per-expert", action="store_true", help="free each expert's linears")
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN=SCHEME",
        help="fix the linears that match a wildcard, or a regex after re: (repeatable)",
    )
    group.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave linears that match as they are, outside the budget (repeatable)",
    )
    group.add_argument(
        "--allow-partial",
        action="store_true",
        help="go on where more than half of the decoder blocks' weights cannot be quantized",
    )
    group.add_argument("--quantize-lm-head", action="store_true", help="include the output head")
    group.add_argument(
        "--untie-head",
        action="store_true",
        help="let --quantize-lm-head store a tied head beside its embedding: larger files, a "
        "quicker last product",
    )
    for what, name, mode in (
        ("weights rounded to nearest", "--weight-scale-mode", "floor"),
        ("activations", "--act-scale-mode", "even"),
    ):
        group.add_argument(
            name, choices=SCALE_MODES, default=mode, help=f"MX scales of {what} (%(default)s)"
        )
    group.add_argument(
        "--granularity",
        choices=("layer", "slab"),
        default="layer",
        help="one scheme for a linear, or one for each run of its input columns",
    )
    group.add_argument(
        "--free-slabs",
        action="store_true",
        help="slabs of q, k, v, and of gate and up, need not agree",
    )
    group.add_argument(
        "--rotate",
        choices=("none", "ffn"),
        default="none",
        help="ffn: spread outliers of down_proj's input over 32 columns by a Hadamard matrix",
    )


def _rounding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rounding")
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="gptq",
        help="to nearest; with searched scales; with error compensation (%(default)s)",
    )
    group.add_argument(
        "--correction",
        type=_share,
        help="share of the errors before a linear that gptq makes up for, 0 to 1 (default: "
        f"{CORRECTION}, or 0 where the text is short)",
    )
    group.add_argument(
        "--tune",
        type=_positive,
        nargs="?",
        const=200,
        metavar="STEPS",
        help="let auto-round learn the rounding of the plan (SignRound, 200 steps for a block); "
        "with the gate, the better of the two ships",
    )
    group.add_argument(
        "--distill",
        type=_positive,
        nargs="?",
        const=DISTILL_STEPS,
        metavar="STEPS",
        help="let the whole quantized model learn its rounding from the original, on text that the "
        f"original writes ({DISTILL_STEPS} steps of --batch-size sequences); with the gate, the "
        "better ships",
    )
    group.add_argument(
        "--gate",
        type=int,
        default=32,
        help="held-out sequences on which candidate plans are compared, 0: none (%(default)s)",
    )


def _report_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("report")
    group.add_argument(
        "--curve",
        type=int,
        nargs="?",
        const=33,
        metavar="POINTS",
        help="write curve.csv and curve.svg: what every budget buys (33 points)",
    )
    group.add_argument(
        "--diagnose",
        action="store_true",
        help="quantize units one by one to test the predictions, and halve the calibration text "
        "to test the plan",
    )


def _measure_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration and sensitivity")
    group.add_argument(
        "--dataset",
        default=DEFAULT_DATASET,
        help="text, .jsonl (text, messages or conversations), .npy or .json of token ids, or a "
        "dataset NAME[:config=C][:split=S][:column=K] of the hub (%(default)s)",
    )
    group.add_argument("--nsamples", type=_positive, default=64, help="sequences (%(default)s)")
    group.add_argument("--seqlen", type=_positive, default=256, help="tokens each (%(default)s)")
    group.add_argument("--batch-size", type=_positive, default=8, help="sequences (%(default)s)")
    group.add_argument(
        "--seed", type=int, default=0, help="of sampled labels and text (%(default)s)"
    )
    group.add_argument(
        "--no-bos",
        dest="bos",
        action="store_false",
        help="sequences begin amid a text, without what the tokenizer puts before one",
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        default="fisher",
        help="estimated KL; first order of the loss, as AutoScheme; relative error of weights, "
        "which needs no text (%(default)s)",
    )
    group.add_argument("--scores", type=Path, help="reuse this scores.json")


def _run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation and running")
    group.add_argument("--eval-dataset", help="held-out text (default: what follows in --dataset)")
    group.add_argument(
        "--eval-nsamples", type=int, default=64, help="held-out sequences, 0: none (%(default)s)"
    )
    group.add_argument("--tasks", help="lm-eval tasks, separated by commas")
    group.add_argument("--limit", type=_positive, help="documents per task")
    group.add_argument("--include-path", help="folder with lm-eval tasks of your own")
    group.add_argument(
        "--add-bos-token",
        action=argparse.BooleanOptionalAction,
        help="for lm-eval: begin prompts as the tokenizer does (default: yes, unless --no-bos)",
    )
    group.add_argument("--eval-original", action="store_true", help="run the tasks on it as well")
    group.add_argument("--prompt", help="sample text after this at the end")
    group.add_argument("--backend", help="force cuda, triton, cpu or reference kernels")
    group.add_argument("--device", help="where to compute (default: cuda where there is one)")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m mixbits.quantize",
        description="Quantize a language model to mixed precision, pack it, and score it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in (
        _input_options,
        _plan_options,
        _rounding_options,
        _report_options,
        _measure_options,
        _run_options,
    ):
        add(parser)
    return parser


def _budget_name(args: argparse.Namespace) -> str:
    if args.plan:
        return "plan"
    if args.max_kl:
        return f"{args.max_kl:g}nats"
    return f"{args.size}B" if args.size else f"{args.avg_bits:g}bit"


def _demo_defaults(parser: argparse.ArgumentParser) -> None:
    from ..demo import MODEL_DIR

    parser.set_defaults(
        model=str(MODEL_DIR),
        out=DEMO_OUT,
        tasks="stdlib_next_line",
        eval_original=True,
        prompt="class Reader:\n    def __init__(self, stream):",
    )


def _uses_text(args: argparse.Namespace) -> bool:
    """Whether something beside measuring, and judging, goes through text."""
    others = args.gate, args.tune, args.distill, args.refine, args.diagnose
    return args.rounding == "gptq" or any(others)


def _check_measured(args: argparse.Namespace) -> None:
    """--max-kl, --refine, --diagnose, --curve: what they need, and what they cannot go with."""
    for name in ("max_kl", "diagnose"):
        if getattr(args, name) and not args.gate:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} measures on the gate's text: it cannot go with --gate 0")
    if args.max_kl and args.strategy != "optimal":
        raise UsageError(
            f"--max-kl searches among optimal plans: it cannot go with --strategy {args.strategy}"
        )
    if args.max_kl and args.solve_only:
        raise UsageError("--max-kl rounds and measures: it cannot go with --solve-only")
    if args.refine and args.max_kl:
        raise UsageError("--refine keeps to a budget, and --max-kl looks for one: not both")
    if args.refine and args.strategy != "optimal":
        raise UsageError(
            f"--refine improves the optimal plan: it cannot go with --strategy {args.strategy}"
        )
    if args.curve is not None and args.curve < 2:
        raise UsageError(f"--curve must be of at least 2 points: got {args.curve}")


def _apply_target(args: argparse.Namespace, default_mode: str) -> None:
    """What the engine that will run the model needs. Raises UsageError where more is asked for."""
    target = TARGETS[args.target]
    for name in ("granularity", "rotate"):
        if getattr(args, name) not in ("layer", "none"):
            raise UsageError(
                f"--target {target.name} cannot go with --{name} {getattr(args, name)}"
            )
    if args.per_expert and target.experts:
        raise UsageError(f"--target {target.name} cannot go with --per-expert: experts must agree")
    if target.act_scale_mode is not None:
        if args.act_scale_mode not in (default_mode, target.act_scale_mode):
            raise UsageError(
                f"--target {target.name} rounds activations in scale mode {target.act_scale_mode}: "
                f"got --act-scale-mode {args.act_scale_mode}"
            )
        args.act_scale_mode = target.act_scale_mode
    args.fuse = args.fuse or target.fuse


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check. Raises UsageError; `command` is what was typed."""
    parser = make_parser()
    first = parser.parse_known_args(argv)[0]
    parser.set_defaults(**EFFORTS[first.effort])
    if first.demo:
        _demo_defaults(parser)
    args = parser.parse_args(argv)
    if args.model is None:
        parser.error("MODEL is required: a model folder, a Hugging Face name, or --demo")
    for name in ("eval_nsamples", "gate"):
        if getattr(args, name) < 0:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 0: got {getattr(args, name)}")
    arranged = args.granularity == "slab" or args.rotate != "none"
    if arranged and args.method != "fisher":
        parser.error(f"--granularity slab and --rotate need --method fisher: got {args.method}")
    if args.free_slabs and args.granularity != "slab":
        parser.error("--free-slabs helps --granularity slab only")
    if args.tune and arranged:
        parser.error("--tune knows whole linears only: not --granularity slab, nor --rotate")
    if args.tune and args.distill and (not args.gate or args.plan):
        parser.error("--tune and --distill are two candidates: without the gate only one can ship")
    if args.refine and args.granularity == "slab":
        parser.error("--refine measures whole linears: not --granularity slab")
    if args.seqlen < 2:
        parser.error(f"--seqlen must be at least 2: got {args.seqlen}")
    if args.dataset is None and (args.method != "weight" or _uses_text(args)):
        args.dataset = DEFAULT_DATASET
    args.asks_budget = False
    if all(getattr(args, name) is None for name in ("avg_bits", "size", "plan", "max_kl")):
        args.avg_bits = DEFAULT_BITS
    else:
        args.asks_budget = True
    if args.untie_head and not args.quantize_lm_head:
        raise UsageError("--untie-head is for --quantize-lm-head")
    if args.ignore_scale_bits and args.avg_bits is None:
        raise UsageError("--ignore-scale-bits counts for --avg-bits only")
    making = ("strategy", "scores", "keep", "ignore", "fuse", "per_expert", "granularity", "rotate")
    for option in (*making, "refine", "curve", "diagnose") if args.plan else ():
        if getattr(args, option) != parser.get_default(option):
            name = option.replace("_", "-")
            raise UsageError(f"--{name} helps to make a plan: it cannot go with --plan")
    _check_measured(args)
    if args.target:
        _apply_target(args, parser.get_default("act_scale_mode"))
    if args.out is None:
        args.out = Path(f"{Path(args.model).resolve().name}-mixbits-{_budget_name(args)}")
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", "-m", "mixbits.quantize", *words])
    return args
