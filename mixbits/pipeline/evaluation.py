"""The result of a run judged: on held-out text, by lm-eval's tasks, and by what it writes."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoint.loading import load
from ..errors import UsageError
from ..files.atomic import Destination
from ..measuring.evaluate import compare, mean_stderr, run_tasks, sequence_kl, task_manager
from ..measuring.text import begin, tokenize
from ..model.streaming import StreamedModel
from ..planning.plan import Plan
from ..progress import numbered
from ..report.parting import CALIBRATION, GATE, HELD_OUT, texts_compared
from ..report.tables import fake_column
from ..report.verdict import Circumstances, verdict
from ..runtime.fake import round_activations
from ..runtime.linear import PackedLinear
from ..source.source import open_source
from .gate import Decision
from .run import Run
from .settings import Settings
from .texts import Text

_TEXT_KEYS = ("text", "source", "nsamples", "seqlen", "kl", "kl_stderr")


def check_evaluation(run: Run) -> None:
    """What would fail at the very end should fail at once."""
    settings, source = run.settings, run.source
    for option in ("tasks", "prompt"):
        if getattr(settings, option) and not source.has_tokenizer:
            raise UsageError(f"--{option} needs a tokenizer, and {source.path} has none")
    if settings.tasks:
        task_manager(list(settings.tasks), settings.include_path)


def evaluate(
    run: Run,
    place: Destination,
    original: Any,
    tokenizer: Any,
    text: Text,
    decision: Decision,
    about: Circumstances,
    result: dict[str, Any],
) -> None:
    """Held-out scores, lm-eval's, and a sample, into `result`: `evaluation` of report.json."""
    settings, held_out = run.settings, text.held_out
    result["verdict"] = verdict(None)
    if settings.fake:  # its weights were rounded in place
        original = run.source.original.load()
    place.check_in_place()
    quantized = _load_result(run, decision.winner.plan, result)
    place.check_in_place()  # and so is what was loaded by its name
    if len(held_out.ids):
        p, q = (StreamedModel(m, device=settings.computes_on) for m in (original, quantized))
        scores = compare(
            p, q, held_out.ids, batch_size=settings.batch_size, first=held_out.judged_from
        )
        result["held_out"] = {**held_out.describe(), **scores}
        result["verdict"] = verdict(scores, about)
        rows = [
            *_on_calibration_text(settings, text, p, q),
            *_on_gate_text(text, decision),
            {"text": HELD_OUT, **result["held_out"]},
        ]
        result["texts"] = texts_compared([{key: row[key] for key in _TEXT_KEYS} for row in rows])
    if settings.tasks:
        scored = [("original_tasks", original)] if settings.eval_original else []
        for name, model in numbered([*scored, ("tasks", quantized)], "lm-eval, model"):
            model.to(settings.computes_on)
            result[name] = _tasks(settings, model, tokenizer)
    if settings.prompt:
        result["prompt"] = settings.prompt
        result["sample"] = _generate(quantized, tokenizer, settings, held_out.prefix)


def _on_calibration_text(
    settings: Settings, text: Text, reference: StreamedModel, quantized: StreamedModel
) -> list[dict[str, Any]]:
    """A row of `texts_compared`, of no more sequences than the other texts have; or none.

    There is none where nothing was made with that text.
    """
    others = [len(part.ids) for part in (text.gate, text.held_out) if len(part.ids)]
    sample = text.calibration[: min(others)]
    if not settings.calibrates or not len(sample.ids):
        return []
    kl, stderr = mean_stderr(
        sequence_kl(reference, quantized, sample.ids, settings.batch_size, sample.judged_from)
    )
    return [{"text": CALIBRATION, **sample.describe(), "kl": kl, "kl_stderr": stderr}]


def _on_gate_text(text: Text, decision: Decision) -> list[dict[str, Any]]:
    """What the gate has measured of what ships; nothing where it compared nothing."""
    return [
        {"text": GATE, **text.gate.describe(), "kl": row["kl"], "kl_stderr": row["kl_stderr"]}
        for row in decision.rows[:1]
    ]


def _load_result(run: Run, plan: Plan, result: dict[str, Any]) -> Any:
    """The model to score: as it was written, but --fake as the packed model would run."""
    settings = run.settings
    if settings.fake:
        fake = open_source(str(settings.out), settings.trust_remote_code).load()
        result["scored"] = fake_column(round_activations(fake, plan.assignment))
        return fake
    model = load(settings.folder, trust_remote_code=settings.trust_remote_code)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.backend = settings.backend  # for the device that blocks are moved to
    return model


def _tasks(settings: Settings, model: Any, tokenizer: Any) -> dict[str, Any]:
    add_bos = settings.add_bos_token if settings.bos or settings.add_bos_token else False
    return run_tasks(
        model,
        tokenizer,
        list(settings.tasks),
        limit=settings.limit,
        add_bos_token=add_bos,
        include_path=settings.include_path,
        batch_size=settings.batch_size,
    )


def _generate(model: Any, tokenizer: Any, settings: Settings, prefix: tuple[int, ...]) -> str:
    """The prompt and 80 tokens after it, drawn with the seed: greedy small models repeat."""
    torch.manual_seed(settings.seed)
    assert settings.prompt is not None
    prompt = begin(tokenize(tokenizer, settings.prompt), prefix)[None].to(settings.computes_on)
    model.to(settings.computes_on)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=80,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
