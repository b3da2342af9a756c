"""Every language model class of transformers, tiny: `python -m benchmarks.quality.architectures`.

A model of each kind is saved with random weights, quantized by the command line to 8 bits (W8A16G32
and MXFP8A16, rounded to nearest), loaded, and exported where it can be. One row says what came of
it:

equal      logits are those of the same model with the same linears rounded in place, and every
           tensor that is not packed has its own bits and dtype
refused    one sentence, exit code 2, nothing left behind
WRONG      other logits, tensors lost or changed, or a folder that cannot be loaded
TRACEBACK  no sentence, no end within the limit, or a signal
not built  the tiny model itself does not run on text here, so there is nothing to compare with

Kinds of AutoModelForImageTextToText end in /image; some of them are shown a picture as well.

Logits are compared in float32, where only the order of sums and the rounding of packed products'
inputs to 24 bits differ: 5e-7 of their norm in a Llama. One linear that is not rounded as it should
be moves them by 4e-3, so that the bound, 2.4e-4, leaves room for sums that cancel and no room for a
wrong linear. In bfloat16, which is what users run, the bound is four times what bfloat16 itself
does to the twin's logits, and its last digit: a router may then send a token elsewhere. Exports to
compressed-tensors, as transformers dequantizes them, have weights and scales rounded to bfloat16,
which moves a weight by less than 8 bits have done: the bound is what those did, in float32.
auto-round and gguf hold no mix of these schemes, nor does transformers read one in experts: for
these all linears are W8A16G32. What is written for auto-round and gguf is not read here
(tests/test_export*.py do).

Each kind runs in a process of its own, with limits; rows are written as they come, and kinds that
are in the CSV already are not run again unless they are named by --only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor

from benchmarks.tools.records import Records
from benchmarks.tools.tiny_models import (
    SEEING,
    auto_class,
    picture_inputs,
    save_model,
    small_config,
    small_seeing_config,
    text_ids,
)
from mixbits.command import quiet
from mixbits.report.tables import table

COLUMNS = ("kind", "model_class", "result", "exports", "packed_share", "gap", "effect", "seconds")
COLUMNS = (*COLUMNS, "reason")
FAILURES = ("WRONG", "TRACEBACK")
FLOAT32 = 2.0**-12  # of the norm of the logits
OPTIONS = ["--nsamples", "4", "--seqlen", "32", "--eval-nsamples", "2", "--gate", "0"]
OPTIONS += ["--rounding", "rtn", "--schemes", "W8A16G32,MXFP8A16", "--avg-bits", "8.4"]
SECONDS, MEMORY = 300, 12 << 30  # of the CPU, so that a busy machine fails nothing; bytes
UNIFORM = "W8A16G32"  # what auto-round and gguf can hold


# A spread for tests: every kind of block, router, expert, order of weights, and of eye.
SPREAD = (
    *("bamba", "bitnet", "bloom", "cohere2_moe", "deepseek_v3", "gemma2", "glm4_moe", "gpt2"),
    "gpt_oss",
    *("jetmoe", "mixtral", "olmo2", "opt", "phi3", "qwen3_next", "gemma3/image", "llava/image"),
    *("mistral3/image", "qwen2_5_vl/image", "qwen3_5/image"),
)  # fmt: skip


class Wrong(Exception):
    """What was written is not what was asked for."""


class Refused(Exception):
    """One sentence, exit code 2."""


class NotBuilt(Exception):
    """There is nothing to compare with."""


def all_kinds() -> list[str]:
    """Causal language models, then image-text models as `kind/image`."""
    from transformers.models.auto import modeling_auto as auto

    texts = sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    images = sorted(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return texts + [f"{kind}/image" for kind in images]


def first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def make_source(kind: str, folder: Path) -> dict[str, Tensor] | None:
    """Save the tiny model of `kind`; returns picture inputs where there are some.

    Raises NotBuilt where it cannot be made, or does not run on text.
    """
    name, _, image = kind.partition("/")
    try:
        seeing = bool(image) and name in SEEING
        config = small_seeing_config(name) if seeing else small_config(name)
        save_model(folder, config, bool(image))
        model = open_model(folder, bool(image), torch.bfloat16)
        found = text_logits(model)
    except Exception as error:  # whatever a foreign class raises
        raise NotBuilt(first_sentence(error)) from None
    if not found.isfinite().all():
        raise NotBuilt("its own logits are not finite")
    return picture_inputs(model.config) if seeing else None


def open_model(folder: Path, image: bool, dtype: torch.dtype) -> Any:
    return auto_class(image).from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def text_logits(model: Any) -> Tensor:
    ids = text_ids()
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found.float()


@torch.no_grad()
def picture_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    own = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    found: Tensor = model(**own).logits
    return found.float()


def command(main: Callable[[list[str]], int], words: list[Any], out: Path) -> str:
    """Run one of mixbits' command lines and return what it printed.

    Raises Refused with its sentence, or Wrong where it leaves a folder beside its refusal.
    """
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = main([str(word) for word in words])
    errors = [line for line in complained.getvalue().splitlines() if line.startswith("error: ")]
    if code == 0:
        return said.getvalue()
    sentence = errors[-1][len("error: ") :] if errors else "no sentence"
    if code != 2 or not errors:
        raise Wrong(f"exit code {code}: {sentence}")
    if out.exists():
        raise Wrong(f"refused, and yet a folder is left: {sentence}")
    raise Refused(sentence)


def packed_modules(folder: Path) -> dict[str, Any]:
    """Linear -> recipe, as the folder says."""
    from mixbits.checkpoint.transformers_quantizer import read_config

    return dict(read_config(folder).recipes())


def round_in_place(model: Any, recipes: dict[str, Any]) -> int:
    """Round the linears of a plain model in place; returns how many weights they hold."""
    from mixbits.model.layout import find_linears
    from mixbits.rounding.nearest import round_weights

    linears = [i for i in find_linears(model, include_head=True) if i.name in recipes]
    if len(linears) != len(recipes):
        missing = sorted(set(recipes) - {info.name for info in linears})
        raise Wrong(f"{len(missing)} packed linears are not the source's: {missing[0]}")
    round_weights(model, linears, recipes)
    return sum(info.numel for info in linears)


def gap(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())


def check_plain_tensors(packed: Any, original: Any, recipes: dict[str, Any]) -> None:
    """Every tensor that is not packed is the source's, in its dtype. Raises Wrong."""
    from mixbits.model.layout import split_expert_name

    inside = set(recipes)
    for name in recipes:
        with contextlib.suppress(ValueError):
            inside.add(split_expert_name(name)[0])
    own = packed.state_dict()
    for name, tensor in original.state_dict().items():
        module, _, leaf = name.rpartition(".")
        packed_here = any(module == p or module.startswith(p + ".") for p in inside)
        if packed_here and not (leaf == "bias" and name in own):
            continue
        if name not in own:
            raise Wrong(f"{name} is lost")
        if own[name].dtype != tensor.dtype:
            raise Wrong(f"{name} was {tensor.dtype} and is {own[name].dtype}"[:200])
        if not torch.equal(own[name], tensor):
            raise Wrong(f"{name} has changed")


