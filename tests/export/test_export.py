"""Exported weights stand for the same numbers; what cannot be held is refused, or its loss told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exported import export, fake_model, loaded, logits, packed
from safetensors.torch import load_file, save_file
from tiny import read
from torch import Tensor
from transformers import AutoRoundConfig

from mixbits.checkpoint import folder as checkpoint
from mixbits.errors import UsageError
from mixbits.export import auto_round, compressed_tensors
from mixbits.export.__main__ import main
from mixbits.export.packed import Carrier, PackedModel
from mixbits.export.targets import TARGETS, fit
from mixbits.formats import reference
from mixbits.formats.pack import pack
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Format, Recipe, Scheme, parse_scheme
from mixbits.source.weights import Files

FORMATS = [
    Format("e2m1", 32),
    Format("e4m3", 32),
    *(Format(e, g, s) for e in ("int4", "int8") for g in (32, 64) for s in (True, False)),
]
ROWS, COLUMNS = 96, 192


def weight(
    fmt: Format, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[reference.Quantized, Any]:
    """Codes of random values, some all of one sign, and the tensors that are stored for them."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    x[0], x[1] = x[0].abs(), -x[1].abs()
    quantized = reference.quantize(x, fmt)
    return quantized, pack(quantized, fmt)


def fields(word: Tensor, bits: int) -> Tensor:
    """int32 [A, B] -> its fields of `bits` [A, B * 32 / bits], one by one."""
    numbers = word.long() & 0xFFFFFFFF
    parts = [numbers >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]
    return torch.stack(parts, -1).flatten(1)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_compressed_tensors_has_the_same_values(fmt: Format) -> None:
    quantized, stored = weight(fmt)
    made = compressed_tensors.tensors(stored, Scheme("any", fmt), COLUMNS)
    said = compressed_tensors.shapes(Scheme("any", fmt), ROWS, COLUMNS, torch.float16)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in made.items()} == said
    if fmt.element == "e4m3":
        scale = reference.e8m0_to_float(made["weight_scale"]).repeat_interleave(32, 1)
        assert torch.equal(made["weight"].float() * scale, reference.dequantize(quantized, fmt))
    if fmt.is_float:
        return
    assert torch.equal(fields(made["weight_packed"], fmt.bits), quantized.codes.long())
    if quantized.zero_point is not None:
        points = fields(made["weight_zero_point"].t(), fmt.bits).t()
        assert torch.equal(points, quantized.zero_point.long())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_compressed_tensors_itself_agrees(fmt: Format) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    quantized, stored = weight(fmt)
    config = compressed_tensors.quantization_config({"layer": Scheme("any", fmt)}, [])
    group = config["config_groups"]["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    plain = compressor.decompress(
        compressed_tensors.tensors(stored, Scheme("any", fmt), COLUMNS),
        QuantizationScheme(**group),
    )["weight"]
    expected = reference.dequantize(quantized, fmt).to(plain.dtype)
    assert torch.equal(plain, expected)


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS if not f.is_float] + [Format("int2", 64)], ids=str
)
def test_auto_round_has_the_same_values(fmt: Format) -> None:
    quantized, stored = weight(fmt)
    less_one = fmt.symmetric
    made = auto_round.tensors(stored, Scheme("any", fmt), COLUMNS, less_one)
    said = auto_round.shapes(Scheme("any", fmt), ROWS, COLUMNS)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in made.items()} == said
    assert torch.equal(fields(made["qweight"].t(), fmt.bits), quantized.codes.long())
    assert torch.equal(made["scales"].t(), quantized.scale)
    points = fields(made["qzeros"], fmt.bits) + less_one
    half = torch.full_like(points, 1 << (fmt.bits - 1))
    assert torch.equal(points, half if fmt.symmetric else quantized.zero_point.t().long())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "schemes", ["MXFP4A16,MXFP8A16,BF16", "MXFP4,MXFP8", "W4A16G32,W8A16G32", "MXFP4,W8A16G32"]
)
def test_transformers_computes_the_same_through_compressed_tensors(
    tmp_path: Path, schemes: str
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    source, assignment, folder = packed(tmp_path, schemes)
    model = loaded(export(folder, "compressed-tensors"))
    assert torch.equal(logits(model), logits(fake_model(source, assignment)))


def test_transformers_computes_the_same_through_auto_round(tmp_path: Path) -> None:
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    source, assignment, folder = packed(tmp_path, "MXFP4,MXFP8,BF16", mode="floor")
    model = loaded(export(folder, "auto-round"))
    assert torch.equal(logits(model), logits(fake_model(source, assignment)))


@pytest.mark.parametrize("schemes", ["W2A16G32,W4A16G32,W8A16G32,BF16", "W4A16G32ASYM,W8A16G32"])
def test_auto_round_integers_are_the_same_weights(tmp_path: Path, schemes: str) -> None:
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    source, assignment, folder = packed(tmp_path, schemes)
    expected = fake_model(source, assignment)
    its_torch = AutoRoundConfig(backend="torch")  # which needs no other package
    model = loaded(export(folder, "auto-round"), quantization_config=its_torch)
    for name, scheme in assignment.items():
        if scheme.packed:
            ours = expected.get_submodule(name)
            x = torch.eye(ours.weight_fake.shape[1], dtype=torch.float16)
            with torch.no_grad():
                theirs = model.get_submodule(name)(x).t()
            # It multiplies in float16: one rounding of each value.
            assert torch.equal(theirs, ours.weight_fake.half())


def test_shards_hold_what_one_file_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, folder = packed(tmp_path, "MXFP4A16,W4A16G32ASYM,W2A16G32,BF16")
    whole = export(folder, "compressed-tensors", "--lossy")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 6000)
    out = export(folder, "compressed-tensors", "--lossy")
    parts = {path.name: load_file(path) for path in sorted(out.glob("*.safetensors"))}
    assert len(parts) > 4
    joined = {name: value for part in parts.values() for name, value in part.items()}
    single = load_file(whole / "model.safetensors")
    assert joined.keys() == single.keys()
    for name, value in single.items():
        assert value.dtype == joined[name].dtype and torch.equal(value, joined[name])
    index = read(out / "model.safetensors.index.json")["weight_map"]
    assert index == {name: file for file, part in parts.items() for name in part}
    # A linear whose tensors lie in two files is read twice, and its loss told once.
    assert read(out / "mixbits-export.json") == read(whole / "mixbits-export.json")
    assert not Path(read(out / "mixbits-export.json")["source"]).is_absolute()


