"""Damaged output folders: whatever is lost, exchanged or edited is one sentence, never an answer.

Mutation number n is always the same; MIXBITS_MUTATIONS=5000 tries more of them than the usual 240.

Not tried, because nothing can be noticed, or nothing is wrong: what only says where a model came
from; `architectures` and sizes in the index, which nothing reads; tensors that the index assigns to
another file of the same folder, as all of its files are read; and keys of the model's own
configuration that change no tensor (rope_theta, rms_norm_eps, hidden_act), which people do edit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import slabs, whole
from safetensors.torch import load_file, save_file
from tiny import add_tokenizer, make_model
from transformers import AutoModelForCausalLM

import mixbits
from mixbits import serve
from mixbits.checkpoint import folder as checkpoint
from mixbits.checkpoint.saving import save
from mixbits.errors import UsageError
from mixbits.model.layout import find_linears
from mixbits.source.source import open_source

COUNT = int(os.environ.get("MIXBITS_MUTATIONS", "240"))
FOLDERS = {"llama": whole, "qwen2": slabs, "qwen3_moe": whole}  # the last in several files

Tensors = dict[str, torch.Tensor]
Mutation = Callable[[Path, random.Random], object]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for kind, recipes in FOLDERS.items():
        folder = tmp_path_factory.mktemp(kind)
        source = open_source(str(add_tokenizer(make_model(folder / "model", kind))))
        linears = find_linears(source.load())
        (folder / "out").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if kind == "qwen3_moe":
                patch.setattr(checkpoint, "SHARD_BYTES", 40_000)
            model = source.load()
            save(folder / "out", source, model, linears, recipes(linears), {})
        folders[kind] = folder / "out"
    return folders


# ---------------------------------------------------------------------------------- of tensors


def on_tensors(change: Callable[[Tensors, str, random.Random], None]) -> Mutation:
    """Change the tensors of one file, given the name of one of them."""

    def mutate(folder: Path, rng: random.Random) -> None:
        path = rng.choice(sorted(folder.glob("*.safetensors")))
        tensors = load_file(path)
        change(tensors, rng.choice(sorted(tensors)), rng)
        save_file(tensors, path, metadata={"format": "pt"})

    return mutate


def rename(tensors: Tensors, name: str, rng: random.Random) -> None:
    new = [name.upper(), f"x.{name}", name + "_", name.replace("0", "7"), name.rpartition(".")[0]]
    tensors[rng.choice([n for n in new if n != name])] = tensors.pop(name)


def cast(tensors: Tensors, name: str, rng: random.Random) -> None:
    """Values in another type, or the same bytes called another type."""
    value = tensors[name]
    same_size = {1: [torch.int8, torch.bool], 2: [torch.int16, torch.float16, torch.bfloat16]}
    other = [t for t in same_size[value.itemsize] if t != value.dtype]
    tensors[name] = rng.choice([value.float(), value.double(), value.view(rng.choice(other))])


def reshape(tensors: Tensors, name: str, rng: random.Random) -> None:
    value = tensors[name]
    ways = [value[None], value[:-1], torch.cat([value, value[:1]])]
    if value.dim() > 1:
        ways += [value.flatten(), value[:, 1:]]
        ways += [value.reshape(value.shape[::-1])] if value.shape != value.shape[::-1] else []
    tensors[name] = rng.choice(ways).clone()


def exchange(tensors: Tensors, name: str, rng: random.Random) -> None:
    others = [n for n in sorted(tensors) if not torch.equal(tensors[n], tensors[name])]
    alike = [n for n in others if tensors[n].shape == tensors[name].shape]
    if not others:
        return drop(tensors, name, rng)
    other = rng.choice(alike or others)
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return None


def flip(tensors: Tensors, name: str, rng: random.Random) -> None:
    data = tensors[name].view(torch.uint8).flatten()
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def blank(tensors: Tensors, name: str, rng: random.Random) -> None:
    data = tensors[name].view(torch.uint8)
    data.copy_(255 - data if rng.random() < 0.5 or not data.any() else torch.zeros_like(data))


def drop(tensors: Tensors, name: str, rng: random.Random) -> None:
    tensors.pop(name)


def add(tensors: Tensors, name: str, rng: random.Random) -> None:
    tensors[rng.choice(["extra", f"{name}.copy", "lm_head.bias"])] = tensors[name].clone()


def disorder(folder: Path, rng: random.Random) -> None:
    """One column twice, two exchanged, or one that is not there."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = sorted(name for name in tensors if name.endswith(".order"))
    order = tensors[rng.choice(names)] if names else next(iter(tensors.values())).view(torch.int16)
    flat = order.flatten()
    a, b = rng.sample(range(len(flat)), 2)
    old = flat[a].item()
    flat[a] = rng.choice([flat[b].item(), len(flat) % 256, 255])
    if flat[a].item() == old:
        flat[a] = old ^ 1
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------ of files