class Twin:
    """The same model with the same linears rounded in place: logits, in float32 and bfloat16."""

    def __init__(self, folder: Path, image: bool, recipes: dict[str, Any], picture: Any) -> None:
        self.picture = picture
        exact = open_model(folder, image, torch.float32)
        before = self.logits(exact)
        self.total = matrix_weights(exact)
        self.packed = round_in_place(exact, recipes)
        self.exact = self.logits(exact)
        self.effect = gap(self.exact[0], before[0])
        narrow = open_model(folder, image, torch.bfloat16)  # what stays in float32 stays
        round_in_place(narrow, recipes)
        self.own = max(gap(a, b) for a, b in zip(self.logits(narrow), self.exact, strict=True))

    def logits(self, model: Any) -> list[Tensor]:
        found = [text_logits(model)]
        return found + ([picture_logits(model, self.picture)] if self.picture else [])

    def check(self, model: Any, what: str, bound: float) -> float:
        """The gap of a model's logits from the twin's. Raises Wrong beyond `bound`."""
        for seen, found, expected in zip(
            ("", "with a picture "), self.logits(model), self.exact, strict=False
        ):
            here = gap(found, expected)
            if not here <= bound:
                raise Wrong(
                    f"{what}: logits {seen}are {here:.2g} off, at most {bound:.2g} expected"
                )
        return here

    @property
    def bfloat16(self) -> float:
        return 4 * self.own + 2.0**-8


