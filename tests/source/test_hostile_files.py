"""Files of others: pipes, devices, links, numbers that want to be sizes, JSON that is none.

Each is a result or one sentence, at once; test_mutated_files.py makes more of them at random.
"""

from __future__ import annotations

import json
import math
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_files import CONFIG, packed_config, sentence
from safetensors.torch import save_file
from tiny import make_model

from mixbits.checkpoint.transformers_quantizer import MixbitsConfig, read_config
from mixbits.errors import UsageError
from mixbits.files.io import check_file, read_json, read_object
from mixbits.source.model_files import check_folder
from mixbits.source.source import open_source
from mixbits.source.weights import Files

# ------------------------------------------------------------------------ what is opened at all


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def circle(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = {pipe: "a named pipe", folder: "a folder", zeros: "a device", a_socket: "a socket"}


@pytest.mark.parametrize("make", KINDS)
def test_only_regular_files_are_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    make(path)
    for read in (check_file, read_object):
        said = sentence(lambda read=read: read(path))
        assert said.endswith(f"f.json must be a regular file: got {KINDS[make]}")


def test_files_have_sane_sizes(tmp_path: Path) -> None:
    with (tmp_path / "f.json").open("wb") as file:
        file.truncate(65 << 20)
    assert "at most 67,108,864 bytes" in sentence(lambda: read_object(tmp_path / "f.json"))
    for name in ("none", "a\0b", "circle", "none/none"):
        if name == "circle":
            circle(tmp_path / name)
        assert sentence(lambda name=name: check_file(tmp_path / name)).startswith("cannot read")
    (tmp_path / "g.json").write_text("[" + " " * 999 + "]")
    assert "at most 1,000 bytes" in sentence(lambda: read_json(tmp_path / "g.json", 1000))
    for endless in ("/proc/kmsg", "/proc/self/mem"):  # their size is 0
        sentence(lambda endless=endless: read_json(Path(endless)))


# ------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[", "is not JSON"),
        (b"null", "must hold a JSON object: got NoneType"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested in more than 100 levels"),
        (b"[" * 5000 + b"]" * 5000, "nested in more than 100 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON.*4300 digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"\\uDE00": 1}', "half of a surrogate pair"),
        (b'{"a": "\\ude00\\ud83d"}', "half of a surrogate pair"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON: 'utf-8' codec"),
        (b'{"a": "\xe9"}', "is not JSON: 'utf-8' codec"),
        (b'{"a": 1}\0', "is not JSON: Extra data"),
        (b'{"a": 1', "is not JSON"),
    ],
)
def test_json_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_object(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400


def test_json_that_is_odd_and_right(tmp_path: Path) -> None:
    brackets = '["}{' * 60
    data = {"a": [1, 2.5, None], "b": {"é\U0001f600": 'x\0\\"[' + brackets}, "c": [[]] * 300}
    for content in (
        json.dumps(data).encode(),
        json.dumps(data, ensure_ascii=False).encode("utf-8-sig"),
        json.dumps(data, indent=1).encode(),
    ):
        (tmp_path / "f.json").write_bytes(content)
        assert read_object(tmp_path / "f.json") == data
    deep = b"[" * 100 + b"]" * 100
    (tmp_path / "f.json").write_bytes(deep)
    assert read_json(tmp_path / "f.json") == json.loads(deep)


# ------------------------------------------------------------------------------ a model's folder


READ = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
READ += ["special_tokens_map.json", "preprocessor_config.json", "chat_template.jinja"]
READ += ["model.safetensors", "model.safetensors.index.json", "tokenizer.model", "vocab.json"]
READ += ["additional_chat_templates/tool.jinja", "merges.txt", "my.tiktoken"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.zeros(4)}, path / "model.safetensors")
    check_folder(path)
    return path


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", READ)
def test_what_is_read_of_a_model_is_a_regular_file(
    name: str, make: Callable[[Path], None], model: Path
) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    make(model / name)
    assert name in sentence(lambda: check_folder(model))


@pytest.mark.parametrize("name", READ)
def test_what_is_read_of_a_model_lies_in_its_folder(name: str, model: Path) -> None:
    path, elsewhere = model / name, model.parent / "elsewhere"
    path.parent.mkdir(exist_ok=True)
    elsewhere.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    path.symlink_to("../" * len(path.relative_to(model).parts) + "elsewhere")
    assert "must lie in its folder" in sentence(lambda: check_folder(model))
    path.unlink()
    elsewhere.rename(path.with_name("beside.x"))  # a link within the folder is as good as a file
    path.symlink_to("beside.x")
    if name != "model.safetensors.index.json":
        check_folder(model)


def test_code_is_looked_at_where_it_will_run(model: Path) -> None:
    (model / "modeling_my.py").symlink_to("/etc/hostname")
    check_folder(model)
    assert "modeling_my.py" in sentence(lambda: check_folder(model, code=True))


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(model: Path) -> None:
    snapshot = model.parent / "models--a" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (model.parent / "models--a" / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).rename(model.parent / "models--a" / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    check_folder(snapshot)


@pytest.mark.parametrize("content", ["null", "[]", "[3]", "7", '"x"', "{", "", '{"a":' * 2000])
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer_config.json", "added_tokens.json"),
        *("special_tokens_map.json", "processor_config.json", "chat_template.json"),
        "hf_quant_config.json",
    ],
)
def test_configurations_are_objects(name: str, content: str, model: Path) -> None:
    (model / name).write_text(content)
    assert name in sentence(lambda: check_folder(model))


@pytest.mark.parametrize(
    "told",
    [
        *([], None, {}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {}}),
        *({"weight_map": {"a": value}} for value in (3, None, ["x"], {}, True)),
        *(
            {"weight_map": {"a": name}}
            for name in ("../x", "/etc/passwd", "", ".", "..", "none", "a\0b", "sub/x", "link", "p")
        ),
    ],
)
def test_an_index_names_files_beside_it(told: Any, model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "x")
    (model / "link").symlink_to("../x")
    pipe(model / "p")
    (model / "sub").mkdir()
    (model / "sub" / "x").touch()
    (model / "model.safetensors.index.json").write_text(json.dumps(told))
    sentence(lambda: check_folder(model))


