"""From what was given to `Settings`: presets, kinds, what cannot go together, and what follows.

`settled` is the one way to make them. Every sentence names options as the command line spells them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..export.targets import TARGETS
from .settings import DEFAULT_BITS, DEFAULT_DATASET, DEMO_OUT, EFFORTS, KNOWN, Settings, spelt


def settled(given: Mapping[str, Any], command: str = "") -> Settings:
    """From what was given, by name; None is as good as nothing.

    Raises UsageError for an unknown name, for a value that is none of its kind, and for settings
    that cannot go together.
    """
    given = {name: _checked(name, value) for name, value in given.items() if value is not None}
    preset = EFFORTS[given.get("effort", "normal")] | (_demo() if given.get("demo") else {})
    asked = Settings(**{**preset, **given}, command=command)
    check(asked)
    return _completed(asked)


def _demo() -> dict[str, Any]:
    from ..demo import MODEL_DIR

    return {
        "model": str(MODEL_DIR),
        "out": DEMO_OUT,
        "tasks": ("stdlib_next_line",),
        "eval_original": True,
        "prompt": "class Reader:\n    def __init__(self, stream):",
    }


def _checked(name: str, value: Any) -> Any:
    """A value of a setting, of its type. Raises UsageError as the command line does."""
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, 1)
        raise UsageError(f"there is no setting {name!r}{f' ({near[0]}?)' if near else ''}")
    how, default = KNOWN[name].metadata, KNOWN[name].default
    where = f"argument {spelt(name)}:"
    if choices := how.get("choices"):
        if value not in choices:
            told = ", ".join(map(repr, choices))
            raise UsageError(f"{where} invalid choice: {value!r} (choose from {told})")
    elif "kind" in how:
        try:
            return how["kind"](value)
        except ValueError as error:
            raise UsageError(f"{where} {error}") from error
    elif isinstance(default, bool) or how.get("is_tristate"):
        if not isinstance(value, bool):
            raise UsageError(f"{where} must be True or False: got {value!r:.160}")
    elif not isinstance(value, (str, Path)):
        raise UsageError(f"{where} must be text: got {value!r:.160}")
    else:
        return str(value)
    return value


# --- what cannot go together, and what follows -------------------------------------------------


def check(s: Settings) -> None:
    """Raises UsageError for settings that contradict each other, or a target."""
    if s.model is None:
        raise UsageError("MODEL is required: a model folder, a Hugging Face name, or --demo")
    for name in ("eval_nsamples", "gate"):
        if getattr(s, name) < 0:
            raise UsageError(f"{spelt(name)} must be at least 0: got {getattr(s, name)}")
    _check_columns(s)
    if s.tune and s.distill and (not s.gate or s.plan):
        raise UsageError(
            "--tune and --distill are two candidates: without the gate only one can ship"
        )
    if s.refine and s.slabs:
        raise UsageError("--refine measures whole linears: not --granularity slab")
    if s.seqlen < 2:
        raise UsageError(f"--seqlen must be at least 2: got {s.seqlen}")
    _check_texts(s)
    _check_budget(s)
    _check_measured(s)
    if s.target:
        _check_target(s)


def _check_texts(s: Settings) -> None:
    """Raises UsageError where a dataset would be left out, for want of sequences."""
    judged = s.eval_dataset or s.dataset or ()
    mixed = s.dataset or ()
    for name, of in (("nsamples", mixed), ("gate", mixed), ("eval_nsamples", judged)):
        if 0 < getattr(s, name) < len(of):
            raise UsageError(
                f"{spelt(name)} must be at least {len(of)}, one sequence of each dataset: got "
                f"{getattr(s, name)}"
            )


def _check_columns(s: Settings) -> None:
    arranged = s.slabs or s.rotate in ("ffn", "all")
    if arranged and s.method != "fisher":
        raise UsageError(f"--granularity slab and --rotate need --method fisher: got {s.method}")
    if s.free_slabs and not s.slabs:
        raise UsageError("--free-slabs helps --granularity slab only")
    if s.tune and (arranged or s.rotate == "fold"):
        raise UsageError("--tune knows whole linears only: not --granularity slab, nor --rotate")


def _check_budget(s: Settings) -> None:
    asked = [name for name in KNOWN if KNOWN[name].metadata.get("one_of") == "budget"]
    asked = [spelt(name) for name in asked if getattr(s, name) is not None]
    if len(asked) > 1:  # in Python; the command line's parser has refused it
        raise UsageError(f"argument {asked[1]}: not allowed with argument {asked[0]}")
    if s.untie_head and not s.quantize_lm_head:
        raise UsageError("--untie-head is for --quantize-lm-head")
    if s.ignore_scale_bits and (s.size or s.max_kl or s.plan):
        raise UsageError("--ignore-scale-bits counts for --avg-bits only")
    makes = ("strategy", "scores", "keep", "ignore", "fuse", "per_expert", "granularity", "rotate")
    given = [
        name
        for name in (*makes, "refine", "curve", "diagnose")
        if getattr(s, name) not in (KNOWN[name].default, "fold")  # a plan is of a folded model
    ]
    if s.plan and given:
        raise UsageError(f"{spelt(given[0])} helps to make a plan: it cannot go with --plan")


def _check_measured(s: Settings) -> None:
    """--max-kl, --refine, --diagnose, --curve: what they need, and what they cannot go with."""
    for name in ("max_kl", "diagnose"):
        if getattr(s, name) and not s.gate:
            raise UsageError(
                f"{spelt(name)} measures on the gate's text: it cannot go with --gate 0"
            )
    if s.max_kl and s.strategy != "optimal":
        raise UsageError(
            f"--max-kl searches among optimal plans: it cannot go with --strategy {s.strategy}"
        )
    if s.max_kl and s.solve_only:
        raise UsageError("--max-kl rounds and measures: it cannot go with --solve-only")
    if s.refine and s.max_kl:
        raise UsageError("--refine keeps to a budget, and --max-kl looks for one: not both")
    if s.refine and s.strategy != "optimal":
        raise UsageError(
            f"--refine improves the optimal plan: it cannot go with --strategy {s.strategy}"
        )
    if s.curve is not None and s.curve < 2:
        raise UsageError(f"--curve must be of at least 2 points: got {s.curve}")


def _check_target(s: Settings) -> None:
    """What the engine that will run the model needs."""
    assert s.target is not None
    target = TARGETS[s.target]
    for name in ("granularity", "rotate"):
        if getattr(s, name) not in ("layer", "none", "fold", None):
            raise UsageError(f"--target {target.name} cannot go with --{name} {getattr(s, name)}")
    if s.per_expert and target.experts:
        raise UsageError(f"--target {target.name} cannot go with --per-expert: experts must agree")
    default = KNOWN["act_scale_mode"].default
    if target.act_scale_mode and s.act_scale_mode not in (default, target.act_scale_mode):
        raise UsageError(
            f"--target {target.name} rounds activations in scale mode {target.act_scale_mode}: "
            f"got --act-scale-mode {s.act_scale_mode}"
        )


def _completed(s: Settings) -> Settings:
    """What follows from the rest: text, budget, output, and what a target implies."""
    changes: dict[str, Any] = {"asks_budget": any((s.avg_bits, s.size, s.plan, s.max_kl))}
    if not changes["asks_budget"]:
        changes["avg_bits"] = DEFAULT_BITS
    if s.dataset is None and (s.method != "weight" or _uses_text(s)):
        changes["dataset"] = (DEFAULT_DATASET,)
    if s.target:
        target = TARGETS[s.target]
        changes["fuse"] = s.fuse or target.fuse
        if target.act_scale_mode:
            changes["act_scale_mode"] = target.act_scale_mode
    done = replace(s, **changes)
    if done.out is None:
        done = replace(done, out=Path(f"{_stem(done)}-mixbits-{_budget_name(done)}"))
    return done


def _stem(s: Settings) -> str:
    return Path(str(s.model)).resolve().name


def _uses_text(s: Settings) -> bool:
    """Whether something beside measuring, and judging, goes through text."""
    return s.rounding == "gptq" or any((s.gate, s.tune, s.distill, s.refine, s.diagnose))


def _budget_name(s: Settings) -> str:
    if s.plan:
        return "plan"
    if s.max_kl:
        return f"{s.max_kl:g}nats"
    return f"{s.size}B" if s.size else f"{s.avg_bits:g}bit"
