"""One model through every loader: `python -m benchmarks.peers.exports [MODEL ...] --csv FILE`.

Linears take the schemes in turn, rounded to nearest. A figure is the largest difference of a logit
from the fake-quantized model, which is computed by torch in the same dtype, on text that the model
itself has written. Yardsticks: what quantization does to logits, and what torch's own rounding does
(float32 against float64, bfloat16 against float32).

llama.cpp rounds the inputs of products to 8 bits in blocks of 32, and those of a bfloat16 head to
bfloat16. For its rows the reference is also computed so: `as_llama_cpp` counts the tokens whose
logits then agree to 1e-3. They agree from the start of a text up to where a sum that differs in its
last bit makes another code; nothing after that does. Greedy text of both is compared, too.

Needs compressed-tensors, auto-round, gguf and llama-cpp-python; who is missing is skipped, and
named.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import mixbits
import mixbits.checkpoint.transformers_quantizer
from benchmarks.tools.records import Records
from mixbits.checkpoint.saving import save
from mixbits.command import quiet
from mixbits.demo import MODEL_DIR
from mixbits.export.__main__ import main as export
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Assignment, ScaleMode
from mixbits.model.layout import find_linears
from mixbits.report.tables import table
from mixbits.runtime.fake import FakeLinear, fake_quantize_model
from mixbits.source.source import Source, open_source

KEY = ("model", "schemes", "act_scale_mode", "loader", "dtype")
FIGURES = ("logit_gap", "argmax_equal", "as_llama_cpp", "quantization_effect", "torch_own")
GREEDY = ("greedy_tokens", "greedy_equal", "margin_where_they_part")
SEQUENCES, TOKENS, GREEDY_TOKENS = 4, 64, 128

# schemes, scale mode of activations, formats to export to
MIXES: tuple[tuple[str, ScaleMode, tuple[str, ...]], ...] = (
    ("MXFP4A16,MXFP8A16", "even", ("compressed-tensors", "gguf")),
    ("MXFP4,MXFP8", "even", ("compressed-tensors",)),
    ("MXFP4,MXFP8", "floor", ("auto-round",)),
    ("W4A16G32,W8A16G32", "even", ("compressed-tensors", "auto-round", "gguf")),
    ("MXFP4A16,W8A16G32", "even", ("compressed-tensors", "gguf")),
)
PACKAGES = {"compressed-tensors": "compressed_tensors", "auto-round": "auto_round"}
DTYPES = {"compressed-tensors": torch.bfloat16, "auto-round": torch.float32}


@dataclass
class Case:
    """One model with one mix of schemes, its text, and its packed folder."""

    source: Source
    schemes: str
    mode: ScaleMode
    assignment: Assignment
    folder: Path
    ids: Tensor

    def fake(self, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.source.path, dtype=dtype).eval()
        fake_quantize_model(model, self.assignment)
        return model

    def original(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source.path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits.double()
    return out


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def written_text(source: Source) -> Tensor:
    """int64 [SEQUENCES, TOKENS]: what the model makes up after its first token."""
    torch.manual_seed(0)
    model: Any = source.load()
    first = torch.full((SEQUENCES, 1), source.config.bos_token_id)
    return generate(model, first, TOKENS - 1, do_sample=True)


def generate(model: Any, ids: Tensor, count: int, do_sample: bool) -> Tensor:
    """ids and `count` tokens after them, whatever they are."""
    out: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=do_sample,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out


def make_case(source: Source, schemes: str, mode: ScaleMode, ids: Tensor, folder: Path) -> Case:
    linears = find_linears(source.load())
    parsed = [parse_recipe(name, act_scale_mode=mode) for name in schemes.split(",")]
    assignment = {info.name: parsed[i % len(parsed)] for i, info in enumerate(linears)}
    folder.mkdir()
    modes = {"weight_scale_mode": "floor", "act_scale_mode": mode}
    save(folder, source, source.load(), linears, assignment, modes)
    return Case(source, schemes, mode, assignment, folder, ids)


def as_llama_cpp(model: Any) -> Any:
    """Round the inputs of packed linears as its Q8_0 does, and those of the others to bfloat16."""

    def round_input(module: Any, args: tuple[Tensor]) -> Tensor:
        x = args[0].float().unflatten(-1, (-1, 32))
        step = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        return (torch.round(x / step) * step.half().float()).flatten(-2)

    for module in model.modules():
        if isinstance(module, FakeLinear):
            module.register_forward_pre_hook(round_input)
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: args[0].bfloat16().float())
    return model


class LlamaCpp:
    """A GGUF in llama.cpp, keys and values in float32."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        kind = llama_cpp.GGML_TYPE_F32
        self.model = llama_cpp.Llama(
            str(path), n_ctx=512, logits_all=True, verbose=False, type_k=kind, type_v=kind
        )

    def logits(self, ids: Tensor) -> Tensor:
        rows = []
        for row in ids:
            self.model.reset()
            self.model.eval(row.tolist())
            rows.append(torch.from_numpy(self.model.scores[: len(row)].copy()))
        return torch.stack(rows).double()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        self.model.reset()
        self.model.eval(ids)
        found: list[int] = []
        for _ in range(count):
            found.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
            self.model.eval(found[-1:])
        return found


