"""What is written is what was predicted, what is read is what was written, and nothing is half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB, add_tokenizer, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import mixbits
from mixbits.checkpoint import folder as checkpoint
from mixbits.checkpoint.folder import make_shards, predicted_bytes, tensor_specs
from mixbits.checkpoint.saving import save
from mixbits.errors import UsageError
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.model.layout import LinearInfo, find_linears, meta_model, weight_of
from mixbits.runtime.fake import FakeLinear
from mixbits.runtime.linear import PackedLinear
from mixbits.runtime.swap import swap_linears
from mixbits.source.source import Source, open_source

MIX = ["MXFP4", "MXFP8", "W4A16", "BF16", "W2A16G32ASYM", "MXFP8E5M2A16", "W8A16G64ASYM"]


def mixed(linears: list[LinearInfo]) -> dict[str, Any]:
    """Every scheme in turn."""
    return {info.name: parse_recipe(MIX[i % len(MIX)]) for i, info in enumerate(linears)}


def saved(
    tmp_path: Path, kind: str = "llama", head: bool = False, **overrides: object
) -> tuple[Source, Any, list[LinearInfo], dict[str, Any], Path]:
    """A model, its linears, an assignment, and the folder that it was saved into."""
    source = open_source(str(make_model(tmp_path / "model", kind, **overrides)))
    add_tokenizer(source.path)
    model = source.load()
    linears = find_linears(model, include_head=head)
    assignment = mixed(linears)
    folder = tmp_path / "packed"
    folder.mkdir()
    save(folder, source, model, linears, assignment, {"note": "kept"})
    return source, model, linears, assignment, folder


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def packed_in_place(model: Any, assignment: dict[str, Any]) -> Any:
    """The model with packed linears, never saved."""
    names = [n for n, s in assignment.items() if s.packed]

    def make(name: str, weight: Tensor, bias: Any) -> PackedLinear:
        return PackedLinear.from_weight(weight, assignment[name], bias, name)

    swap_linears(model, names, make)
    return model


# Kinds, heads and ties: (kind, quantize the head, overrides)
CASES: list[tuple[str, bool, dict[str, Any]]] = [
    ("llama", False, {}),
    ("llama", True, {}),
    ("llama", True, {"tie_word_embeddings": True}),
    ("qwen2", False, {}),
    ("qwen3", True, {"vocab_size": 131}),
    ("gemma", True, {}),
    ("mistral", False, {"dtype": "float16"}),
    ("qwen3_moe", True, {}),
    ("mixtral", False, {}),
]


@pytest.mark.parametrize(("kind", "head", "overrides"), CASES)
def test_size_tensors_and_logits_are_as_said(
    kind: str, head: bool, overrides: dict[str, Any], tmp_path: Path
) -> None:
    source, model, linears, assignment, folder = saved(tmp_path, kind, head, **overrides)
    shapes = meta_model(source.config)
    assert on_disk(folder) == predicted_bytes(shapes, linears, assignment, source.dtype)
    stored = load_file(folder / "model.safetensors")
    specs = tensor_specs(shapes, linears, assignment, source.dtype)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == {
        s.name: (s.dtype, s.shape) for s in specs
    }
    ids = torch.arange(2 * 24).reshape(2, 24) % VOCAB
    loaded = mixbits.load(folder)
    expected = packed_in_place(model, assignment)(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.dtype == source.dtype
    # The embedding is the original's even where the head was tied to it.
    assert torch.equal(
        loaded.get_input_embeddings().weight, source.load().get_input_embeddings().weight
    )


def test_experts_left_alone_beside_packed_ones(tmp_path: Path) -> None:
    source, _, linears, assignment, folder = saved(tmp_path, "qwen3_moe")
    stored = load_file(folder / "model.safetensors")
    plain = [i for i in linears if i.is_expert and not assignment[i.name].packed]
    assert plain
    reference = source.load()
    for info in plain:
        value = stored[f"{info.name}.weight_plain"]
        assert torch.equal(value, weight_of(reference, info))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_block_of_experts_left_alone(kind: str, tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "model", kind)))
    model = source.load()
    linears = find_linears(model)
    assignment = {i.name: parse_recipe("MXFP8") for i in linears if not i.is_expert}
    save(tmp_path, source, model, linears, assignment, {})
    assert on_disk(tmp_path) == predicted_bytes(model, linears, assignment, source.dtype)
    ids = torch.arange(24)[None]
    expected = packed_in_place(model, assignment)(ids).logits
    assert torch.equal(mixbits.load(tmp_path)(ids).logits, expected)


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    source, model, linears, assignment, folder = saved(tmp_path)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert on_disk(folder) == predicted_bytes(model, linears, assignment, source.dtype)
    shards = make_shards(tensor_specs(model, linears, assignment, source.dtype))
    for shard in shards:
        assert (folder / shard.file).stat().st_size == shard.nbytes
        assert len(shard.specs) == 1 or sum(s.nbytes for s in shard.specs) <= 20_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {s.name: shard.file for shard in shards for s in shard.specs}
    assert index["metadata"]["total_size"] == sum(s.nbytes for h in shards for s in h.specs)
    ids = torch.arange(24)[None]
    expected = packed_in_place(model, assignment)(ids).logits
    assert torch.equal(mixbits.load(folder)(ids).logits, expected)


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    source, _, linears, assignment, folder = saved(tmp_path, "qwen3_moe")
    again = tmp_path / "again"
    again.mkdir()
    save(again, source, source.load(), linears, assignment, {"note": "kept"})
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_config_and_companions(tmp_path: Path) -> None:
    source, _, _, assignment, folder = saved(tmp_path, head=True, tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "mixbits"
    assert quantization["mixbits_version"] == mixbits.__version__
    assert quantization["layout"] == 1 and quantization["note"] == "kept"
    assert quantization["modules"] == {n: s.name for n, s in assignment.items() if s.packed}
    assert config["tie_word_embeddings"] is (not assignment["lm_head"].packed)
    assert config["dtype"] == "bfloat16" and config["hidden_size"] == 64
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source.path / name).read_bytes()


# ------------------------------------------------------------------------------ damaged folders

PACKED = "model.layers.0.self_attn.q_proj"


def _edit_tensors(change: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def _edit_config(change: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return edit


def sign(folder: Path) -> None:
    """Let the checksum in config.json be that of what lies there."""
    tensors = load_file(folder / "model.safetensors")

    def change(quantization: dict[str, Any]) -> None:
        crcs = [checkpoint.crc(name, value) for name, value in tensors.items()]
        quantization["checksum"] = checkpoint.checksum(crcs, quantization)

    _edit_config(change)(folder)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _cast(name: str, dtype: torch.dtype) -> Any:
    return _edit_tensors(lambda t: t.update({name: t[name].to(dtype)}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "packed missing": (_edit_tensors(lambda t: t.pop(f"{PACKED}.weight_packed")), "weight_packed"),
    "scale missing": (_edit_tensors(lambda t: t.pop(f"{PACKED}.weight_scale")), "weight_scale"),
    "norm missing": (_edit_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "renamed": (
        _edit_tensors(lambda t: t.update({f"{PACKED}.codes": t.pop(f"{PACKED}.weight_packed")})),
        f"{PACKED}.codes must be none",
    ),
    "one too many": (_edit_tensors(lambda t: t.update(x=torch.ones(1))), "x must be none: got F32"),
    "float scale": (_cast(f"{PACKED}.weight_scale", torch.float16), r"must be U8 .* got F16"),
    "wide codes": (_cast(f"{PACKED}.weight_packed", torch.int32), r"must be U8 .* got I32"),
    "wide norm": (_cast("model.norm.weight", torch.float32), r"must be BF16 \[64\]: got F32"),
    "short codes": (
        _edit_tensors(
            lambda t: t.update(
                {f"{PACKED}.weight_packed": t[f"{PACKED}.weight_packed"][:, 1:].clone()}
            )
        ),
        r"must be U8 \[64, 32\]: got U8 \[64, 31\]",
    ),
    "truncated": (_truncate, "is the file complete"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "is the file complete"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named"),
    "unknown linear": (
        _edit_config(lambda q: q["modules"].update({"model.layers.7.mlp.up_proj": "MXFP4"})),
        "a linear that the model lacks: model.layers.7.mlp.up_proj",
    ),
    "not a linear": (
        _edit_config(lambda q: q["modules"].update({"model.norm": "MXFP4"})),
        "a linear that the model lacks: model.norm",
    ),
    "unknown scheme": (_edit_config(lambda q: q["modules"].update({PACKED: "FP3"})), "FP3"),
    "other scheme": (_edit_config(lambda q: q["modules"].update({PACKED: "MXFP8"})), "must be U8"),
    "forgotten linear": (_edit_config(lambda q: q["modules"].pop(PACKED)), f"{PACKED}.weight"),
    "modules a list": (
        _edit_config(lambda q: q.update(modules=[PACKED])),
        "modules must be an object",
    ),
    "bad scale mode": (_edit_config(lambda q: q.update(weight_scale_mode="up")), "_scale_mode"),
    "another layout": (_edit_config(lambda q: q.update(layout=2)), "are of layout 1: got 2"),
    "future layout": (_edit_config(lambda q: q.update(layout=3)), "layouts 1 and 2: got 3"),
    "other method": (
        _edit_config(lambda q: q.update(quant_method="gptq")),
        "no mixbits checkpoint",
    ),
    "no method": (_edit_config(lambda q: q.clear()), "no mixbits checkpoint"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "json list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "must hold config.json"),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("intact"))[-1]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_sentence(
    damage: str, intact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(intact, folder)
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(UsageError, match=message) as caught:
        mixbits.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_dtype_that_packed_linears_cannot_take_is_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(tmp_path, "llama", False)[-1]
    with pytest.raises(UsageError, match="dtype must be bfloat16, float16 or float32: got torch"):
        mixbits.load(folder, dtype=dtype)
    with pytest.raises(UsageError, match="dtype must be bfloat16, float16 or float32: got torch"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_a_damaged_order_of_columns_is_refused(tmp_path: Path) -> None:
    """It would otherwise address memory beyond the input."""
    source = open_source(str(make_model(tmp_path / "model")))
    model = source.load()
    linears = find_linears(model)
    order = tuple(reversed(range(64)))
    low, high = parse_scheme("MXFP4"), parse_scheme("MXFP8")
    recipe = Recipe(((high, 32), (low, 32)), order)
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", source, model, linears, {PACKED: recipe}, {})
    x = torch.randn(3, 64)
    expected = FakeLinear(weight_of(model, linears[0]), recipe)(x)
    assert linears[0].name == PACKED
    got = mixbits.load(tmp_path / "out", dtype=torch.float32).get_submodule(PACKED)(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for place, message in ((63, "each of 64 columns once"), (-5, "each of 64 columns once")):

        def change(tensors: dict[str, Any], place: int = place) -> None:
            tensors[f"{PACKED}.order"][0] = place - 1

        _edit_tensors(change)(tmp_path / "out")
        with pytest.raises(UsageError, match="checksum"):
            mixbits.load(tmp_path / "out")
        sign(tmp_path / "out")
        with pytest.raises(UsageError, match=message):
            mixbits.load(tmp_path / "out")


@pytest.mark.parametrize(
    "recipe",
    [
        {"segments": [["MXFP8", 32]], "ordered": False, "rotated": False},
        {"segments": [["MXFP8", 32], ["MXFP4", 33]], "ordered": False, "rotated": False},
        {"segments": [["BF16", 64]], "ordered": False, "rotated": False},
        {"segments": [["MXFP8", -1], ["MXFP4", 65]], "ordered": False, "rotated": False},
        {"segments": [], "ordered": False, "rotated": False},
        {"segments": "MXFP4", "ordered": False, "rotated": False},
        {"segments": [["MXFP4", 64]], "ordered": True, "rotated": False},
        {"ordered": False},
        ["MXFP4"],
        None,
        7,
    ],
    ids=str,
)
def test_a_recipe_that_does_not_fit_is_refused(recipe: Any, intact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(intact, folder)
    _edit_config(lambda q: q["modules"].update({PACKED: recipe}))(folder)
    with pytest.raises(UsageError) as caught:
        mixbits.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_transformers_alone_refuses_a_future_layout(intact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(intact, folder)
    AutoModelForCausalLM.from_pretrained(folder)
    DAMAGE["future layout"][0](folder)
    with pytest.raises(UsageError, match="layouts 1 and 2: got 3"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_unknown_backend_is_refused(intact: Path) -> None:
    with pytest.raises(UsageError, match="backend must be one of"):
        mixbits.load(intact, backend="abacus")
    with pytest.raises(UsageError, match="cannot be used"):
        mixbits.load(intact, backend="cuda")
    with pytest.raises(UsageError, match="8-bit floats: the cuda backend is needed: got cpu"):
        mixbits.load(intact, backend="cpu", fp8_activations=True)