def test_what_does_not_fit_is_converted_and_the_loss_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a16 = {name: parse_scheme(name) for name in ("MXFP4A16", "MXFP8A16", "MXFP8E5M2A16")}
    order = tuple(torch.arange(160).unflatten(0, (5, 32))[[4, 0, 3, 1, 2]].flatten().tolist())
    mlp = "model.layers.0.mlp"
    slabs = Recipe(((a16["MXFP8A16"], 96), (a16["MXFP4A16"], 64)), order)
    recipes: dict[str, Any] = {
        f"{mlp}.down_proj": slabs,
        f"{mlp}.up_proj": Recipe.plain(a16["MXFP8E5M2A16"]),
        "model.layers.0.self_attn.o_proj": Recipe(((a16["MXFP8A16"], 64),), rotated=True),
    }
    source, _, folder = packed(tmp_path, "MXFP4A16", recipes=recipes)
    argv = [str(folder), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "3 of 15" in error and "down_proj is divided into slabs" in error
    assert not (tmp_path / "out").exists()

    assert main([*argv, "--lossy"]) == 0
    report = read(tmp_path / "out" / "mixbits-export.json")
    assert set(report["relative_errors"]) == set(recipes)
    # Blocks of both parts stay together, and their values are values of MXFP8.
    assert report["relative_errors"][f"{mlp}.down_proj"] == 0.0
    assert 0 < report["relative_errors"]["model.layers.0.self_attn.o_proj"] < 0.05
    printed = capsys.readouterr().out
    assert "15 packed linears, 3 of them converted" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("vllm serve out\n", 'AutoModelForCausalLM.from_pretrained("out")', "15 linears"):
        assert part in card
    assert str(tmp_path) not in card
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scale = reference.e8m0_to_float(stored[f"{mlp}.down_proj.weight_scale"]).repeat_interleave(
        32, 1
    )
    plain = source.load().get_submodule(f"{mlp}.down_proj").weight[:, list(order)].float()
    rounded = torch.cat(
        [
            reference.fake_quantize(plain[:, :96], a16["MXFP8A16"].weight),  # type: ignore[arg-type]
            reference.fake_quantize(plain[:, 96:], a16["MXFP4A16"].weight),  # type: ignore[arg-type]
        ],
        1,
    )
    restored = torch.empty_like(rounded)
    restored[:, list(order)] = rounded
    assert torch.equal(stored[f"{mlp}.down_proj.weight"].float() * scale, restored)


def test_scales_are_not_rounded_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, folder = packed(tmp_path, "W4A16G32ASYM", head=False)
    argv = [str(folder), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "--dtype float16" in capsys.readouterr().err
    assert main([*argv, "--lossy"]) == 0
    losses = read(tmp_path / "out" / "mixbits-export.json")["relative_errors"]
    assert len(losses) == 14 and all(0 < loss < 2**-8 for loss in losses.values())
    assert main([*argv, "--dtype", "float16", "--overwrite"]) == 0
    losses = read(tmp_path / "out" / "mixbits-export.json")["relative_errors"]
    assert set(losses) <= {"model.embed_tokens.weight", "lm_head.weight"}  # bfloat16 reaches lower
    assert read(tmp_path / "out" / "config.json")["dtype"] == "float16"
    scales = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    assert torch.equal(scales[name], PackedModel.open(folder).tensor(name))


def with_tensors(folder: Path, tensors: dict[str, Tensor]) -> PackedModel:
    """The packed model of a folder, some of whose tensors are others; the new ones are carried."""
    model = PackedModel.open(folder)
    path = folder.parent / "others.safetensors"
    save_file(tensors, path)
    specs = dict(model.specs)
    specs |= {
        name: replace(specs[name], dtype=value.dtype)
        for name, value in tensors.items()
        if name in specs
    }
    files, others = Files(model.stock.files.paths), Files([path])
    files.places |= others.places
    files.headers |= others.headers
    carried = [name for name in tensors if name not in specs]
    stock = replace(model.stock, files=files)
    return replace(model, specs=specs, stock=stock, carried=carried)


def written(folder: Path, model: PackedModel, writer: Any, name: str, dtype: torch.dtype) -> None:
    fits = fit(TARGETS[name], list(model.linears.values()), model.recipes, lossy=False)
    folder.mkdir()
    carrier = Carrier(model, fits, dtype, lossy=False)
    writer.write(folder, carrier)
    assert not carrier.losses


def same_bits(stored: Tensor, value: Tensor) -> bool:
    return stored.dtype == value.dtype and torch.equal(
        stored.contiguous().view(torch.uint8), value.view(torch.uint8)
    )


ROUNDS: dict[str, Any] = {"compressed-tensors": "even", "auto-round": "floor"}
NORM, EMBEDDING = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
CARRIED = {  # as other parts of a model are stored: in any dtype
    "model.visual.blocks.0.attn.qkv.weight": torch.randn(96, 32).bfloat16(),
    "model.visual.blocks.0.norm.weight": torch.randn(32),
    "model.visual.blocks.0.norm.bias": torch.full((32,), torch.nan),
    "model.layers.2.mlp.experts.0.up_proj.weight": torch.randn(64, 32).to(torch.float8_e4m3fn),
    "model.layers.2.mlp.experts.0.up_proj.weight_scale_inv": torch.ones(1, 1),
    "model.layers.2.position_ids": torch.arange(5),
}


@pytest.mark.parametrize("name", ["compressed-tensors", "auto-round"])
def test_what_is_not_packed_is_stored_as_it_came(tmp_path: Path, name: str) -> None:
    *_, folder = packed(tmp_path, "MXFP4", head=False, mode=ROUNDS[name])
    fine = {
        NORM: torch.randn(64, generator=torch.Generator().manual_seed(0)) + 6.94,
        EMBEDDING: torch.randn(160, 64, generator=torch.Generator().manual_seed(1)),
    }
    model = with_tensors(folder, fine | CARRIED)
    out = tmp_path / "out"
    writer = compressed_tensors if name == "compressed-tensors" else auto_round
    written(out, model, writer, name, torch.bfloat16)
    stored = load_file(out / "model.safetensors")
    for key, value in (fine | CARRIED).items():
        assert same_bits(stored[key], value), key
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    config = read(out / "config.json")["quantization_config"]
    left = config["ignore"] if name == "compressed-tensors" else config["extra_config"]
    assert "model.visual.blocks.0.attn.qkv" in left
    assert "model.layers.2.mlp.experts.0.up_proj" in left
    assert "model.visual.blocks.0.norm" not in left


def test_a_dtype_is_for_tensors_of_the_model_s_own(tmp_path: Path) -> None:
    *_, folder = packed(tmp_path, "MXFP4", head=False)
    fine = {NORM: torch.randn(64)}
    written(
        tmp_path / "out",
        with_tensors(folder, fine | CARRIED),
        compressed_tensors,
        "compressed-tensors",
        torch.float32,
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in (fine | CARRIED).items():
        assert same_bits(stored[key], value), key
    assert stored["model.norm.weight"].dtype == stored[EMBEDDING].dtype == torch.float32
    plain = PackedModel.open(folder).tensor(EMBEDDING)
    assert torch.equal(stored[EMBEDDING], plain.float())


def test_a_gguf_keeps_float32_and_leaves_out_what_is_carried(tmp_path: Path) -> None:
    gguf_writer = pytest.importorskip("gguf", reason="gguf is not installed")
    from mixbits.export import gguf

    *_, folder = packed(tmp_path, "MXFP4A16", head=False)
    fine = {NORM: torch.randn(64), EMBEDDING: torch.randn(160, 64)}
    model = with_tensors(folder, fine | CARRIED)
    written(tmp_path / "out", model, gguf, "gguf", torch.bfloat16)
    tensors = {t.name: t for t in gguf_writer.GGUFReader(tmp_path / "out" / gguf.FILE).tensors}
    for key, value in {"blk.0.attn_norm": NORM, "token_embd": EMBEDDING}.items():
        found = tensors[f"{key}.weight"]
        assert found.tensor_type.name == "F32"
        assert torch.equal(torch.from_numpy(found.data.copy()), fine[value])
    assert len(tensors) == len(model.plain) + len(model.recipes)


def test_a_gguf_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    *_, folder = packed(tmp_path, "MXFP4A16", head=False)
    export(folder, "gguf")
    assert "left out" not in capsys.readouterr().out
    model = with_tensors(folder, CARRIED)
    monkeypatch.setattr(PackedModel, "open", lambda *args: model)
    export(folder, "gguf")
    assert "left out 6 tensors, 0.0 MB (model.visual.blocks.0.attn.qkv.weight, ...)" in (
        capsys.readouterr().out
    )


def test_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    *_, folder = packed(tmp_path, "MXFP4A16", head=False)
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    (folder / "LICENSE").write_text("free")
    out = export(folder, "compressed-tensors")
    assert (out / "LICENSE").read_text() == "free"
    assert read(out / "tokenizer_config.json") == {"a": 1}
    assert read(out / "config.json")["quantization_config"]["quant_method"] == "compressed-tensors"


def test_activations_of_another_mode_are_refused_or_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    source, assignment, folder = packed(tmp_path, "MXFP4", mode="floor")
    argv = [str(folder), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "scale mode floor, not even" in capsys.readouterr().err
    model = loaded(export(folder, "compressed-tensors", "--lossy"))
    even = dict.fromkeys(assignment, parse_recipe("MXFP4", act_scale_mode="even"))
    assert torch.equal(logits(model), logits(fake_model(source, even)))
    assert not torch.equal(logits(model), logits(fake_model(source, assignment)))


def test_our_even_is_their_rule() -> None:
    mxfp = pytest.importorskip(
        "compressed_tensors.quantization.utils.mxfp_utils",
        reason="compressed-tensors is not installed",
    )
    mantissas = torch.arange(0, 1 << 23, 4099, dtype=torch.int32)
    exponents = torch.arange(20, 240, dtype=torch.int32)
    largest = (exponents[:, None] << 23 | mantissas).view(torch.float32)
    for bits, element in ((4, "e2m1"), (8, "e4m3")):
        ours = reference.mx_scale(largest, Format(element, 32, scale_mode="even"))
        assert torch.equal(ours.float(), mxfp.generate_mx_scales(largest, bits))


def spoil(folder: Path, what: str) -> None:
    config = read(folder / "config.json")
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "not ours":
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "another scheme":
        config["quantization_config"]["modules"]["lm_head"] = "W8A16"
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "what", ["no config", "not ours", "no weights", "truncated", "another scheme"]
)
def test_a_damaged_folder_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    *_, folder = packed(tmp_path)
    spoil(folder, what)
    out = tmp_path / "out"
    assert main([str(folder), "--format", "compressed-tensors", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required"),
        (["DIR", "--format", "onnx", "--out", "o"], "invalid choice"),
        (["DIR", "--format", "gguf"], "--out"),
        (["DIR", "--format", "gguf", "--out", "o"], "config.json"),
        (["nowhere", "--format", "gguf", "--out", "o"], "nowhere"),
    ],
)
def test_wrong_usage_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    (tmp_path / "DIR").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "what"), [(1e-9, "small"), (1e-6, "small"), (1e6, "large"), (3e-4, None)]
)
def test_what_a_chosen_dtype_cannot_hold_is_refused_at_the_cast(
    value: float, what: str | None
) -> None:
    stored = torch.linspace(0.5, 1.0, 64).mul(value).to(torch.bfloat16)
    model: Any = SimpleNamespace(tensor=lambda name: stored, dtype=stored.dtype)
    strict, lossy = (Carrier(model, {}, torch.float16, given) for given in (False, True))
    if what is None:
        assert torch.equal(strict.plain("norm").double(), stored.double())
        return
    with pytest.raises(UsageError, match=f"^norm is too {what} for float16"):
        strict.plain("norm")
    if what == "small":
        assert strict.losses == {} and lossy.plain("norm").dtype == torch.float16
        assert lossy.losses["norm"] > 2.0**-10
