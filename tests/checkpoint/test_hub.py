"""transformers' own from_pretrained and save_pretrained on packed checkpoints."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from recipes import slabs, whole
from safetensors.torch import load_file
from tiny import VOCAB, make_model, read
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto

import mixbits
from mixbits.checkpoint import folder as checkpoint
from mixbits.checkpoint import stock, transformers_quantizer
from mixbits.checkpoint.saving import save
from mixbits.errors import UsageError
from mixbits.export.__main__ import main as export
from mixbits.model.layout import find_linears
from mixbits.runtime.linear import PackedLinear
from mixbits.runtime.swap import Experts
from mixbits.source.source import open_source

# (kind, recipes, quantize the head, overrides)
CASES: dict[str, tuple[str, Any, bool, dict[str, Any]]] = {
    "llama": ("llama", whole, False, {}),
    "llama tied": ("llama", whole, False, {"tie_word_embeddings": True}),
    "llama untied by us": ("llama", whole, True, {"tie_word_embeddings": True}),
    "llama head": ("llama", whole, True, {}),
    "qwen3 tied": ("qwen3", whole, False, {}),
    "qwen3": ("qwen3", whole, True, {"tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3_moe", whole, True, {}),
    "qwen3_moe tied": ("qwen3_moe", whole, False, {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", whole, False, {}),
    "mixtral tied": ("mixtral", whole, False, {"tie_word_embeddings": True}),
    "qwen2 biases": ("qwen2", whole, False, {}),
    "llama slabs": ("llama", slabs, True, {}),
    "qwen2 slabs": ("qwen2", slabs, False, {}),
    "mixtral slabs": ("mixtral", slabs, False, {}),
}


def write(folder: Path, kind: str, make: Any, head: bool, overrides: dict[str, Any]) -> Path:
    source = open_source(str(make_model(folder / "model", kind, **overrides)))
    model = source.load()
    linears = find_linears(model, include_head=head)
    (folder / "packed").mkdir()
    save(folder / "packed", source, model, linears, make(linears), {"act_scale_mode": "even"})
    return folder / "packed"


@pytest.fixture(scope="module", params=list(CASES))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub"), *CASES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama"), *CASES["llama"])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2 * 24).reshape(2, 24) % VOCAB).logits


def test_saving_what_was_loaded_gives_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (packed / "model.safetensors").read_bytes()
    configs = [json.loads((f / "config.json").read_text()) for f in (packed, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(mixbits.load(tmp_path / "again")), logits(model))


def test_it_is_the_model_that_mixbits_loads(packed: Path) -> None:
    ours, theirs = mixbits.load(packed), AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(ours), logits(theirs))
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(a) is type(b)
    ids = torch.arange(5)[None]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    tied = json.loads((packed / "config.json").read_text())["tie_word_embeddings"]
    head = theirs.get_output_embeddings()
    assert tied is (getattr(head, "weight", None) is theirs.get_input_embeddings().weight)
    if theirs.config.model_type in ("qwen3_moe", "mixtral"):
        assert isinstance(theirs.model.layers[0].mlp.experts, Experts)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_and_device_map(llama: Path, device_map: Any, dtype: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype, device_map=device_map)
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    stored = load_file(llama / "model.safetensors")
    for name, buffer in model.named_buffers():
        if "weight_" in name:
            assert_same_bits(buffer, stored[name])
    given = None if dtype == "auto" else dtype
    assert torch.equal(logits(model), logits(mixbits.load(llama, dtype=given)))


def test_a_copy_in_another_dtype_can_be_saved_and_loaded(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert torch.equal(logits(mixbits.load(tmp_path)), logits(model))


def test_several_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path, max_shard_size="30kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(mixbits.load(tmp_path)), logits(model))


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(torch.float16).to("cpu"),
        lambda m: m.model.layers.half().double() and m,  # transformers forbids it of a whole model
    ],
    ids=["bfloat16", "float16", "half and double"],
)
def test_codes_and_scales_survive_a_change_of_dtype(convert: Any, llama: Path) -> None:
    model = convert(AutoModelForCausalLM.from_pretrained(llama))
    stored = load_file(llama / "model.safetensors")
    names = [name for name, _ in model.named_buffers() if "weight_" in name]
    assert {stored[name].dtype for name in names} == {torch.uint8, torch.float16}
    for name in names:
        assert_same_bits(model.get_buffer(name), stored[name])


# ------------------------------------------------------------------------------- plain errors


def test_damage_is_refused_by_transformers_alone(llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="checksum"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(UsageError, match="is the file complete"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_fault_of_our_own_is_no_fault_of_the_checkpoint(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "checksum", None)  # which is called amid from_pretrained
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        mixbits.load(llama)


def test_a_state_dict_is_refused(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    config = AutoConfig.from_pretrained(llama)
    with pytest.raises(UsageError, match="from its folder"):
        type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


def test_the_checksum_is_of_tensors_not_of_files() -> None:
    a, b = torch.arange(6, dtype=torch.int16), torch.ones(3, dtype=torch.bfloat16)
    crcs = [checkpoint.crc("a", a), checkpoint.crc("b", b)]
    said = {"layout": 1, "modules": {"a": "MXFP4"}, "note": "not counted"}
    total = checkpoint.checksum(crcs, said)
    assert checkpoint.checksum(reversed(crcs), {**said, "note": ""}) == total
    others = [
        [checkpoint.crc("b", a), checkpoint.crc("a", b)],
        [checkpoint.crc("a", a.flip(0)), crcs[1]],
        crcs[:1],
    ]
    assert total not in {checkpoint.checksum(other, said) for other in others}
    assert checkpoint.checksum(crcs, {**said, "modules": {"a": "MXFP8"}}) != total


# ------------------------------------------------------------------------------- registration

LOADS = """
import sys
{first}
{second}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""


