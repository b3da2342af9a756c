"""Score a model: against the original on held-out text, and on lm-eval tasks.

Every figure comes with a standard error. Tokens of one sequence are not independent, so errors
are taken over sequences, not tokens. All sums are in float64: a model compared with itself has a
KL divergence of exactly 0.

Sequences begin as texts do (`mixbits.measuring.text`), and what follows the prefix is judged: the
first token of the text, which the prefix's last token predicts, and all after it. Tokens of the
prefix are never what is to be predicted.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..demo import TASKS_DIR
from ..errors import UsageError, first_line
from ..model.replaced import replaced
from ..progress import steps
from .text import prefix_tokens

CONFIDENCE = 0.95
CHUNK = 512  # tokens whose float64 log-probabilities are held at once


def mean_stderr(per_sequence: Tensor) -> tuple[float, float]:
    """Mean of figures [sequences], and its standard error: NaN of a single one."""
    count = len(per_sequence)
    mean = float(per_sequence.mean())
    return mean, float(per_sequence.std() / math.sqrt(count)) if count > 1 else math.nan


def interval(*stderrs: float) -> float:
    """Half the width of the confidence interval of a figure with a standard error.

    Of several: of the sum or difference of figures that are independent.
    """
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.hypot(*stderrs)


def _sequence_means(reference: Tensor, quantized: Tensor, ids: Tensor, first: int) -> Tensor:
    """float64 [4], means over one sequence: KL, NLL of both, share of equal top tokens.

    Logits [S, V], of which those before `first` do not count. The last position has a distribution
    but no known next token.
    """
    kl, nll, agree = [], [], []
    for start in range(first, len(ids), CHUNK):
        log_p = reference[start : start + CHUNK].double().log_softmax(-1)
        log_q = quantized[start : start + CHUNK].double().log_softmax(-1)
        target = ids[start + 1 : start + 1 + len(log_p)].unsqueeze(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agree.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
        known = torch.stack([log_p[: len(target)], log_q[: len(target)]])
        nll.append(-known.gather(-1, target.expand(2, -1, -1)).squeeze(-1))
    return torch.stack([torch.cat(kl).mean(), *torch.cat(nll, 1).mean(1), torch.cat(agree).mean()])


class Model(Protocol):
    """What can be compared: anything that gives logits [B, S, V] for token ids [B, S]."""

    def logits(self, ids: Tensor) -> Tensor: ...


@torch.no_grad()
def per_sequence(
    reference: Model, quantized: Model, ids: Tensor, batch_size: int = 8, first: int = 0
) -> Tensor:
    """float64 [sequences, 4] on the CPU, of which `summary` makes the figures of `compare`.

    Means over each sequence: KL, NLL of the reference and of the quantized model, share of equal
    top tokens. Positions before `first` are not judged (`Sequences.judged_from`).
    """
    rows = []
    advance = steps(2 * len(ids), len(getattr(reference, "blocks", [reference])))
    for batch in ids.split(batch_size):
        rows.append(_batch_means(reference.logits(batch), quantized.logits(batch), batch, first))
        advance(2 * len(batch))
    return torch.cat(rows)


def _batch_means(p: Tensor, q: Tensor, ids: Tensor, first: int) -> Tensor:
    """float64 [B, 4] on the CPU, from logits [B, S, V] of ids [B, S]."""
    means = [_sequence_means(*row, first) for row in zip(p, q, ids.to(p.device), strict=True)]
    return torch.stack(means).cpu()


def logits_kl(reference: Tensor, quantized: Tensor, ids: Tensor, first: int = 0) -> Tensor:
    """`sequence_kl` from logits [B, S, V] of one batch of ids [B, S]."""
    return _batch_means(reference, quantized, ids, first)[:, 0]


def sequence_kl(
    reference: Model, quantized: Model, ids: Tensor, batch_size: int = 8, first: int = 0
) -> Tensor:
    """float64 [sequences]: mean KL(reference || quantized) per token, in nats, of each.

    Positions before `first` are not judged (`Sequences.judged_from`).
    """
    return per_sequence(reference, quantized, ids, batch_size, first)[:, 0]


def compare(
    reference: Model, quantized: Model, ids: Tensor, batch_size: int = 8, first: int = 0
) -> dict[str, float]:
    """Held-out figures of `quantized` against `reference` on ids [sequences, length].

    kl: mean KL(reference || quantized) per token in nats; perplexity, perplexity_reference, and
    perplexity_ratio, their quotient, whose error is of the paired differences; top1_agreement:
    share of positions where both find the same token likeliest; each with `<name>_stderr`.
    Positions before `first` are not judged (`Sequences.judged_from`).
    """
    return summary(per_sequence(reference, quantized, ids, batch_size, first))


def summary(means: Tensor) -> dict[str, float]:
    """The figures of `compare` from means [sequences, 4] of `per_sequence`."""
    kl, nll_p, nll_q, agree = means.T
    result: dict[str, float] = {}
    result["kl"], result["kl_stderr"] = mean_stderr(kl)
    named = {"perplexity": nll_q, "perplexity_reference": nll_p, "perplexity_ratio": nll_q - nll_p}
    for name, nll in named.items():
        mean, stderr = mean_stderr(nll)
        result[name] = math.exp(mean)
        result[f"{name}_stderr"] = math.exp(mean) * stderr  # first order
    result["top1_agreement"], result["top1_agreement_stderr"] = mean_stderr(agree)
    return result


def task_manager(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """lm-eval's index of tasks: ours, those in `include_path`, and its own where those are needed.

    Raises UsageError for unknown tasks.
    """
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise UsageError(f"--include-path must be a folder: {include_path} is none")
    paths = [str(TASKS_DIR)] + ([include_path] if include_path else [])
    local = TaskManager(include_path=paths, include_defaults=False)
    known_here = all(task in local.all_tasks for task in tasks)
    manager = local if known_here else TaskManager(include_path=paths)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"--tasks must name lm-eval tasks: {', '.join(unknown)} is none of its "
            f"{len(manager.all_tasks)} tasks; --include-path adds a folder of your own"
        )
    return manager


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    add_bos_token: bool | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Score `model` with lm-eval: {"tasks": {task: {metric: value, metric_stderr: ...}}, ...}.

    The bundled tasks are always known; `include_path` is a folder with more. `average` is the
    mean acc of the tasks in `averaged`, those that have one, with `average_stderr`; `documents` has
    the acc of each of their documents, which pairs two models' scores. Prompts begin
    as the tokenizer begins texts, unless `add_bos_token` is False; the result says whether there
    was anything to begin with. Raises UsageError for unknown tasks or data that cannot be had.
    """
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = task_manager(tasks, include_path)
    prefix = prefix_tokens(tokenizer) if add_bos_token is not False else ()
    add_bos_token = bool(prefix)
    lm = HFLM(
        pretrained=model,
        tokenizer=_without_suffix(tokenizer, prefix),
        batch_size=batch_size,
        add_bos_token=add_bos_token,
        device=str(next(model.parameters()).device),
    )
    config: Any = model.config
    blocks = getattr(config.get_text_config(), "num_hidden_layers", 1)
    try:
        # lm-eval asks git for the commit of whatever folder this runs in, which may be none.
        commit = replaced(evaluator, "get_git_commit_hash", lambda: None)
        with commit, _bars_told(blocks):
            raw = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=1000,  # 0 would drop every standard error
                log_samples=True,
            )
    except (ConnectionError, OSError, ValueError, AssertionError) as error:
        raise UsageError(
            f"lm-eval could not run {', '.join(tasks)} ({first_line(error)}); without a network "
            "use --tasks stdlib_next_line, or --include-path with tasks that read local files"
        ) from error
    return _task_summary(raw, tasks, limit, add_bos_token)


