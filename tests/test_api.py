"""mixbits from Python: what the command does, in notebooks, threads, and of models in memory."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import VOCAB, add_tokenizer, make_model, read, write_ids

import mixbits
from mixbits.quantize import main

SIZES: dict[str, Any] = {"nsamples": 4, "seqlen": 32, "progress": False}
SCHEMES = ["MXFP4", "MXFP8"]
LITTLE = "nsamples=4, seqlen=32, progress=False"
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_model(tmp_path_factory.mktemp("api") / "model"))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("ids") / "ids.npy")


@pytest.fixture(scope="module")
def scores(folder: Path, ids: Path) -> mixbits.Scores:
    return mixbits.measure(folder, ids, schemes=SCHEMES, **SIZES)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_no_module_hides_a_verb() -> None:
    """A module of a verb's name would take its place once it has been imported."""
    for module in pkgutil.walk_packages(mixbits.__path__, "mixbits."):
        last = module.name.rpartition(".")[2]
        if last not in ("__main__", "vllm", "peft", "utils", "_cuda"):
            importlib.import_module(module.name)
    for verb in (mixbits.measure, mixbits.allocate, mixbits.apply, mixbits.quantize_model):
        assert callable(verb) and verb.__doc__


def test_verbs_give_what_the_command_gives(
    scores: mixbits.Scores, folder: Path, ids: Path, tmp_path: Path
) -> None:
    plan = mixbits.allocate(scores, avg_bits=5)
    packed = mixbits.apply(folder, plan, ids, rounding="gptq", **SIZES)
    words = ["--nsamples", "4", "--seqlen", "32", "--schemes", ",".join(SCHEMES), "--gate", "0"]
    words += ["--dataset", str(ids), "--eval-nsamples", "0", "--avg-bits", "5"]
    assert main([str(folder), *words, "--out", str(tmp_path / "typed")]) == 0
    assert scores.data == read(tmp_path / "typed" / "scores.json")
    assert plan.data["units"] == read(tmp_path / "typed" / "plan.json")["units"]
    assert plan.size == read(tmp_path / "typed" / "report.json")["bytes_after"]
    packed.save_pretrained(tmp_path / "saved")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("saved", "typed")]
    assert weights[0] == weights[1]
    assert torch.equal(logits(packed), logits(mixbits.load(tmp_path / "typed")))


def test_one_sentence_is_the_command(folder: Path, ids: Path, tmp_path: Path) -> None:
    settings = {"schemes": SCHEMES, "avg_bits": 5, "gate": 2, "eval_nsamples": 2, **SIZES}
    result = mixbits.quantize_model(folder, tmp_path / "out", dataset=ids, **settings)
    assert result.folder == tmp_path / "out" and result.report is not None
    written = read(tmp_path / "out" / "report.json")
    assert written == result.report.as_read().data()
    typed = "--schemes MXFP4,MXFP8 --avg-bits 5 --gate 2 --eval-nsamples 2 --nsamples 4 --seqlen 32"
    assert (
        written["command"]
        == f"python -m mixbits.quantize model {typed} --out out --dataset ids.npy"
    )
    assert mixbits.Result.read(result.folder).report.data() == written
    assert result.verdict == written["evaluation"]["verdict"]["word"]
    assert result.plan == read(tmp_path / "out" / "plan.json")
    assert result.scores == read(tmp_path / "out" / "scores.json")
    assert "<svg" in result._repr_html_()
    assert torch.equal(logits(result.load()), logits(mixbits.load(result.folder)))