def truncate(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def damage_byte(folder: Path, rng: random.Random) -> None:
    """Anywhere: the header's length, a name, a shape, an offset, a value."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    start = data.index(b'"__metadata__":{"format":"pt"}') if b"__metadata__" in data else 0
    place = rng.choice([p for p in range(len(data)) if not start <= p < start + 30])
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def damage_header(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    after = data.index(b'"pt"}', 8) + 5
    data[rng.randrange(after, 8 + size)] ^= 1 << rng.randrange(7)
    path.write_bytes(data)


def replace_file(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    path.write_bytes(rng.choice([b"", b"\0" * 64, b"version https://git-lfs", b"\xff" * 999]))


def remove_file(folder: Path, rng: random.Random) -> None:
    rng.choice(sorted(folder.glob("*.safetensors"))).unlink()


def copy_file(folder: Path, rng: random.Random) -> None:
    """One file of a checkpoint instead of another; of one file, with bytes at its end."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        files[0].write_bytes(files[0].read_bytes() + b"\0")
    else:
        shutil.copyfile(*rng.sample(files, 2))


def damage_index(folder: Path, rng: random.Random) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        return
    index = json.loads(path.read_text())
    places = index["weight_map"]
    file = rng.choice(sorted(set(places.values())))
    edits: list[Any] = [
        {**index, "weight_map": {n: f for n, f in places.items() if f != file}},
        {**index, "weight_map": {n: f.replace(file, "lost") for n, f in places.items()}},
        {**index, "weight_map": list(places)},
        {**index, "weight_map": {}},
        {"metadata": index["metadata"]},
        [],
        None,
    ]
    text = json.dumps(rng.choice(edits))
    path.write_text(rng.choice([text, text[: len(text) // 2], ""]))


# --------------------------------------------------------------------------------- of config.json


def on_config(change: Callable[[dict[str, Any], random.Random], object]) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        before = json.dumps(config)
        change(config, rng)
        assert json.dumps(config) != before
        path.write_text(json.dumps(config))

    return mutate


SCHEMES = ["MXFP4", "MXFP8", "MXFP8E5M2", "MXFP4A16", "W4A16", "W4A16G32", "W8A16G64ASYM", "W2A16"]


def other_scheme(config: dict[str, Any], rng: random.Random) -> None:
    modules = config["quantization_config"]["modules"]
    name = rng.choice(sorted(modules))
    wrong = [*SCHEMES, "BF16", "FP3", "", None, 4, [], {"segments": []}, {}]
    modules[name] = rng.choice([scheme for scheme in wrong if scheme != modules[name]])


def other_modules(config: dict[str, Any], rng: random.Random) -> None:
    quantization = config["quantization_config"]
    modules = quantization["modules"]
    name = rng.choice(sorted(modules))
    way = rng.randrange(5)
    if way == 0:
        modules.pop(name)
    elif way == 1:
        modules[rng.choice(["lm_head", "model.norm", "x", f"{name}.x", ""])] = modules[name]
    elif way == 2:
        modules[name.replace("0", "9").replace("1", "9")] = modules.pop(name)
    elif way == 3:
        quantization["modules"] = rng.choice([None, [], {}, "all", 3, list(modules)])
    else:
        quantization.pop("modules")


def other_segments(config: dict[str, Any], rng: random.Random) -> None:
    """Of a linear that is divided; of one that is not, all of it at once."""
    modules = config["quantization_config"]["modules"]
    divided = sorted(name for name, recipe in modules.items() if isinstance(recipe, dict))
    name = rng.choice(divided or sorted(modules))
    recipe = modules[name] if divided else {"segments": [[modules[name], 64]]}
    segments = recipe["segments"]
    edits: list[dict[str, Any]] = [
        {"segments": segments[::-1]} if divided else {"segments": segments * 2},
        {"segments": [[scheme, n + 1] for scheme, n in segments]},
        {"segments": [[scheme, -n] for scheme, n in segments]},
        {"segments": segments[:-1]},
        {"ordered": not recipe.get("ordered")},
        {"rotated": not recipe.get("rotated")},
    ]
    modules[name] = {**recipe, **rng.choice(edits)}


def other_value(config: dict[str, Any], rng: random.Random) -> None:
    """Of a key of quantization_config that means something."""
    quantization = config["quantization_config"]
    values: dict[str, list[Any]] = {
        "layout": [0, 2, "1", None, True, 1.5, []],
        "weight_scale_mode": ["even", "rceil", "up", None, 3],
        "act_scale_mode": ["even", "rceil", "up", None, []],
        "checksum": ["00000000", None, 0, "", []],
        "quant_method": ["gptq", "", None, "MIXBITS", 1],
    }
    key = rng.choice(sorted(values))
    quantization[key] = rng.choice(values[key])
    if rng.random() < 0.2 and not key.endswith("scale_mode"):  # which `floor` stands for
        quantization.pop(key)


def other_shape(config: dict[str, Any], rng: random.Random) -> None:
    keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"]
    keys += ["num_attention_heads", "head_dim", "vocab_size", "num_experts"]
    if config["model_type"] == "qwen3_moe":
        keys = [k for k in keys if k != "intermediate_size"] + ["moe_intermediate_size"]
    key = rng.choice([k for k in keys if k in config])
    missing = [] if key == "head_dim" else [None]  # which follows from the others
    config[key] = rng.choice([config[key] * 2, config[key] + 1, 1, 0, -1, "64", 2.5, *missing])


def other_model(config: dict[str, Any], rng: random.Random) -> None:
    edits: list[dict[str, Any]] = [
        {"model_type": "gemma3_text"},
        {"model_type": "opt"},
        {"model_type": "unheard_of"},
        {"model_type": None},
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"dtype": "int4"},
        {"dtype": None},
        {"tie_word_embeddings": not config["tie_word_embeddings"]},
        {"quantization_config": None},
        {"quantization_config": "mixbits"},
        {"quantization_config": []},
    ]
    config.update(rng.choice(edits))


def break_config(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    text = path.read_text()
    data = rng.choice([text[: rng.randrange(len(text) - 2)], "", "[]", "null", "3", '"x"', "{}"])
    path.write_bytes(rng.choice([data.encode(), b"\xff\xfe" + text.encode("utf-16-le")]))


MUTATIONS: list[Mutation] = [
    *map(on_tensors, (drop, rename, cast, reshape, exchange, flip, blank, add)),
    *(disorder, truncate, damage_byte, damage_header),
    *(replace_file, remove_file, copy_file, damage_index),
    *map(on_config, (other_scheme, other_modules, other_segments)),
    *map(on_config, (other_value, other_shape, other_model)),
    break_config,
]


def mutated(number: int, intact: dict[str, Path], folder: Path) -> Path:
    """A copy of an intact folder after mutation `number`."""
    rng = random.Random(number)
    mutate = MUTATIONS[number % len(MUTATIONS)]
    kind = "qwen2" if mutate is disorder else rng.choice(sorted(intact))
    shutil.copytree(intact[kind], folder)
    mutate(folder, rng)
    return folder


def test_intact_folders_load(intact: dict[str, Path]) -> None:
    for folder in intact.values():
        assert mixbits.load(folder)(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("number", range(COUNT))
def test_a_mutation_is_refused(number: int, intact: dict[str, Path], tmp_path: Path) -> None:
    folder = mutated(number, intact, tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        mixbits.load(folder)
    assert "\n" not in str(caught.value) and 10 < len(str(caught.value)) < 500


@pytest.mark.parametrize("change", [drop, rename, cast, reshape, exchange, flip, blank])
def test_every_tensor_counts(
    change: Callable[[Tensors, str, random.Random], None], intact: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copyfile(intact["llama"] / "config.json", tmp_path / "config.json")
    whole = load_file(intact["llama"] / "model.safetensors")
    for name in whole:
        tensors = {n: value.clone() for n, value in whole.items()}
        change(tensors, name, random.Random(0))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError):
            mixbits.load(tmp_path)


def test_the_command_line_says_so_in_one_line(
    intact: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: pytest.fail("it is served"))
    for number in range(2 * len(MUTATIONS)):
        folder = mutated(number, intact, tmp_path / str(number))
        capsys.readouterr()
        assert serve.main([str(folder), "--port", "0"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]


def test_transformers_alone_refuses_lost_and_changed_tensors(
    intact: dict[str, Path], tmp_path: Path
) -> None:
    for number in range(8):
        folder = mutated(number, intact, tmp_path / str(number))
        with pytest.raises(UsageError):
            AutoModelForCausalLM.from_pretrained(folder)