@contextmanager
def _bars_told(cost: float) -> Iterator[None]:
    """lm-eval's bars are not drawn; what those of requests count is a step of our own progress.

    A request takes `cost` forwards of a block.
    """
    import datasets

    class Told(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.advance = None
            if self.iterable is None and self.total:
                self.advance = steps(self.total, cost, is_all=True)

        def update(self, n: float | None = 1) -> None:
            if self.advance is not None:
                self.advance(n)

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    with ExitStack() as stack:
        if shown:
            stack.callback(datasets.enable_progress_bars)
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "lm_eval" and getattr(module, "tqdm", None) is tqdm:
                stack.enter_context(replaced(module, "tqdm", Told))
        # Some import it where they use it.
        stack.enter_context(replaced(sys.modules["tqdm"], "tqdm", Told))
        yield


def _without_suffix(tokenizer: Any, prefix: tuple[int, ...]) -> Any:
    """The tokenizer, or one that puts `prefix` before a text and nothing after it.

    lm-eval adds all of a tokenizer's special tokens or none; after an EOS nothing can be continued.
    """
    count = len(tokenizer("a", add_special_tokens=False)["input_ids"]) + len(prefix)
    if not prefix or len(tokenizer("a")["input_ids"]) == count:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    if getattr(changed, "backend_tokenizer", None) is None:
        raise UsageError(
            "lm-eval would end every prompt with what this tokenizer puts after a text: "
            "pass --no-add-bos-token"
        )
    from tokenizers.processors import TemplateProcessing

    names = tokenizer.convert_ids_to_tokens(list(prefix))
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, prefix, strict=True))
    )
    return changed


def _task_summary(
    raw: dict[str, Any], tasks: Sequence[str], limit: int | None, add_bos_token: bool | None
) -> dict[str, Any]:
    scores: dict[str, dict[str, float]] = {}
    for task in tasks:
        scores[task] = {
            key.split(",")[0]: value
            for key, value in raw["results"][task].items()
            if isinstance(value, (int, float)) and key != "sample_len"
        }
    averaged = [task for task in tasks if "acc" in scores[task]]
    errors = [scores[task].get("acc_stderr") for task in averaged]
    stderr = math.hypot(*(e for e in errors if e is not None)) / max(1, len(errors))
    mean = sum(scores[task]["acc"] for task in averaged) / len(averaged) if averaged else None
    return {
        "tasks": scores,
        "average": mean,
        "average_stderr": None if None in errors or not errors else stderr,
        "averaged": averaged,
        "documents": {task: _accuracies(raw["samples"][task]) for task in averaged},
        "limit": limit,
        "add_bos_token": add_bos_token,
    }


def _accuracies(samples: Sequence[dict[str, Any]]) -> list[float]:
    """The acc of every document of a task, in their order; 0 and 1 as integers, short in JSON."""
    found = [float(s["acc"]) for s in sorted(samples, key=lambda s: s["doc_id"]) if "acc" in s]
    return [int(acc) if acc in (0, 1) else acc for acc in found]
