"""A run: its settings, and what config.json alone says of the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..checkpoint.folder import predicted_bytes
from ..errors import UsageError
from ..export.targets import TARGETS, advice, check_fused, check_together, default_schemes, fit
from ..files.io import last_part
from ..formats.menus import MENUS
from ..formats.schemes import MX_GROUP, Assignment, Recipe, Scheme, parse_scheme
from ..measuring.scores import Scores
from ..model.layout import CausalLM, LinearInfo, Survey, check_layout, survey
from ..model.units import Unit, ignore, make_units, match_units
from ..planning.plan import Plan, average_bits, slab_width, unit_options
from ..report.coverage import Coverage
from ..source.folded import Folded
from ..source.kept import NO_CODES, OwnCodes
from ..source.source import Source, open_source
from .early import check_seqlen
from .settings import Settings


@dataclass
class Run:
    """What is asked for, and what config.json alone says of the model.

    With --rotate fold, `source` is the folded one.
    """

    settings: Settings
    schemes: list[Scheme]
    keep: list[tuple[str, Scheme]]
    source: Source
    shapes: CausalLM  # without storage
    linears: list[LinearInfo]  # what may be quantized
    units: list[Unit]
    coverage: Coverage  # and what else there is
    own: OwnCodes = NO_CODES  # of linears that the source has quantized
    menu: str | None = None  # why these schemes, where none were asked for

    @property
    def all_schemes(self) -> list[Scheme]:
        """Those to choose from, those of kept units, and those that the source has."""
        found = [*self.schemes, *(s for _, s in self.keep), *self.own_schemes]
        return list({s.name: s for s in found}.values())

    @property
    def own_schemes(self) -> list[Scheme]:
        """Those that the source has, as far as the target holds them."""
        if not self.settings.target:
            return self.own.schemes
        target, found = TARGETS[self.settings.target], []
        for scheme in self.own.schemes:
            linears = [i for i in self.linears if self.own.is_free(i.name, scheme)]
            with suppress(UsageError):
                fit(target, linears, dict.fromkeys((i.name for i in linears), Recipe.plain(scheme)))
                found.append(scheme)
        return found

    @property
    def scale_modes(self) -> tuple[str, str]:
        return self.settings.scale_modes

    @property
    def rotation(self) -> str:
        """What --rotate asks for, or what suits the schemes: none where nothing would gain.

        Nor is that worth it where some activations are not rounded: a rotated input is float32.
        """
        settings = self.settings
        if settings.rotate is not None:
            return settings.rotate
        if settings.target or settings.tune or settings.method != "fisher":
            return "none"
        chosen = [*self.schemes, *(scheme for _, scheme in self.keep)]
        used = {s.activation and s.activation.scale for s in chosen if s.packed}
        return "none" if None in used or used <= {"e4m3"} else "all"

    @property
    def is_folded(self) -> bool:
        """Whether the model is quantized in a rotated basis that nothing has to know of."""
        return isinstance(self.source, Folded)

    def describe_source(self, sha256: str) -> dict[str, Any]:
        """The original's name and hash, as scores.json and report.json have them."""
        told = {"name": last_part(self.source.name), "sha256": sha256}
        return {**told, "folded": True} if self.is_folded else told

    @cached_property
    def rotated(self) -> list[str]:
        """Linears whose inputs are rotated as it runs: those of --scores, if nothing else is asked.

        Codes that the source has stay as they are.
        """
        settings = self.settings
        if settings.rotate is None and settings.scores is not None:
            scores = Scores.read(settings.scores)
            return [info.name for info in self.linears if scores.rotated(info.name)]
        wanted = {
            "none": lambda info: False,
            "fold": lambda info: False,
            "ffn": lambda info: info.ffn_output,
            "all": lambda info: info.in_features >= MX_GROUP,
        }[self.rotation]
        return [i.name for i in self.linears if wanted(i) and i.name not in self.own.formats]

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


