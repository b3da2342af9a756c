"""README.md of an output folder: a model card as the Hugging Face hub reads it.

The card says how to load the model, where its bits went, and what it scored. It is meant to be
published: of local paths it gives the last part only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import plus_minus, result_rows, size, task_rows
from .source import Source

Rows = Sequence[Sequence[str]]

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
    heading, *others = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _last_part(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name


def _original(path: Path) -> dict[str, Any]:
    """The YAML of the original's card; nothing where there is none that can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # of three libraries: it is not our file
        return {}


def metadata(source: Source, schemes: Sequence[str]) -> str:
    """The card's YAML. What licence there is stands in the original's own card."""
    from huggingface_hub import ModelCardData

    original = _original(source.path / "README.md")
    known: dict[str, Any] = {
        k: original[k] for k in ("license", "license_name", "license_link") if k in original
    }
    if not Path(source.name).is_dir():  # a name on the hub
        known |= {"base_model": source.name, "base_model_relation": "quantized"}
    tags = ["mixbits", "quantized", "mixed-precision", *(name.lower() for name in schemes)]
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=tags, **known
    ).to_yaml()


def _scores(report: dict[str, Any]) -> list[str]:
    evaluation = report["evaluation"] or {}
    parts = []
    if held_out := evaluation.get("held_out"):
        parts += [
            f"On {held_out['nsamples']} x {held_out['seqlen']} tokens of "
            f"{_last_part(held_out['source'])}, of which nothing else has seen any. KL is that of "
            "the quantized model's next token from the original's; after ± is a standard error.",
            _table(result_rows(report["bytes_before"], report["bytes_after"], evaluation)),
        ]
    if tasks := evaluation.get("tasks"):
        limit = f", the first {tasks['limit']} of each" if tasks["limit"] else ""
        parts += [
            f"lm-eval's tasks{limit}:",
            _table(task_rows(evaluation)),
        ]
    return ["## Scores", *parts] if parts else []


def _made(report: dict[str, Any]) -> str:
    """What was done, in the order in which it was."""
    lines = []
    if text := report["calibration"]:
        lines.append(
            f"Sensitivities from {text['nsamples']} x {text['seqlen']} tokens of "
            f"{_last_part(text['source'])}; an exact allocation within the budget."
        )
    rounding = report["rounding"]
    learned = f", then learned in {rounding['distilled']} steps" if "distilled" in rounding else ""
    lines.append(f"Weights rounded by `{rounding['method']}`{learned}.")
    if report["gate"]:
        best, *others = report["gate"]["candidates"]
        lines += [
            f"Of {len(others) + 1} plans of this size, the best on other text: KL "
            f"{best['kl']:.4f}; next is {other['name']}, behind by "
            f"{plus_minus(other['behind'], other['interval'])} (95 %)."
            for other in others[:1]
        ]
    where = report["environment"]
    lines.append(f"mixbits {where['mixbits']}, torch {where['torch']}.")
    return "\n".join(f"* {line}" for line in lines)


def render(
    folder: str, source: Source, plan: Rows, report: dict[str, Any], fake: bool = False
) -> str:
    """The whole card of an output folder of that name.

    `plan` are rows of `report.scheme_rows`; `report` is what report.json holds.
    """
    reached, schemes = report["reached"], plan[0][1:-1]
    parts = [
        f"---\n{metadata(source, schemes)}\n---",
        f"# {folder}",
        f"{_last_part(source.name)} with weights in {', '.join(schemes)}: "
        f"{reached['avg_bits']:.2f} bits per weight of its linears, scales and everything counted; "
        f"{size(report['bytes_after'])} instead of {size(report['bytes_before'])}.",
        "## How to load it",
        _FAKE if fake else _PACKED.format(folder=folder),
        *_scores(report),
        "## Where the bits went",
        "Linears, or shares of their weights, in each scheme; bits per weight, scales counted.",
        _table(plan),
        "## How it was made",
        _made(report),
    ]
    return "\n\n".join(parts) + "\n"