@pytest.mark.parametrize(
    "imports",
    [
        ("import mixbits", "import transformers"),
        ("import transformers.quantizers", "import transformers, mixbits"),
    ],
    ids=" then ".join,
)
def test_either_may_be_imported_first(imports: tuple[str, str], llama: Path) -> None:
    code = LOADS.format(first=imports[0], second=imports[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "PackedLinear", done.stderr[-2000:]
    assert "MISSING" not in done.stderr


ROOMS = """
import sys, torch, mixbits
model = mixbits.load(sys.argv[1])
model.generate(torch.arange(5)[None], max_new_tokens=2)
print(*sorted({name.split(".")[1] for name in sys.modules if name.startswith("mixbits.")}))
"""


def test_loading_imports_nothing_that_quantizes(llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ROOMS, str(llama)], capture_output=True, text=True, check=False
    )
    rooms = set(done.stdout.split())
    assert {"checkpoint", "runtime"} <= rooms, done.stderr[-2000:]
    others = {"measuring", "planning", "rounding", "pipeline", "report", "export", "quantize"}
    assert not rooms & others


def test_modules_may_be_reloaded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.meta_path)
    for _ in range(2):
        importlib.reload(mixbits)
        assert [f.__module__ for f in sys.meta_path if f not in before] == []
    # Other tests hold the classes that are there now: they are put back.
    names = ("MixbitsConfig", "MixbitsQuantizer")
    for name in names:
        monkeypatch.setattr(transformers_quantizer, name, getattr(transformers_quantizer, name))
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(mapping, "mixbits", mapping["mixbits"])
    importlib.reload(transformers_quantizer)
    assert auto.AUTO_QUANTIZER_MAPPING["mixbits"] is transformers_quantizer.MixbitsQuantizer
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert any(isinstance(m, PackedLinear) for m in model.modules())
    importlib.reload(importlib.import_module("transformers.quantizers"))
    assert "mixbits" in auto.AUTO_QUANTIZER_MAPPING


def test_config_says_what_to_install(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())["quantization_config"]
    assert "pip install ." in config["to_load"] and "import mixbits" in config["to_load"]


# ------------------------------------------------------------------------------- without mixbits

PLAINLY = """
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_transformers_alone_refuses_it_and_says_what_to_do(llama: Path, tmp_path: Path) -> None:
    """Not random weights; what is saved again is refused as well."""
    again = AutoModelForCausalLM.from_pretrained(llama)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(mixbits.load(tmp_path / "again")), logits(again))
    for folder in (llama, tmp_path / "again"):
        assert "`import mixbits`" in read(folder / "config.json")["transformers_weights"]
    words = [sys.executable, "-c", PLAINLY, str(tmp_path / "again")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "packed, and needs `import mixbits`" in done.stdout, done.stderr[-2000:]


def test_a_folder_that_is_not_so_marked_is_loaded_too(llama: Path, tmp_path: Path) -> None:
    """As older ones, and those of other tools that write config.json anew."""
    shutil.copytree(llama, tmp_path / "old")
    config = read(tmp_path / "old" / "config.json")
    del config["transformers_weights"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(mixbits.load(tmp_path / "old")), logits(mixbits.load(llama)))


# ------------------------------------------------------------------------------- names of the hub


@pytest.fixture
def cached(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`me/smol`, with a branch `old`, as it lies in the hub's cache."""
    repository = tmp_path / "cache" / "models--me--smol"
    for branch, commit in (("main", "a" * 40), ("old", "b" * 40)):
        shutil.copytree(llama, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    (repository / "snapshots" / ("b" * 40) / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "me/smol"


def test_a_name_of_the_hub_is_loaded(cached: str, llama: Path) -> None:
    for model in (mixbits.load(cached), mixbits.load(Path(cached), revision="main")):
        assert torch.equal(logits(model), logits(mixbits.load(llama)))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(cached)), logits(model))
    with pytest.raises(UsageError, match="no mixbits checkpoint"):
        mixbits.load(cached, revision="old")
    with pytest.raises(UsageError, match="no folder, and no model of that name could be fetched"):
        mixbits.load("me/none")
    with pytest.raises(UsageError, match="no folder, and no model of that name could be fetched"):
        mixbits.load(cached, revision="new")
    with pytest.raises(UsageError, match="a revision is one of the hub's"):
        mixbits.load(llama, revision="main")
    with pytest.raises(UsageError, match="is no folder"):
        mixbits.load(llama / "none")


def test_a_name_of_the_hub_is_exported(cached: str, tmp_path: Path) -> None:
    words = [cached, "--format", "plain", "--out", str(tmp_path / "out")]
    assert export([*words, "--revision", "old"]) == 2
    assert export(words) == 0
    assert read(tmp_path / "out" / "mixbits-export.json")["source"] == cached


# ------------------------------------------------------------------------------- parameters


def test_parameters_are_counted_as_in_the_original(packed: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(packed.parent / "model")
    model = AutoModelForCausalLM.from_pretrained(packed)
    untied = model.config.tie_word_embeddings != original.config.tie_word_embeddings
    more = original.get_input_embeddings().weight.numel() * untied  # a head of its own now
    assert model.num_parameters() == original.num_parameters() + more
    inner = model.num_parameters(exclude_embeddings=True)
    assert inner == original.num_parameters(exclude_embeddings=True) + more
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable
    assert model.model.num_parameters() == original.model.num_parameters()
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert model.get_memory_footprint() == sum(tensors.values())


def test_copies_count_their_own_parameters(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.num_parameters() == model.num_parameters()
        assert copied.num_parameters.args[0] is copied
