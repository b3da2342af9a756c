"""README.md of an exported folder: what it is and was made from, and how its engine loads it."""

from __future__ import annotations

from pathlib import Path

from ..files.io import last_part, read_object
from ..formats.schemes import Assignment
from ..planning.plan import average_bits
from ..report.card import escaped, snippet
from .packed import PackedModel
from .targets import TARGETS

_TRANSFORMERS = """\
```python
# pip install transformers {package}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(ids[0]))
```"""
_VLLM = """\
```
vllm serve {folder}
```"""
_LLAMA_CPP = """\
```
llama-cli -m {folder} -p "Once upon a time" -n 50
llama-server -m {folder} --port 8080
```"""
_ENGINES = {  # any other format is transformers' own
    "compressed-tensors": "vLLM and transformers",
    "auto-round": "auto-round's loader",
    "gguf": "llama.cpp",
}


def _engine(name: str, schemes: Assignment) -> str:
    """Who reads a folder of that format; vLLM only what it runs."""
    held = (recipe.scheme for recipe in schemes.values() if recipe.packed)
    in_vllm = all(scheme is not None and TARGETS["vllm"].knows(scheme) for scheme in held)
    if name == "compressed-tensors" and not in_vllm:
        return "transformers"
    return _ENGINES.get(name, "transformers")


def _how(name: str, folder: str, engine: str) -> list[str]:
    """Commands for whoever reads that format."""
    if name == "gguf":
        return ["With llama.cpp:", snippet(_LLAMA_CPP, f"{folder}/model.gguf")]
    package = f" {name}" if name in _ENGINES else ""
    code = snippet(_TRANSFORMERS.replace(" {package}", package), folder)
    if "vLLM" in engine:
        return ["With vLLM:", snippet(_VLLM, folder), "With transformers:", code]
    return ["With transformers:", code]


def render(name: str, out: Path, model: PackedModel, schemes: Assignment) -> str:
    """The text for a folder `out` of the format `name`; `schemes` are those that it holds."""
    told = read_object(model.path / "config.json").get("quantization_config") or {}
    original = (told.get("source") or {}).get("name")
    made_from = f" made from {escaped(last_part(str(original)))}" if original else ""
    packed = {linear: scheme for linear, scheme in schemes.items() if scheme.packed}
    linears = [info for info in model.linears.values() if info.name in packed]
    used = ", ".join(dict.fromkeys(scheme.name for scheme in packed.values()))
    bits = f", {average_bits(linears, packed):.2f} bits per weight of these" if linears else ""
    engine = _engine(name, packed)
    what = f"{len(packed)} linears are in {used}{bits}, scales counted"
    if not packed:
        what = f"Its {len(schemes)} packed linears are plain again"
    parts = [
        f"# {escaped(out.resolve().name)}",
        f"A model for {engine}, in the format `{name}`: exported by mixbits from its packed folder "
        f"{escaped(model.path.resolve().name)}{made_from}. {what}; `mixbits-export.json` has each "
        "of them, and the error where a weight was rounded again.",
        *_how(name, out.resolve().name, engine),
    ]
    return "\n\n".join(parts) + "\n"
