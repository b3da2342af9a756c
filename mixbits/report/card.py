"""README.md of an output folder: a model card as the Hugging Face hub reads it.

The card says how to load the model, where its bits went, and what it scored. It is meant to be
published: of local paths it gives the last part only.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import printable
from ..files.io import hub_name, last_part
from ..source.source import Source
from .report import Report
from .tables import Rows, number, plus_minus, result_rows, size, task_rows, text_lines

_MARKUP = re.compile(r"[\\`*\[\]|#~$]|(?<!\w)_|_(?!\w)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_PACKED = """\
This needs mixbits, which is in no package index: `pip install .` in a clone of its repository, or a
wheel made there.

```python
import mixbits, transformers

name = "{folder}"  # the folder; or its name on the hub, with the owner: "OWNER/{folder}"
model = mixbits.load(name)
tokenizer = transformers.AutoTokenizer.from_pretrained(name)
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(ids[0]))
```

With mixbits imported, `transformers.AutoModelForCausalLM.from_pretrained` loads it as well; without
it, transformers refuses. To serve it to clients of OpenAI's API, and to score it with lm-eval:

```
python -m mixbits.serve {folder}
python -m mixbits.lm_eval --model hf --model_args pretrained={folder} --tasks lambada_openai
```"""
_FAKE = """\
Weights are rounded, but stored in 16 bits: anything that loads the original loads this. What loads
it runs with activations in 16 bits, also where schemes round them; the scores are of the model with
activations rounded where they do, as the packed model runs."""


def _table(rows: Rows) -> str:
    """Rows (the first is the heading) in Markdown: first column left, the others right."""
    heading, *others = [[escaped(cell) for cell in row] for row in rows]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(value: object) -> str:
    """Text of others as Markdown shows it: on one line, without markup or HTML."""
    line = _MARKUP.sub(r"\\\g<0>", printable(value))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def snippet(template: str, folder: str) -> str:
    """A template's code, with the name of a folder as Python's and a shell's strings have it."""
    name = printable(folder)
    shown = template.replace('"{folder}"', json.dumps(name, ensure_ascii=False))
    return shown.replace("{folder}", shlex.quote(name))


def _original(path: Path) -> dict[str, Any]:
    """The YAML of the original's card; nothing where there is none that can be read."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(path) or {}
    except (OSError, RecursionError, TypeError, ValueError, YAMLError):  # it is not our file
        return {}


def metadata(source: Source, schemes: Sequence[str]) -> str:
    """The card's YAML. What licence there is stands in the original's own card."""
    from huggingface_hub import ModelCardData

    original = _original(source.path / "README.md")
    known: dict[str, Any] = {
        k: original[k] for k in ("license", "license_name", "license_link") if k in original
    }
    known |= _base_model(source, original)
    tags = ["mixbits", "quantized", "mixed-precision", *(name.lower() for name in schemes)]
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=tags, **known
    ).to_yaml()


def _base_model(source: Source, original: dict[str, Any]) -> dict[str, Any]:
    """What the hub files the model under: the original's name there, where it is known.

    Of a local folder it is what its config.json was saved from; else what the original's own card
    says that it was made of, which is all that can be said.
    """
    if not Path(source.name).is_dir():
        return {"base_model": source.name, "base_model_relation": "quantized"}
    saved_from = hub_name(Path(source.name))
    if saved_from is None:
        with suppress(OSError, ValueError, AttributeError):
            text = (source.path / "config.json").read_text(encoding="utf-8")
            saved_from = json.loads(text).get("_name_or_path")
    if _is_hub_name(saved_from):
        return {"base_model": saved_from, "base_model_relation": "quantized"}
    above = original.get("base_model")
    names = above if isinstance(above, list) else [above]
    return {"base_model": above} if names and all(map(_is_hub_name, names)) else {}


def _is_hub_name(name: object) -> bool:
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _scores(report: Report) -> list[str]:
    parts = []
    if held_out := report.held_out:
        parts += [
            f"On {held_out.nsamples} x {held_out.seqlen} tokens of "
            f"{escaped(last_part(held_out.source or '-'))}, of which nothing else has seen any. KL "
            "is that of the quantized model's next token from the original's; after ± is a "
            "standard error.",
            _table(result_rows(report)),
            *map(escaped, text_lines(report.evaluation)[:1]),  # what its maker can do is not said
        ]
    if report.evaluation and (tasks := report.evaluation.tasks):
        limit = f", the first {tasks.limit} of each" if tasks.limit else ""
        parts += [f"lm-eval's tasks{limit}:", _table(task_rows(report.evaluation))]
    return ["## Scores", *parts] if parts else []


def _verdict(report: Report) -> list[str]:
    """Whether it is good, in a sentence; what its maker could do is not for its readers."""
    found = report.evaluation.verdict if report.evaluation else None
    if found is None:
        return []
    word, colon, figures = (found.sentence or "").partition(":")
    return [f"**{word}**{colon}{figures}"]


def _made(report: Report) -> str:
    """What was done, in the order in which it was."""
    lines = []
    if text := report.calibration:
        lines.append(
            f"Sensitivities from {text.nsamples} x {text.seqlen} tokens of "
            f"{escaped(last_part(text.source or '-'))}; an exact allocation within the budget."
        )
    if report.source and report.source.folded:
        lines.append(
            "Its weights are those of the original in a rotated basis, which spreads outliers: "
            "unquantized, they would give the same logits."
        )
    if rounding := report.rounding:
        steps = rounding.distilled
        learned = "" if steps is None else f", then learned in {steps} steps"
        lines.append(f"Weights rounded by `{rounding.method}`{learned}.")
    if len(report.candidates) > 1:
        best, second, *_ = report.candidates
        lines.append(
            f"Of {len(report.candidates)} plans of this size, the best on other text: KL "
            f"{number(best.kl, '.4f')}; next is {second.name}, behind by "
            f"{plus_minus(second.behind, second.interval)} (95 %)."
        )
    if where := report.environment:
        lines.append(f"mixbits {where.mixbits}, torch {where.torch}.")
    return "\n".join(f"* {line}" for line in lines)


def render(folder: str, source: Source, plan: Rows, report: Report, fake: bool = False) -> str:
    """The whole card of an output folder of that name; `plan` are rows of `tables.scheme_rows`."""
    schemes = plan[0][1:-1]
    after, before = (size(n or 0) for n in (report.bytes_after, report.bytes_before))
    parts = [
        f"---\n{metadata(source, schemes)}\n---",
        f"# {escaped(folder)}",
        f"{escaped(last_part(source.name))} with weights in {', '.join(schemes)}: "
        f"{number(report.reached.avg_bits, '.2f')} bits per weight of its linears, scales and "
        f"everything counted; {after} instead of {before}.",
        *_verdict(report),
        "## How to load it",
        _FAKE if fake else snippet(_PACKED, folder),
        *_scores(report),
        "## Where the bits went",
        "Linears, or shares of their weights, in each scheme; bits per weight, scales counted.",
        _table(plan),
        "## How it was made",
        _made(report),
    ]
    return "\n\n".join(parts) + "\n"
