"""Models beyond the usual ones go through the default command, are loaded and run."""

from pathlib import Path

import pytest
import torch
from tiny import SMALL, VOCAB, write_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

import mixbits
from mixbits.export.__main__ import main as export_main
from mixbits.formats.arrange import arrangement_of
from mixbits.model.layout import find_linears
from mixbits.model.probing import probed
from mixbits.quantize import main
from mixbits.rounding.nearest import fake_input
from mixbits.runtime.linear import PackedLinear

if not (Path(__file__).parents[2] / "benchmarks").is_dir():
    pytest.skip("installed without its benchmarks", allow_module_level=True)

from benchmarks.quality.architectures import SPREAD, run_kind
from benchmarks.tools.tiny_models import save_model, small_config

# What the default command makes of them; SPREAD and the whole table are
# benchmarks/quality/architectures.py's.
KINDS = (
    "bloom",  # ALiBi
    "cohere2",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gemma3",  # sees: its tower has as many layers as the decoder
    "glm4",  # gate and up in one linear
    "gpt2",  # weights are stored as [K, N]
    "gpt_bigcode",  # its initialisation looks at its linears' weights
    "gpt_neox",
    "gpt_oss",
    "nanochat",
    "phi",
    "phi3",  # q, k and v in one linear
    "qwen3_next",
)


def make(folder: Path, kind: str) -> torch.nn.Module:
    save_model(folder, small_config(kind))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def packed_names(model: torch.nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, PackedLinear)]


def twin_logits(model: torch.nn.Module, packed: torch.nn.Module, ids: Tensor) -> Tensor:
    """The original model's, with what packed linears stand for, by torch's own product."""

    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        one = packed.get_submodule(name)
        if not isinstance(one, PackedLinear):
            return torch.nn.functional.linear(x, weight, bias)
        arrangement = arrangement_of(one.recipe)
        rounded = fake_input(x, one.recipe, arrangement).to(x.dtype)
        return torch.nn.functional.linear(rounded, arrangement.weight(one.weight).to(x.dtype), bias)

    with probed(model, find_linears(model), probe):
        return model(ids).logits.float()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_is_quantized_loaded_and_runs(kind: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", kind)
    dataset = str(write_ids(tmp_path / "ids.npy"))
    out = tmp_path / "out"
    budget = ["--avg-bits", "6", "--rounding", "gptq", "--out", str(out)]
    assert main([str(tmp_path / "model"), "--dataset", dataset, *SMALL, *budget]) == 0

    packed = mixbits.load(out, dtype=torch.float32)
    assert len(packed_names(packed)) >= 8
    ids = torch.arange(24).reshape(2, 12) * 5 % VOCAB
    logits = packed(ids).logits.float()
    hub = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(hub(ids).logits.float(), logits)
    # In float32 only a code of an input that lies between two may be the other one.
    expected = twin_logits(model, packed, ids)
    assert (logits - expected).norm() <= 2.0**-8 * expected.norm()
    generated = packed.generate(ids[:1], max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert generated.shape == (1, 15)


@pytest.mark.parametrize("kind", SPREAD)
def test_a_spread_of_the_survey(kind: str) -> None:
    """8 bits, load, exports: equal to the same linears rounded in place, nothing lost."""
    row = run_kind(kind)
    if kind == "jetmoe":  # most of it is experts of a formula that is not known
        assert row["result"] == "refused" and "at least half of the weights" in row["reason"]
        return
    assert row["result"] == "equal", row["reason"]
    assert float(row["packed_share"]) > 0.5


def test_weights_stored_the_other_way_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Conv1D` weights are rounded along their inputs, in packed and in fake models alike."""
    make(tmp_path / "model", "gpt2")
    command = [str(tmp_path / "model"), "--dataset", str(write_ids(tmp_path / "ids.npy")), *SMALL]
    rounding = ["--rounding", "rtn", "--schemes", "W4A16,W8A16", "--avg-bits", "6"]
    for name, more in (("packed", []), ("fake", ["--fake"])):
        assert main([*command, *rounding, "--out", str(tmp_path / name), *more]) == 0
    fake = AutoModelForCausalLM.from_pretrained(tmp_path / "fake")
    packed = mixbits.load(tmp_path / "packed")
    for name in packed_names(packed):
        weight = packed.get_submodule(name).weight
        assert torch.equal(fake.get_submodule(name).weight, weight.T.bfloat16())

    capsys.readouterr()
    export = [str(tmp_path / "packed"), "--format", "compressed-tensors", "--out"]
    assert export_main([*export, str(tmp_path / "exported")]) == 2
    mine = [*command, *rounding, "--target", "vllm", "--out", str(tmp_path / "vllm")]
    assert main(mine) == 2
    assert capsys.readouterr().err.count("got Conv1D (transformer.h.0.attn.c_attn)") == 2


def test_ignored_linears_stay_as_they_are(tmp_path: Path) -> None:
    """Mamba multiplies with the weight of dt_proj itself, in most versions of transformers."""
    make(tmp_path / "model", "mamba")
    command = [str(tmp_path / "model"), "--dataset", str(write_ids(tmp_path / "ids.npy")), *SMALL]
    assert main([*command, "--ignore", "*.dt_proj", "--out", str(tmp_path / "out")]) == 0
    packed = packed_names(mixbits.load(tmp_path / "out"))
    assert packed and not any(name.endswith("dt_proj") for name in packed)


@pytest.mark.parametrize(
    ("pattern", "complaint"), [("*", "must leave a linear"), ("nothing", "matches no unit")]
)
def test_what_cannot_be_ignored(
    pattern: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "model", "phi3")
    assert main([str(tmp_path / "model"), "--dry-run", *SMALL, "--ignore", pattern]) == 2
    assert complaint in capsys.readouterr().err