def matrix_weights(model: Any) -> int:
    """How many weights the matrices of the decoder blocks have; of the whole model, if none."""
    from mixbits.model.layout import decoder_blocks

    try:
        inside = decoder_blocks(model)[1]
    except Exception:  # not the question here
        inside = model
    return sum(p.numel() for p in inside.parameters() if p.dim() > 1)


def export_all(folder: Path, work: Path, image: bool, twin: Twin) -> tuple[str, str]:
    """Formats that hold the folder, and reasons of the others. Raises Wrong."""
    from mixbits.export.__main__ import main

    done, refused = [], []
    if any(re.search(r"\.experts\.\d+\.", name) for name in packed_modules(folder)):
        folder = uniform(folder, work)  # transformers reads experts of one scheme only
        twin = Twin(work / "source", image, packed_modules(folder), twin.picture)
    for name in ("compressed-tensors", "auto-round", "gguf"):
        out = work / name
        try:
            if name == "auto-round" and not (work / "uniform").exists():
                folder = uniform(folder, work)
            command(main, [folder, "--format", name, "--out", out], out)
        except Refused as why:
            refused.append(f"{name}: {why}")
            continue
        done.append(name)
        if name == "compressed-tensors":
            try:
                model = open_model(out, image, torch.bfloat16)
                text_logits(model)  # the first call dequantizes
                torch.nn.Module.float(model)  # its own method refuses, being quantized
            except Exception as error:  # its own linears, with code that looks at their weights
                done.pop()
                refused.append(f"{name}: transformers cannot run it: {first_sentence(error)}")
                continue
            twin.check(model, "as compressed-tensors", max(twin.effect, 2.0**-8))
    return " ".join(done), "; ".join(refused)


def uniform(folder: Path, work: Path) -> Path:
    """The same source, all of its plan's packed linears in UNIFORM."""
    from mixbits.quantize import main

    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    for unit in plan["units"]:
        unit["scheme"] = UNIFORM if unit["scheme"] != "BF16" else "BF16"
    (work / "plan.json").write_text(json.dumps(plan), "utf-8")
    out = work / "uniform"
    words = [work / "source", "--out", out, "--plan", work / "plan.json", "--seqlen", "32"]
    command(main, [*words, "--rounding", "rtn", "--eval-nsamples", "0"], out)
    return out


def survey(kind: str, work: Path) -> dict[str, Any]:
    """The row of one kind. Raises Refused, Wrong, NotBuilt, or whatever a traceback shows."""
    import mixbits
    from mixbits.quantize import main

    image = kind.endswith("/image")
    source, out = work / "source", work / "out"
    picture = make_source(kind, source)
    ids = np.random.Generator(np.random.PCG64(0)).integers(3, 100, 4096).astype(np.int32)
    np.save(work / "ids.npy", ids)
    command(main, [source, "--out", out, "--dataset", work / "ids.npy", *OPTIONS], out)
    recipes = packed_modules(out)
    original = open_model(source, image, torch.bfloat16)
    row: dict[str, Any] = {"model_class": type(original).__name__}
    packed = mixbits.load(out)
    if type(packed) is not type(original):
        raise Wrong(f"opens as {type(packed).__name__}, the source as {type(original).__name__}")
    faults: list[str] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except Wrong as fault:
            faults.append(str(fault))

    attempt(lambda: check_plain_tensors(packed, original, recipes))
    twin = Twin(source, image, recipes, picture)
    row |= {"packed_share": f"{twin.packed / twin.total:.3f}", "effect": f"{twin.effect:.2g}"}
    exact = mixbits.load(out, dtype=torch.float32)
    found = attempt(lambda: twin.check(exact, "in float32", FLOAT32))
    row["gap"] = "" if found is None else f"{found:.2g}"
    attempt(lambda: twin.check(packed, "in bfloat16", twin.bfloat16))
    exported = attempt(lambda: export_all(out, work, image, twin))
    row["exports"], reason = exported or ("", "")
    if faults:
        return row | {"result": "WRONG", "reason": "; ".join(faults)}
    return row | {"result": "equal", "reason": reason}


