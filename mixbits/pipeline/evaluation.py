"""The result of a run judged: on held-out text, by lm-eval's tasks, and by what it writes."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoint.loading import load
from ..errors import UsageError
from ..files.atomic import Destination
from ..measuring.evaluate import compare, run_tasks, task_manager
from ..measuring.text import Sequences, begin, tokenize
from ..model.streaming import StreamedModel
from ..planning.plan import Plan
from ..progress import numbered
from ..report.tables import fake_column
from ..report.verdict import Circumstances, verdict
from ..runtime.fake import round_activations
from ..runtime.linear import PackedLinear
from ..source.source import open_source
from .run import Run
from .settings import Settings


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
    held_out: Sequences,
    plan: Plan,
    about: Circumstances,
    result: dict[str, Any],
) -> None:
    """Held-out scores, lm-eval's, and a sample, into `result`: `evaluation` of report.json."""
    settings = run.settings
    result["verdict"] = verdict(None)
    if settings.fake:  # its weights were rounded in place
        original = run.source.original.load()
    place.check_in_place()
    quantized = _load_result(run, plan, result)
    place.check_in_place()  # and so is what was loaded by its name
    if len(held_out.ids):
        p, q = (StreamedModel(m, device=settings.computes_on) for m in (original, quantized))
        scores = compare(
            p, q, held_out.ids, batch_size=settings.batch_size, first=held_out.judged_from
        )
        result["held_out"] = {**held_out.describe(), **scores}
        result["verdict"] = verdict(scores, about)
    if settings.tasks:
        scored = [("original_tasks", original)] if settings.eval_original else []
        for name, model in numbered([*scored, ("tasks", quantized)], "lm-eval, model"):
            model.to(settings.computes_on)
            result[name] = _tasks(settings, model, tokenizer)
    if settings.prompt:
        result["prompt"] = settings.prompt
        result["sample"] = _generate(quantized, tokenizer, settings, held_out.prefix)


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