def greedy_rows(case: Case, reference: Any, peer: LlamaCpp) -> dict[str, Any]:
    """Greedy text of both after the first tokens of the text, and how close the two best were."""
    start = case.ids[:1, :8]
    ours = generate(reference, start, GREEDY_TOKENS, do_sample=False)[0, start.shape[1] :].tolist()
    theirs = peer.greedy(start[0].tolist(), GREEDY_TOKENS)
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    row: dict[str, Any] = {"greedy_tokens": GREEDY_TOKENS}
    row["greedy_equal"] = GREEDY_TOKENS if equal is None else equal
    tokenizer: Any = case.source.tokenizer()
    print(f"    fake:      {tokenizer.decode(ours)!r}\n    llama.cpp: {tokenizer.decode(theirs)!r}")
    if equal is not None:
        before = torch.tensor([start[0].tolist() + ours[:equal]])
        best = logits(reference, before)[0, -1].topk(2).values
        row["margin_where_they_part"] = float(best[0] - best[1])
    return row


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"{folder} was not loaded as it is: {info}")
    return model.eval()


def exported(case: Case, name: str) -> Path | None:
    out = case.folder.parent / f"{case.folder.name}-{name}"
    options = ["--lossy"] if name == "gguf" else []  # MXFP8; and the demo model's tokenizer
    code = export([str(case.folder), "--format", name, "--out", str(out), *options])
    return None if code else out


def measure(case: Case, formats: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    ids = case.ids
    references = {d: logits(case.fake(d), ids) for d in (torch.float32, torch.bfloat16)}
    exact = logits(case.fake(torch.float64), ids)
    effect = gap(logits(case.original(), ids), references[torch.float32])
    own = {torch.float32: gap(references[torch.float32], exact)}
    own[torch.bfloat16] = gap(references[torch.bfloat16], references[torch.float32])

    def row(loader: str, dtype: torch.dtype, got: Tensor, **more: Any) -> dict[str, Any]:
        wanted = references[dtype]
        return {
            "model": case.source.path.name
            if case.source.path.resolve() != MODEL_DIR.resolve()
            else "demo",
            "schemes": case.schemes,
            "act_scale_mode": case.mode,
            "loader": loader,
            "dtype": str(dtype).removeprefix("torch."),
            "logit_gap": gap(got, wanted),
            "argmax_equal": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
            "quantization_effect": effect,
            "torch_own": own[dtype],
            **more,
        }

    for dtype in (torch.float32, torch.bfloat16):
        ours: dict[str, Callable[[], Any]] = {
            "mixbits.load": lambda d=dtype: mixbits.load(case.folder, dtype=d),  # type: ignore[misc]
            "from_pretrained": lambda d=dtype: loaded(case.folder, d),  # type: ignore[misc]
        }
        for name, load in ours.items():
            yield row(name, dtype, logits(load(), ids))
    for name in formats:
        if find_spec(PACKAGES.get(name, "llama_cpp")) is None:
            print(f"  {name} is not measured: {PACKAGES.get(name, 'llama_cpp')} is not installed")
        elif (out := exported(case, name)) is None:
            print(f"  {name} cannot hold {case.schemes}")
        elif name == "gguf":
            peer, reference = LlamaCpp(out / "model.gguf"), case.fake(torch.float32)
            got, more = peer.logits(ids), greedy_rows(case, reference, peer)
            apart = (got - logits(as_llama_cpp(reference), ids)).abs().amax(-1)
            more["as_llama_cpp"] = int((apart < 1e-3).sum())
            yield row("llama.cpp", torch.float32, got, **more)
        else:
            yield row(name, DTYPES[name], logits(loaded(out, DTYPES[name]), ids))
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.exports")
    parser.add_argument("models", nargs="*", default=[str(MODEL_DIR)], help="the demo's")
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    quiet()
    records = Records(args.csv, [*KEY, *FIGURES, *GREEDY], KEY)
    for model in args.models:
        source = open_source(model)
        ids = written_text(source)
        with tempfile.TemporaryDirectory() as temporary:
            for number, (schemes, mode, formats) in enumerate(MIXES):
                case = make_case(source, schemes, mode, ids, Path(temporary) / str(number))
                for row in measure(case, formats):
                    print(f"  {row}", flush=True)
                    records.append(row)
    names = [*KEY, *FIGURES, "greedy_equal"]
    cells = [[_short(r[name]) for name in names] for r in records.rows]
    print(table([names, *cells]))


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text


if __name__ == "__main__":
    main()