@pytest.mark.parametrize("key", ["configuration_files", "transformers_weights"])
@pytest.mark.parametrize("value", ["../x.json", "/x", ["a/b"], [3], {}, 3, [None, "../x"]])
def test_no_file_elsewhere_is_named(key: str, value: Any, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    assert key in sentence(lambda: check_folder(model))


@pytest.mark.parametrize("count", [10**12, 2**31, 100_000, 513, 1e300, math.inf])
@pytest.mark.parametrize(
    "keys", ["num_hidden_layers", "n_layer", "num_layers", "text_config.num_hidden_layers", "depth"]
)
def test_layers_are_counted_before_they_are_made(keys: str, count: float, model: Path) -> None:
    value: Any = count
    for key in reversed(keys.split(".")):
        value = {key: value}
    (model / "config.json").write_text(json.dumps({**CONFIG, **value}))
    said = sentence(lambda: open_source(str(model)))
    assert keys.rpartition(".")[2] in said and "have 1 tensors" in said
    (model / "model.safetensors").unlink()  # as of --dry-run
    assert "have 0 tensors" in sentence(lambda: open_source(str(model)))


def test_experts_are_counted_and_files_may_have_more(model: Path) -> None:
    config = {**CONFIG, "num_hidden_layers": 100, "num_experts": 10_000}
    (model / "config.json").write_text(json.dumps(config))
    assert "num_experts of config.json" in sentence(lambda: check_folder(model))
    (model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 600}))
    assert "num_hidden_layers of config.json" in sentence(lambda: check_folder(model))
    os.mkfifo(model / "more.safetensors")  # whose header would be waited for
    assert "a named pipe" in sentence(lambda: check_folder(model))
    (model / "more.safetensors").unlink()
    save_file({str(i): torch.zeros(0) for i in range(600)}, model / "model.safetensors")
    check_folder(model)


@pytest.mark.parametrize("name", ["a\nb", "a" * 1001, "\x1b[31m", "\u2028"])
def test_tensors_have_names_for_a_sentence(name: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(4)}, tmp_path / "model.safetensors")
    assert "printable name" in sentence(lambda: Files([tmp_path / "model.safetensors"]))


# --------------------------------------------------------------------------- quantization_config


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set what lies at keys and numbers that are divided by /."""
    at: Any = config["quantization_config"]
    *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    for step in steps:
        at = at[step]
    at[last] = value


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("layout", [None, 2, "1", 1.5, []]),
        ("modules", [[], "x", {"a": 3}, {"a": None}, {"a": "FP3"}, {"a": "BF16"}, {"a": []}]),
        ("modules/a\nb", ["MXFP4"]),
        ("modules/b/segments", [None, [], {}, "x", [[]], [["MXFP4"]], [["MXFP4", 32]] * 9]),
        ("modules/b/segments", [[["MXFP4", 32]] * 20_000, [["MXFP4", 32, 1]]]),
        ("modules/b/segments/0/1", [0, -1, 10**12, 2**70, 1.5, 32.0, "32", None, True, [], {}]),
        ("modules/b/segments/0/0", [None, 4, "", "BF16", "MXFP4" * 1000, "\n", []]),
        ("modules/b/ordered", [1, 0, None, "true", []]),
        ("modules/b/rotated", [1, None, {}]),
        ("modules/b/more", [1]),
        ("weight_scale_mode", ["up", None, 3, []]),
        ("act_scale_mode", ["EVEN", None, {}]),
        ("checksum", [None, 0, "", "0" * 9, "xxxxxxxx", []]),
        ("dtypes", [None, [], {"a": 1}, "x"]),
        ("carried", ["x", {}, [1], [None], ["a\nb"]]),
        ("stored", [[], "x", {}, {"tensors": "x", "quantization_config": {}}, {"tensors": []}]),
        *((key, [1]) for key in ("recipes", "to_dict", "__class__", "__init__", "from_dict")),
        ("self", [1]),
    ],
)
def test_what_no_quantization_config_can_be(path: str, values: list[Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(packed_config()))
    assert set(read_config(tmp_path).recipes()) == {"a", "b"}
    for value in values:
        config = packed_config()
        put(config, path, value)
        (tmp_path / "config.json").write_text(json.dumps(config))
        if path == "self":  # a remark like any other
            read_config(tmp_path)
            continue
        assert str(tmp_path) in sentence(lambda: read_config(tmp_path))


def test_orders_take_no_memory_before_it_is_known_that_they_are_there() -> None:
    recipe = {"segments": [["MXFP4", 1 << 20]], "ordered": True, "rotated": False}
    config = MixbitsConfig({f"m{i}": recipe for i in range(2000)}, 1, checksum="0" * 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(config.recipes()) == 2000  # 70 GB as tuples
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def test_a_model_with_odd_numbers_is_refused_before_it_is_built(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    for key, value in {
        "vocab_size": 2**40,
        "hidden_size": 2**40,
        "num_attention_heads": 2**31,
    }.items():
        path.write_text(json.dumps({**config, key: value}))
        assert sentence(lambda: open_source(str(path.parent)).weights), key
