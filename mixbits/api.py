"""mixbits from Python: three verbs, and one sentence that is all of them.

    scores = mixbits.measure(model, text, schemes=["MXFP4", "MXFP8"])
    plan = mixbits.allocate(scores, avg_bits=4.5)
    packed = mixbits.apply(model, plan, text, rounding="gptq")

    result = mixbits.quantize_model("Llama-3.1-8B", out="llama-4.5", avg_bits=4.5, dataset="t.txt")

MODEL is a folder, a name on the hub, or a loaded model of transformers (with its `tokenizer`, where
text is to be read). TEXT is what `--dataset` takes, one or a list of them, or texts, conversations
or token ids. Settings have the names of the command's options, which `mixbits.pipeline.settings`
lists, and are refused with the command's own sentences, as `mixbits.UsageError`.

Any thread may call them; they take turns, since transformers patches itself while it loads a model.
Nothing is printed, no signal is caught, and no environment variable is set: work is told to
`progress`, and lines to the logger `mixbits`. Importing this module imports no torch.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from .errors import UsageError
from .progress import Bar, Progress, Watch

if TYPE_CHECKING:
    import numpy
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .measuring.scores import Scores as Table
    from .pipeline.run import Run
    from .planning.plan import Plan as Allocated
    from .report.report import Report
    from .source.source import Source

P = ParamSpec("P")
R = TypeVar("R")
_turn = threading.RLock()


def _in_turn(verb: Callable[P, R]) -> Callable[P, R]:
    """One call at a time, in all threads."""

    @functools.wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with _turn:
            return verb(*args, **kwargs)

    return called


Model: TypeAlias = "str | os.PathLike[str] | PreTrainedModel"  # a hub's name, or a folder
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
Conversation: TypeAlias = "list[dict[str, Any]]"  # of messages
TokenIds: TypeAlias = "Sequence[int] | Tensor | numpy.ndarray[Any, Any]"
# What --dataset takes, one or several; texts, conversations; token ids of one text, or of several.
Text: TypeAlias = (
    "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Sequence[Conversation] | TokenIds"
    " | Sequence[TokenIds]"
)
_Folder: TypeAlias = "tempfile.TemporaryDirectory[str]"
# `**settings` are Any: a TypedDict for Unpack would have to say each field of
# `pipeline.settings.Settings` again, since no type checker makes one of a dataclass. Their values
# are checked where they come in, by `pipeline.rules.settled`.


@dataclass(frozen=True)
class Scores:
    """How much each linear suffers from each scheme: what `allocate` goes by.

    `schemes` are those that were measured; `data` is scores.json.
    """

    table: Table
    run: Run = field(repr=False)
    given: Mapping[str, Any] = field(repr=False)
    holds: _Folder | None = field(default=None, repr=False, compare=False)  # which must stay

    @property
    def schemes(self) -> list[str]:
        return self.table.schemes

    @property
    def data(self) -> dict[str, Any]:
        return self.table.data

    def save(self, path: str | Path) -> None:
        """scores.json, which `--scores` and `load` take."""
        self.table.write(Path(path))

    @classmethod
    def load(cls, path: str | Path, model: Model, **settings: Any) -> Scores:
        """What was saved, for `model`. Raises UsageError for scores of another one."""
        from .measuring.scores import Scores as Table
        from .pipeline.scoring import check_known

        table = Table.read(Path(path))
        made = {"schemes": table.schemes, "method": table.data["method"]}
        for name in ("weight_scale_mode", "act_scale_mode"):
            made[name] = table.data[name]
        if table.is_folded:
            made["rotate"] = "fold"
        for name in ("nsamples", "seqlen"):
            made[name] = table.data["calibration"].get(name)
        run, given, holds = _open(model, None, {**made, **settings})
        check_known(run, table, path, run.source.sha256())
        return cls(table, run, given, holds)

    def frontier(self, points: int = 17) -> list[dict[str, Any]]:
        """What every budget buys: rows with `avg_bits` and `predicted_loss`."""
        from .pipeline.diagnose import frontier_rows
        from .pipeline.plans import make_problem

        problem = make_problem(self.run, self.table, self.run.settings.slabs)
        return frontier_rows(self.run, problem, points)

    def _repr_html_(self) -> str:
        from .report.notebook import frontier_chart

        return frontier_chart(self.frontier())


@dataclass(frozen=True)
class Plan:
    """Which scheme each linear gets. `data` is plan.json."""

    plan: Allocated
    run: Run = field(repr=False)
    holds: _Folder | None = field(default=None, repr=False, compare=False)

    @property
    def data(self) -> dict[str, Any]:
        return self.plan.data

    @property
    def avg_bits(self) -> float:
        """Bits per weight of the linears, scales counted."""
        return float(self.run.reached(self.plan.assignment)["avg_bits"])

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return self.run.predicted_bytes(self.plan.assignment)

    def save(self, path: str | Path) -> None:
        """plan.json, which `--plan` and `load` take."""
        self.plan.write(Path(path))

    @classmethod
    def load(cls, path: str | Path, model: Model, **settings: Any) -> Plan:
        """What was saved, or written by hand, for `model`."""
        from .planning.plan import Plan as Allocated

        run, _, holds = _open(model, None, {"seqlen": 2, **settings})  # no text is read
        return cls(Allocated.read(Path(path), run.linears), run, holds)

    def _repr_html_(self) -> str:
        from .report.notebook import bits_map

        return bits_map(self.data)


@dataclass(frozen=True)
class Result:
    """An output folder, and its report.json."""

    folder: Path
    report: Report | None = field(repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> Result:
        """That of an earlier run. Raises UsageError where there is no report."""
        from .report.report import Report

        return cls(Path(folder), Report.read(Path(folder) / "report.json"))

    @property
    def verdict(self) -> str:
        """What it came to, in a word (docs/budget.md)."""
        found = self.report and self.report.evaluation and self.report.evaluation.verdict
        return str(found.word) if found else ""

    def load(self, **how: Any) -> Any:
        """The packed model, as `mixbits.load`, which takes `how`."""
        from .checkpoint.loading import load

        return load(self.folder, **how)

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def plan(self) -> dict[str, Any] | None:
        """plan.json."""
        return self._json("plan.json")

    @property
    def scores(self) -> dict[str, Any] | None:
        """scores.json, where there was one."""
        return self._json("scores.json")

    def _repr_html_(self) -> str:
        from .report.notebook import bits_map, frontier_chart

        curve = [point.data() for point in (self.report and self.report.curve) or ()]
        return bits_map(self.plan or {}) + (frontier_chart(curve) if curve else "")


@_in_turn
def measure(
    model: Model,
    text: Text | None = None,
    *,
    schemes: Sequence[str] | str,
    tokenizer: Tokenizer | None = None,
    progress: Watch | bool | None = True,
    **settings: Any,
) -> Scores:
    """Predicted loss of every linear of `model` in every scheme, on `text`.

    `settings`: nsamples, seqlen, method, granularity, rotate, fuse, ... `progress` is True (a bar
    of tqdm), False, or a function that is given the share that is done and a line. Raises
    UsageError.
    """
    from .pipeline.process import make_subject
    from .pipeline.scoring import measure as score
    from .pipeline.texts import calibrate

    settings["schemes"] = schemes
    run, given, holds = _open(model, tokenizer, settings, text)
    with _watched(run, "measure", progress):
        original = run.source.load()
        found = calibrate(run, run.source.tokenizer())
        subject = make_subject(run, original, found)
        table = score(run, subject.model, found.calibration, run.source.sha256())
    return Scores(table, run, given, holds)


@_in_turn
def allocate(
    scores: Scores,
    *,
    avg_bits: float | None = None,
    size: int | str | None = None,
    max_kl: float | None = None,
    progress: Watch | bool | None = True,
    **settings: Any,
) -> Plan:
    """The plan of least predicted loss within a budget: bits per weight, or bytes of all files.

    `max_kl` looks for the smallest plan whose KL is at most that, by rounding and measuring.
    `settings`: strategy, keep, fuse, ignore_scale_bits, ... Raises UsageError.
    """
    from .pipeline.plans import make_plans
    from .pipeline.process import make_subject
    from .pipeline.scoring import check_known
    from .pipeline.texts import calibrate

    asked = {"avg_bits": avg_bits, "size": size, "max_kl": max_kl, **settings}
    measures = {} if max_kl is None else {"solve_only": False, "gate": None}
    run = _run({**scores.given, **measures, **asked}, scores.run.source)
    check_known(run, scores.table, "scores")
    subject = found = None
    with _watched(run, "allocate", progress if max_kl else False):
        if max_kl is not None:
            found = calibrate(run, run.source.tokenizer())
            original = run.source.original.load() if run.is_folded else None
            subject = make_subject(run, run.source.load(), found, original)
        planned = make_plans(run, scores.table, subject, found)
    return Plan(planned.first.plan, run, scores.holds)


@_in_turn
def apply(
    model: Model,
    plan: Plan | str | Path,
    text: Text | None = None,
    *,
    rounding: str = "gptq",
    tokenizer: Tokenizer | None = None,
    progress: Watch | bool | None = True,
    **settings: Any,
) -> Any:
    """`model` with its weights rounded as `plan` says, and packed: a model ready to generate.

    It is what `mixbits.load` gives of a folder that the command writes: `save_pretrained` writes
    that. `text` is what `gptq` compensates with. Raises UsageError.
    """
    from .checkpoint.loading import load

    scratch = tempfile.TemporaryDirectory(prefix="mixbits-")
    folder = Path(scratch.name)
    if isinstance(plan, Plan):
        plan.save(folder / "plan.json")
        if plan.data.get("folded"):
            settings = {"rotate": "fold", **settings}
        plan = folder / "plan.json"
    quiet = {"gate": 0, "eval_nsamples": 0, "plan": plan, "rounding": rounding}
    result = quantize_model(
        model,
        folder / "packed",
        tokenizer=tokenizer,
        progress=progress,
        dataset=text,
        **{**quiet, **settings},
    )
    packed = load(result.folder)
    packed.mixbits_folder = scratch  # its files are mapped
    return packed


@_in_turn
def quantize_model(
    model: Model | None = None,
    out: str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    dataset: Text | None = None,
    progress: Watch | bool | None = True,
    quiet: bool = False,
    command: str | None = None,
    **settings: Any,
) -> Result:
    """Measure, allocate, round, pack, write and judge: what `python -m mixbits.quantize` does.

    `settings` are the command's options. `progress` as of `measure`, or None: as the command, a bar
    on stderr where that is a terminal, and lines where not. `quiet` silences the libraries beneath,
    as the command does. Raises UsageError; leaves a complete folder or none.
    """
    from .pipeline import early
    from .pipeline.options import typed_as
    from .pipeline.rules import settled

    with tempfile.TemporaryDirectory(prefix="mixbits-") as scratch:
        given = {**settings, "out": out}
        given |= _inputs(model, tokenizer, dataset, Path(scratch))
        asked = settled(given, typed_as(given) if command is None else command)
        early.check(asked)
        from .command import quiet as silence
        from .pipeline import process, telling
        from .progress import say

        if quiet:
            silence()
        with _watching(progress) as watch:
            run, lines = process.start(asked, watch)
            if asked.dry_run:
                telling.sizes(run)
            for line in lines:
                say(f"  {line}")
            report = None if asked.dry_run else process.quantize(run, watch)
    return Result(asked.folder, report)


# --- models, texts and progress ----------------------------------------------------------------


def _inputs(
    model: Model | None, tokenizer: Tokenizer | None, text: Text | None, folder: Path
) -> dict[str, Any]:
    """The settings `model` and `dataset`; what is in memory is written to a folder."""
    found: dict[str, Any] = {}
    if isinstance(model, (str, os.PathLike)):
        found["model"] = os.fspath(model)
        if tokenizer is not None:
            raise UsageError("tokenizer= is for a model in memory: a folder has its own")
    elif model is not None:
        found["model"] = str(_written(model, tokenizer, folder))
    if text is not None:
        found["dataset"] = _datasets(text, folder)
    return found


def _written(model: PreTrainedModel, tokenizer: Tokenizer | None, folder: Path) -> Path:
    """A model in memory as a folder, so that all that is checked of folders is checked of it."""
    if not hasattr(model, "save_pretrained"):
        raise UsageError(
            "MODEL must be a folder, a Hugging Face name, or a model of transformers: "
            f"got {type(model).__name__}"
        )
    name = Path(str(getattr(model, "name_or_path", "") or "model")).name or "model"
    path = folder / name
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def _datasets(text: Text, folder: Path) -> list[str]:
    """What `--dataset` takes for a text: names, or a file with what is in memory.

    Several texts are names of datasets where each of them can be nothing else.
    """
    from .measuring.hub_data import is_dataset_name
    from .pipeline.kinds import DatasetName

    if isinstance(text, (str, os.PathLike)):
        return [os.fspath(text)]
    rows: list[Any]
    rows = text.tolist() if hasattr(text, "tolist") else list(text)
    if rows and all(isinstance(row, (str, os.PathLike)) for row in rows):
        sure = os.PathLike, DatasetName
        names = [isinstance(row, sure) or is_dataset_name(row) for row in rows]
        if all(names):
            return [os.fspath(row) for row in rows]
        if any(isinstance(row, os.PathLike) for row in rows):
            wrong = rows[names.index(False)]
            raise UsageError(f"beside a path there must be names of datasets: got {wrong!r:.160}")
    return [str(_text_file(rows, folder))]


def _text_file(rows: list[Any], folder: Path) -> Path:
    """A file with texts, conversations or token ids that are in memory."""
    if rows and all(isinstance(row, str) for row in rows):
        entries = [{"text": row} for row in rows]
    elif rows and all(_is_chat(row) for row in rows):
        entries = [{"messages": row} for row in rows]
    elif (rows and isinstance(rows[0], (int, list, tuple))) or hasattr(
        rows[0] if rows else 0, "tolist"
    ):
        ids = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        path = folder / "text.json"
        path.write_text(json.dumps(ids), encoding="utf-8")
        return path
    else:
        raise UsageError(
            "text must be a file, a dataset's name, texts, conversations (lists of messages) or "
            f"token ids: got {rows!r:.160}"
        )
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return path


def _is_chat(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(m, Mapping) for m in row)


def _open(
    model: Model,
    tokenizer: Tokenizer | None,
    settings: Mapping[str, Any],
    text: Text | None = None,
) -> tuple[Run, dict[str, Any], _Folder]:
    """A run without an output; what was given; and the folder that must stay as long as it."""
    scratch = tempfile.TemporaryDirectory(prefix="mixbits-")
    folder = Path(scratch.name)
    given = {"eval_nsamples": 0, "gate": 0, **settings, "solve_only": True}
    given |= _inputs(model, tokenizer, text, folder)
    given["out"] = folder / "out"
    return _run(given), given, scratch


def _run(given: Mapping[str, Any], source: Source | None = None) -> Run:
    from .pipeline import early
    from .pipeline.rules import settled

    settings = settled(given)
    early.check(settings)
    from .pipeline.process import with_device
    from .pipeline.run import prepare

    return prepare(with_device(settings), source)


@contextmanager
def _watching(progress: Watch | bool | None) -> Iterator[Watch | None]:
    """What is told of the work: a bar that goes with it, nothing, or a function of the caller's."""
    if progress is not True:
        yield (lambda share, line: None) if progress is False else progress
        return
    bar = Bar()
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def _watched(run: Run, stage: str, progress: Watch | bool | None) -> Iterator[None]:
    from .model.layout import decoder_blocks
    from .pipeline.work import planned_work

    blocks = len(decoder_blocks(run.shapes)[1])
    work = {stage: planned_work(run.settings, blocks, len(run.units))[stage]}
    with _watching(progress) as watch, Progress(work, watch=watch).stage(stage):
        yield