def prepare(settings: Settings, source: Source | None = None) -> Run:
    """Check everything that can be checked from the arguments and config.json."""
    keep = settings.kept()
    if source is None:
        source = open_source(
            str(settings.model), settings.trust_remote_code, config_only=settings.dry_run
        )
    source = source.original
    if settings.rotate == "fold":
        source = Folded.make(source)
    if not settings.dry_run:
        for one in (source.original, source):
            one.scratch = settings.folder.absolute().parent
    check_seqlen(
        settings, getattr(source.config.get_text_config(), "max_position_embeddings", None)
    )
    shapes = source.shapes
    found = survey(shapes, include_head=settings.quantize_lm_head)
    linears, coverage = _take_part(settings, found)
    settings, menu = _with_schemes(settings, linears)
    schemes = [parse_scheme(name, *settings.scale_modes) for name in settings.schemes or ()]
    schemes = list({s.name: s for s in schemes}.values())
    slabs = settings.slabs
    fuse = settings.fuse or (slabs and not settings.free_slabs)
    units = make_units(linears, fuse, settings.per_expert, by_input=slabs)
    if slabs:
        slab_width([*schemes, *(scheme for _, scheme in keep)])
    for pattern, _ in keep:
        match_units(units, pattern)
    own = NO_CODES
    if source.quantization and not settings.dry_run:
        own = OwnCodes.find(source.weights, linears)
    run = Run(settings, schemes, keep, source, shapes, linears, units, coverage, own, menu)
    if settings.target:
        _check_target(run)
    return run


def _with_schemes(settings: Settings, linears: Sequence[LinearInfo]) -> tuple[Settings, str | None]:
    """With what to choose from, and why where that was not asked for."""
    if settings.schemes is not None:
        return settings, None
    if settings.scores is not None:
        names, why = tuple(Scores.read(settings.scores).schemes), "what was measured"
    elif settings.target:
        names = default_schemes(TARGETS[settings.target], linears)
        why = f"what {settings.target} holds"
    else:
        menu, reason = settings.default_menu
        names, why = MENUS[menu], f"the menu {menu}: {reason}"
    return replace(settings, schemes=names), None if settings.plan else why


def _take_part(settings: Settings, found: Survey) -> tuple[list[LinearInfo], Coverage]:
    """The linears that the budget is for. Raises UsageError where that is not what is asked for."""
    if settings.quantize_lm_head and all(info.block is not None for info in found.linears):
        raise UsageError(
            "--quantize-lm-head needs a head that is a plain nn.Linear: got one that does more"
        )
    left = [n for one in found.left for n in (one.name, one.name.rpartition(".")[0])]
    linears = ignore(found.linears, settings.ignore, left)
    coverage = Coverage(found, settings.ignore)
    if not (settings.dry_run or settings.allow_partial or settings.plan):
        coverage.check("a budget")
    if settings.rotate == "ffn" and not any(info.ffn_output for info in linears):
        leaves = ", ".join(dict.fromkeys(i.name.rpartition(".")[2] for i in linears))
        raise UsageError(
            "--rotate ffn rotates what the last linear of an FFN reads, made number by number by "
            f"the linears before it: got none among {leaves}"
        )
    return linears, coverage


def _check_target(run: Run) -> None:
    """Whatever is chosen, the target can hold. Raises UsageError that names what it cannot."""
    name = run.settings.target
    assert name is not None
    check_layout(run.shapes, run.linears, name)
    if run.settings.plan is not None:
        given_plan(run)
        return
    target, options = TARGETS[name], unit_options(run.units, run.schemes, run.keep)
    kept = {scheme.name: f"--ignore '{pattern}' instead" for pattern, scheme in run.keep}
    instead = kept | dict.fromkeys((s.name for s in run.schemes), advice(target, run.linears))
    check_together(target, run.all_schemes)
    for scheme in [*run.schemes, *(scheme for _, scheme in run.keep)]:
        open_to = [u for u, of in zip(run.units, options, strict=True) if scheme in of]
        linears = [info for unit in open_to for info in unit.linears]
        try:
            fit(target, linears, dict.fromkeys((i.name for i in linears), Recipe.plain(scheme)))
        except UsageError as error:
            raise UsageError(f"{error}; try {instead[scheme.name]}") from error


def check_folded(run: Run, is_folded: bool, where: object) -> None:
    """Raises UsageError for scores or a plan, `where`, of the model in another basis."""
    if is_folded != run.is_folded:
        which = ("as it is", "folded (--rotate fold)")
        raise UsageError(
            f"{where} must be of the model {which[run.is_folded]}: got one of the model "
            f"{which[is_folded]}"
        )


def given_plan(run: Run) -> Plan:
    """The plan of --plan. Raises UsageError where --target cannot hold it, or it is of another."""
    assert run.settings.plan is not None
    plan = Plan.read(run.settings.plan, run.linears)
    check_folded(run, plan.data.get("folded", False), run.settings.plan)
    if run.settings.target:
        target = TARGETS[run.settings.target]
        fit(target, run.linears, plan.assignment)
        groups = [[i.name for i in unit.linears] for unit in make_units(run.linears, fuse=True)]
        check_fused(target, groups, plan.assignment)
    return plan