def test_a_model_in_memory_needs_no_folder(
    scores: mixbits.Scores, folder: Path, ids: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = mixbits.measure(model, ids, schemes=SCHEMES, **SIZES)
    assert found.data["linears"] == scores.data["linears"]
    packed = mixbits.apply(model, mixbits.allocate(found, avg_bits=5), ids, **SIZES)
    same = mixbits.apply(folder, mixbits.allocate(scores, avg_bits=5), ids, **SIZES)
    assert torch.equal(logits(packed), logits(same))
    packed.generate(IDS, max_new_tokens=2)
    packed.save_pretrained(tmp_path / "kept")
    assert torch.equal(logits(mixbits.load(tmp_path / "kept")), logits(packed))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the caller's model is untouched


TEXTS: dict[str, Any] = {
    "texts": ["a text of its own " * 20] * 4,
    "token ids": np.arange(1000) % VOCAB,
    "rows of token ids": [[i % VOCAB for i in range(n, n + 40)] for n in range(8)],
    "a tensor": torch.arange(1000) % VOCAB,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_that_are_in_memory(kind: str, folder: Path) -> None:
    found = mixbits.measure(folder, TEXTS[kind], schemes=SCHEMES, **SIZES)
    assert found.data["calibration"]["nsamples"] == 4
    assert all(row["scores"]["MXFP4"] > 0 for row in found.data["linears"].values())


def test_a_list_of_names_is_several_datasets(folder: Path, ids: Path, tmp_path: Path) -> None:
    """In the order given; a list of texts stays one text, whatever else it might be called."""
    other = write_ids(tmp_path / "other.npy", seed=1)
    for names in ([ids, other], [str(ids), str(other)], (ids, str(other))):
        found = mixbits.measure(folder, names, schemes=SCHEMES, **SIZES).data["calibration"]
        assert (found["source"], found["datasets"]) == ("ids.npy and other.npy", 2)
    texts = ["a text of its own " * 40, str(ids), "of.txt"]
    found = mixbits.measure(folder, texts, schemes=SCHEMES, **SIZES).data["calibration"]
    assert found["source"] == "text.jsonl" and "datasets" not in found
    with pytest.raises(mixbits.UsageError, match=r"beside a path there must be names .* 'a text"):
        mixbits.measure(folder, [ids, "a text"], schemes=SCHEMES, **SIZES)
    settings = {"eval_dataset": [ids, other], "schemes": SCHEMES, "gate": 0, "rounding": "rtn"}
    result = mixbits.quantize_model(
        folder, tmp_path / "out", dataset=[ids, other], eval_nsamples=2, **settings, **SIZES
    )
    assert result.report and result.report.held_out and result.report.held_out.datasets == 2
    for option in ("dataset", "eval-dataset"):
        assert f"--{option} ids.npy --{option} other.npy" in (result.report.command or "")
    for wrong in ([], 3, [3]):
        with pytest.raises(mixbits.UsageError, match="--eval-dataset: must be a name, or several"):
            mixbits.quantize_model(folder, eval_dataset=wrong, progress=False)


def test_conversations_go_through_the_template(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chats = [[{"role": "user", "content": "what is this? " * 20}]] * 8
    how = {**SIZES, "schemes": SCHEMES, "tokenizer": tokenizer}
    found = mixbits.measure(model, chats, **how)
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert found.data["linears"] == mixbits.measure(model, rendered, **how).data["linears"]


def test_scores_and_plans_are_kept(scores: mixbits.Scores, folder: Path, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.json")
    again = mixbits.Scores.load(tmp_path / "scores.json", folder)
    assert again.data == scores.data and again.schemes == SCHEMES
    plan = mixbits.allocate(again, avg_bits=6, keep=["*.o_proj=MXFP8"])
    plan.save(tmp_path / "plan.json")
    known = mixbits.Plan.load(tmp_path / "plan.json", folder)
    assert known.data == plan.data and known.avg_bits == plan.avg_bits <= 6
    assert all(r["scheme"] == "MXFP8" for r in plan.data["units"] if "o_proj" in r["unit"])
    for shown in (scores, plan):
        assert "<svg" in shown._repr_html_()
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(mixbits.UsageError, match="was measured on another model"):
        mixbits.Scores.load(tmp_path / "scores.json", other)


def test_the_smallest_plan_of_a_quality(folder: Path, ids: Path) -> None:
    found = mixbits.measure(folder, ids, schemes=SCHEMES, **SIZES)
    how = {"gate": 4, "rounding": "rtn", "progress": False}
    tight, loose = (mixbits.allocate(found, max_kl=kl, **how) for kl in (1.5e-3, 10))
    assert tight.avg_bits > loose.avg_bits


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a budget out of reach": ({"avg_bits": 3}, "--avg-bits must be between"),
    "a number of no kind": ({"avg_bits": 17}, "must be above 0 and at most 16: got 17"),
    "two budgets": ({"avg_bits": 5, "size": "20MB"}, "not allowed with argument --avg-bits"),
    "no unit": ({"size": 4.2}, r"must have a unit: got 4.2 \(4.2GB\?\)"),
    "another strategy": ({"strategy": "best"}, "--strategy: invalid choice: 'best'"),
    "no setting": ({"avgbits": 5}, r"there is no setting 'avgbits' \(avg_bits\?\)"),
    "a flag of no kind": ({"fuse": "yes"}, "--fuse: must be True or False: got 'yes'"),
    "a scheme without scores": ({"schemes": ["MXFP4", "W4A16G64"]}, "no scores for W4A16G64"),
    "another scale mode": ({"act_scale_mode": "floor"}, "measured with scale mode even"),
    "a rotation after the fact": ({"rotate": "ffn"}, "was measured without --rotate ffn"),
    "a linear without scores": ({"quantize_lm_head": True}, "scores has no scores for lm_head"),
    "a pattern of nothing": ({"keep": "*.nothing=MXFP8"}, "matches no unit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_is_refused_with_the_commands_own_sentence(case: str, scores: mixbits.Scores) -> None:
    settings, message = WRONG[case]
    with pytest.raises(mixbits.UsageError, match=message):
        mixbits.allocate(scores, **settings)


def test_slabs_that_were_free_cannot_be_made_to_agree(folder: Path, ids: Path) -> None:
    how = {**SIZES, "schemes": SCHEMES, "granularity": "slab", "free_slabs": True}
    free = mixbits.measure(folder, ids, **how)
    assert mixbits.allocate(free, avg_bits=5).avg_bits <= 5
    with pytest.raises(mixbits.UsageError, match="in several orders, where slabs are to agree"):
        mixbits.allocate(free, avg_bits=5, free_slabs=False)


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        ("nowhere/at/all", None, "MODEL must be a folder or a Hugging Face name"),
        (3, None, "or a model of transformers: got int"),
        (None, None, "MODEL is required"),
        ("FOLDER", [3.5], "text must be a file"),
        ("FOLDER", [{}], "text must be a file"),
        ("FOLDER", "none.txt", "none.txt is no file"),
    ],
)
def test_what_is_no_model_or_text(model: Any, text: Any, message: str, folder: Path) -> None:
    given = folder if model == "FOLDER" else model
    with pytest.raises(mixbits.UsageError, match=message):
        mixbits.quantize_model(given, "out", dataset=text, progress=False)


def test_a_thread_may_use_it_and_nothing_of_the_process_changes(
    scores: mixbits.Scores, folder: Path, ids: Path, tmp_path: Path, capfd: Any
) -> None:
    signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    verbosity, before = transformers.logging.get_verbosity(), dict(os.environ)
    seen: list[float] = []
    found: list[Any] = []

    def work() -> None:
        how = {**SIZES, "progress": lambda share, line: seen.append(share)}
        plan = mixbits.allocate(scores, avg_bits=5)
        found.append(mixbits.apply(folder, plan, ids, rounding="rtn", **how))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and torch.equal(logits(found[0]), logits(found[1]))
    assert seen and all(0 <= share <= 1 for share in seen)
    assert capfd.readouterr().out == ""
    assert {n: signal.getsignal(n) for n in signals} == signals
    assert transformers.logging.get_verbosity() == verbosity and dict(os.environ) == before


def test_the_documents_examples_run(
    folder: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(mixbits.__file__).parents[1] / "docs" / "python.md"
    if not page.exists():
        pytest.skip("installed without its documents")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        code = block.replace("Llama-3.1-8B", str(folder)).replace("text.txt", str(ids))
        for verb in ("measure", "apply", "quantize_model"):
            code = re.sub(rf"(mixbits\.{verb}\(.*)\)\n", rf"\1, {LITTLE})\n", code)
        exec(compile(code, str(page), "exec"), names)
    assert (tmp_path / "llama-4.5" / "report.json").exists()
    assert names["plan"].data == read(tmp_path / "plan.json")


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    path = Path(mixbits.__file__).parents[1] / "docs" / "notebook.ipynb"
    if not path.exists():
        pytest.skip("installed without its documents")
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    maps = [o for o in shown if "<svg" in json.dumps(o.get("data", {}).get("text/html", ""))]
    assert len(maps) == 2  # the frontier, and where the bits go
    printed = "".join(o["text"] for o in shown if o.get("name") == "stdout")
    assert printed.count("reached") == 3 and "class Reader:" in printed


def test_a_folded_model(folder: Path, ids: Path, tmp_path: Path) -> None:
    """Scores and plans know of it, and so whatever is made of them."""
    scores = mixbits.measure(folder, ids, schemes=SCHEMES, rotate="fold", **SIZES)
    scores.save(tmp_path / "scores.json")
    again = mixbits.Scores.load(tmp_path / "scores.json", folder)
    plan = mixbits.allocate(again, avg_bits=5)
    assert plan.data["folded"]
    model = mixbits.apply(folder, plan, rounding="search", **SIZES)
    assert (model.model.norm.weight == 1).all()
    with pytest.raises(mixbits.UsageError, match="--rotate helps to make a plan"):
        mixbits.apply(folder, plan, rounding="search", rotate="none", **SIZES)