def traceback_place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/mixbits/" in f.filename] or frames
    return f"{first_sentence(error)} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"


def run_kind(kind: str) -> dict[str, Any]:
    """The row of one kind, whatever happens."""
    torch.set_num_threads(1)
    quiet()
    work = Path(tempfile.mkdtemp(prefix="architectures-"))
    begin = time.monotonic()
    row: dict[str, Any]
    try:
        row = survey(kind, work)
    except (Refused, Wrong, NotBuilt) as error:
        names = {Refused: "refused", Wrong: "WRONG", NotBuilt: "not built"}
        row = {"result": names[type(error)], "reason": str(error)}
    except BaseException as error:  # SystemExit, MemoryError and the rest are findings too
        row = {"result": "TRACEBACK", "reason": traceback_place(error)}
    shutil.rmtree(work, ignore_errors=True)
    return {"kind": kind, **row, "seconds": f"{time.monotonic() - begin:.1f}"}


def isolated(kind: str) -> dict[str, Any]:
    """`run_kind` in a forked child with limits on time and memory."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        import resource

        os.close(receiver)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(6 * SECONDS)  # for what waits instead
        with os.fdopen(sender, "w") as pipe:
            json.dump(run_kind(kind), pipe)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if text:
        row: dict[str, Any] = json.loads(text)
        return row
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    late = ended in (signal.SIGALRM, signal.SIGPROF)
    why = f"no end within {SECONDS} s" if late else f"died (status {status})"
    return {"kind": kind, "result": "TRACEBACK", "reason": why}


def warm_up() -> None:
    """Import what every child needs, once."""
    import importlib

    from transformers import AutoModelForCausalLM

    for name in ("quantize", "stages", "export.__main__", "transformers_quantizer"):
        importlib.import_module(f"mixbits.{name}")
    torch.set_num_threads(1)
    quiet()
    AutoModelForCausalLM.from_config(small_config("llama"))(input_ids=text_ids())


def rows_of(kinds: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from map(isolated, kinds)
        return
    with Pool(jobs) as pool:  # workers only wait for their children
        yield from pool.imap_unordered(isolated, kinds)


def report(rows: list[dict[str, str]]) -> int:
    """Print the table and its counts; returns the exit code."""
    shown = [[row[c] if c != "reason" else row[c][:120] for c in COLUMNS] for row in rows]
    print(table([list(COLUMNS), *shown]))
    counts = Counter(row["result"] for row in rows)
    print(", ".join(f"{count} {result}" for result, count in counts.most_common()))
    return int(any(counts[name] for name in FAILURES))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Every class of language model, tiny.")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="run these, again if need be")
    parser.add_argument("--out", type=Path, help="a CSV to add rows to, and to continue")
    parser.add_argument("--jobs", type=int, default=1, help="kinds at a time (default 1)")
    args = parser.parse_args(argv)
    known = all_kinds()
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        parser.error(f"no such kind: {', '.join(unknown)}")
    path = args.out or Path(tempfile.mkdtemp()) / "architectures.csv"
    records = Records(path, COLUMNS, ("kind",))
    kinds = args.only or [kind for kind in known if records.find(kind=kind) is None]
    warm_up()
    for row in rows_of(kinds, args.jobs):
        records.append(row)
        print(f"{row['kind']}: {row['result']} {row.get('reason', '')}"[:200], flush=True)
    asked = args.only or known
    found = [records.find(kind=kind) for kind in asked]
    return report([row for row in found if row is not None])


if __name__ == "__main__":
    sys.exit(main())
