"""What a run is asked for: one frozen structure, for the command line and for Python alike.

The fields stand in groups, one class each, with their defaults, kinds and the words that `--help`
says of them; `Settings` has them all. `rules.settled` makes it of what was given.

Nothing here imports torch: a wrong option should be told at once.
"""

# ruff: noqa: RUF009 - `_option` makes fields of dataclasses
from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UsageError
from ..export.targets import TARGETS
from ..formats.menus import MENUS, default_menu
from ..formats.schemes import SCALE_MODES, ScaleMode, Scheme, parse_scheme
from ..planning.allocate import STRATEGIES
from ..rounding.methods import CORRECTION
from ..rounding.methods import METHODS as ROUNDINGS
from .kinds import (
    bits,
    datasets,
    names,
    nats,
    path,
    positive,
    scheme_names,
    share,
    size,
    whole,
    words,
)

METHODS = ("fisher", "deltaloss", "weight")  # as in measuring.sensitivity, which imports torch
BATCH_SIZE = 8  # sequences
DISTILL_STEPS = 300
TUNE_STEPS = 200
REFINE_ROUNDS = 4  # by the last ones little is gained
CURVE_POINTS = 33
DEFAULT_BITS = 4.5
DEFAULT_DATASET = "NeelNanda/pile-10k"  # AutoRound's default
DEMO_OUT = Path("mixbits-demo")
# What --effort presets, where nothing else is asked for.
EFFORTS: dict[str, dict[str, Any]] = {
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


def _option(default: Any, help: str | None = None, **how: Any) -> Any:
    """A field with what `options.make_parser` and `rules.settled` make of it.

    kind     what parses its text, and refuses with a sentence
    choices  the values there are
    const    the value of the option without one
    one_of   the name of a set of options of which one may be given
    off      the option that turns it off, where it is on
    is_positional, is_repeatable, is_tristate, metavar  as they say
    """
    return field(default=default, metadata={"help": help, **how})


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """model and output"""

    model: str | None = _option(None, "a model folder or a Hugging Face name", is_positional=True)
    demo: bool = _option(False, "use the bundled model and text")
    out: Path | None = _option(None, "output folder (default: <model>-<bits>)", kind=path)
    overwrite: bool = _option(False, "replace an earlier output")
    fake: bool = _option(False, "write a plain model, weights rounded")
    solve_only: bool = _option(False, "stop at scores.json, plan.json")
    dry_run: bool = _option(False, "print shapes and sizes, write nothing")
    effort: str = _option(
        "normal",
        "quick: a minute for a small model, without calibration text: --method weight, "
        "--rounding search, --gate 0, a short evaluation; what is given beside it wins",
        choices=tuple(EFFORTS),
    )
    trust_remote_code: bool = _option(False, "run the model's own code")


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """budget and plan"""

    avg_bits: float | None = _option(
        None, "bits per weight of the linears", kind=bits, one_of="budget"
    )
    size: int | None = _option(
        None, "size of all weight files, such as 4.2GB", kind=size, one_of="budget"
    )
    max_kl: float | None = _option(
        None,
        "the smallest model whose KL on the gate's text is at most this, in nats per token",
        kind=nats,
        metavar="NATS",
        one_of="budget",
    )
    plan: Path | None = _option(None, "apply this plan.json", kind=path, one_of="budget")
    schemes: tuple[str, ...] | None = _option(
        None,
        f"what to choose from: schemes, or a menu of them ({', '.join(MENUS)}: see mixbits.info "
        "--schemes) (default: the menu cpu, or portable for a GPU, slabs and --tune; with "
        "--target, what it holds; with --scores, what was measured)",
        kind=scheme_names,
    )
    ignore_scale_bits: bool = _option(
        False, "let --avg-bits count elements only, as published tables do"
    )
    strategy: str = _option("optimal", choices=STRATEGIES)
    refine: int | None = _option(
        None,
        "improve the plan by measured KL: on calibration text, with each unit in each other "
        f"scheme (at most {REFINE_ROUNDS} rounds, until nothing is better); whole linears only",
        kind=positive,
        const=REFINE_ROUNDS,
        metavar="ROUNDS",
    )
    target: str | None = _option(
        None,
        "keep to what it can hold, for mixbits.export; vllm implies --fuse, auto-round "
        "--act-scale-mode floor",
        choices=tuple(TARGETS),
    )
    fuse: bool = _option(False, "one scheme for q/k/v, and for gate/up")
    per_expert: bool = _option(False, "free each expert's linears")
    keep: tuple[str, ...] = _option(
        (),
        "fix the linears that match a wildcard, or a regex after re: (repeatable)",
        kind=words,
        is_repeatable=True,
        metavar="PATTERN=SCHEME",
    )
    ignore: tuple[str, ...] = _option(
        (),
        "leave linears that match as they are, outside the budget (repeatable)",
        kind=words,
        is_repeatable=True,
        metavar="PATTERN",
    )
    allow_partial: bool = _option(
        False, "go on where more than half of the decoder blocks' weights cannot be quantized"
    )
    quantize_lm_head: bool = _option(False, "include the output head")
    untie_head: bool = _option(
        False,
        "let --quantize-lm-head store a tied head beside its embedding: larger files, a "
        "quicker last product",
    )
    weight_scale_mode: ScaleMode = _option(
        "floor", "MX scales of weights rounded to nearest (%(default)s)", choices=SCALE_MODES
    )
    act_scale_mode: ScaleMode = _option(
        "even", "MX scales of activations (%(default)s)", choices=SCALE_MODES
    )
    granularity: str = _option(
        "layer",
        "one scheme for a linear, or one for each run of its input columns",
        choices=("layer", "slab"),
    )
    free_slabs: bool = _option(False, "slabs of q, k, v, and of gate and up, need not agree")
    rotate: str | None = _option(
        None,
        "spread outliers over 32 columns by a Hadamard matrix, in the inputs of all linears or "
        "of the FFN's last, while the model runs; fold: in the weights, for any engine, but for "
        "the FFN's last (default: all, where every scheme rounds activations and not all to "
        "NVFP4; none with --target, --tune, and methods but fisher)",
        choices=("none", "ffn", "all", "fold"),
    )

    @property
    def scale_modes(self) -> tuple[ScaleMode, ScaleMode]:
        """Of weights, and of activations."""
        return self.weight_scale_mode, self.act_scale_mode

    @property
    def slabs(self) -> bool:
        return self.granularity == "slab"

    def kept(self) -> list[tuple[str, Scheme]]:
        """Patterns of linears, and the scheme that they are kept in."""
        return [parse_keep(text, self.scale_modes) for text in self.keep]


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """rounding"""

    rounding: str = _option(
        "gptq",
        "to nearest; with searched scales; with error compensation (%(default)s)",
        choices=ROUNDINGS,
    )
    correction: float | None = _option(
        None,
        "share of the errors before a linear that gptq makes up for, 0 to 1 (default: "
        f"{CORRECTION}, or 0 where the text is short)",
        kind=share,
    )
    tune: int | None = _option(
        None,
        "let auto-round learn the rounding of the plan (SignRound, 200 steps for a block); "
        "with the gate, the better of the two ships",
        kind=positive,
        const=TUNE_STEPS,
        metavar="STEPS",
    )
    distill: int | None = _option(
        None,
        "let the whole quantized model learn its rounding from the original, on text that the "
        f"original writes ({DISTILL_STEPS} steps of --batch-size sequences); with the gate, the "
        "better ships",
        kind=positive,
        const=DISTILL_STEPS,
        metavar="STEPS",
    )
    gate: int = _option(
        32,
        "held-out sequences on which candidate plans are compared, 0: none (%(default)s)",
        kind=whole,
    )


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """report"""

    curve: int | None = _option(
        None,
        "write curve.csv and curve.svg: what every budget buys (33 points)",
        kind=whole,
        const=CURVE_POINTS,
        metavar="POINTS",
    )
    diagnose: bool = _option(
        False,
        "quantize units one by one to test the predictions, and halve the calibration text "
        "to test the plan",
    )


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """calibration and sensitivity"""

    dataset: tuple[str, ...] | None = _option(
        (DEFAULT_DATASET,),
        "text, .jsonl (text, messages or conversations), .npy or .json of token ids, or a "
        f"dataset NAME[:config=C][:split=S][:column=K] of the hub ({DEFAULT_DATASET}); repeated, "
        "sequences are taken from each in turn",
        kind=datasets,
        is_repeatable=True,
    )
    nsamples: int = _option(64, "sequences (%(default)s)", kind=positive)
    seqlen: int = _option(256, "tokens each (%(default)s)", kind=positive)
    batch_size: int = _option(BATCH_SIZE, "sequences (%(default)s)", kind=positive)
    seed: int = _option(0, "of sampled labels and text (%(default)s)", kind=whole)
    bos: bool = _option(
        True,
        "sequences begin amid a text, without what the tokenizer puts before one",
        off="--no-bos",
    )
    method: str = _option(
        "fisher",
        "estimated KL; first order of the loss, as AutoScheme; relative error of weights, "
        "which needs no text (%(default)s)",
        choices=METHODS,
    )
    scores: Path | None = _option(None, "reuse this scores.json", kind=path)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """evaluation and running"""

    eval_dataset: tuple[str, ...] | None = _option(
        None,
        "held-out text (default: what follows in --dataset; repeatable)",
        kind=datasets,
        is_repeatable=True,
    )
    eval_nsamples: int = _option(64, "held-out sequences, 0: none (%(default)s)", kind=whole)
    tasks: tuple[str, ...] = _option((), "lm-eval tasks, separated by commas", kind=names)
    limit: int | None = _option(None, "documents per task", kind=positive)
    include_path: str | None = _option(None, "folder with lm-eval tasks of your own")
    add_bos_token: bool | None = _option(
        None,
        "for lm-eval: begin prompts as the tokenizer does (default: yes, unless --no-bos)",
        is_tristate=True,
    )
    eval_original: bool = _option(False, "run the tasks on it as well")
    prompt: str | None = _option(None, "sample text after this at the end")
    backend: str | None = _option(None, "force cuda, triton, cpu or reference kernels")
    device: str | None = _option(None, "where to compute (default: cuda where there is one)")


GROUPS = (
    ModelSettings,
    BudgetSettings,
    RoundingSettings,
    ReportSettings,
    TextSettings,
    EvaluationSettings,
)


@dataclass(frozen=True, kw_only=True)
class Settings(
    ModelSettings,
    BudgetSettings,
    RoundingSettings,
    ReportSettings,
    TextSettings,
    EvaluationSettings,
):
    """All settings of a run; what each means is said by its field, and by `--help`.

    `asks_budget`  whether the budget was asked for, or is the default
    `command`      what was typed, or called: for report.json
    """

    asks_budget: bool = False
    command: str = ""

    UNSPELT: ClassVar = ("asks_budget", "command")  # no options

    @property
    def is_gated(self) -> bool:
        """Whether plans are compared: not one that is given, or asked for by its strategy."""
        return bool(
            self.gate and not self.plan and not self.solve_only and self.strategy == "optimal"
        )

    @property
    def calibrates(self) -> bool:
        """Whether anything is measured, or rounded, with calibration text."""
        rounds = self.rounding == "gptq" or self.tune or self.distill
        is_blind = self.scores or self.plan or self.method == "weight"
        measures = not is_blind or self.diagnose or self.refine
        return bool(measures or (rounds and not self.solve_only))

    @property
    def computes_on(self) -> str:
        """The device, as torch names it."""
        return self.device or "cpu"

    @property
    def default_menu(self) -> tuple[str, str]:
        """The menu for when no schemes are asked for, and why."""
        return default_menu(self.computes_on.startswith("cpu"), self.slabs or self.tune is not None)

    @property
    def folder(self) -> Path:
        """Where the output goes."""
        assert self.out is not None
        return self.out

    def comma(self, name: str) -> str:
        """Several words of a setting as the command line has them."""
        return ",".join(getattr(self, name) or ())


def spelt(name: str) -> str:
    """A setting as an option of the command line."""
    return "--" + name.replace("_", "-")


KNOWN: dict[str, Field[Any]] = {
    f.name: f for f in fields(Settings) if f.name not in Settings.UNSPELT
}


def parse_keep(text: str, modes: tuple[ScaleMode, ScaleMode]) -> tuple[str, Scheme]:
    """`PATTERN=SCHEME` of a `--keep` option."""
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"--keep must be PATTERN=SCHEME, such as '*.down_proj=W8A16G64': got {text!r}"
        )
    return pattern, parse_scheme(name, *modes)
