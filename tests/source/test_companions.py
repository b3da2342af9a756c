"""Everything beside the weights comes along; weights, reports, and what links lead to do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from mixbits.source.companions import copy_companions
from mixbits.source.source import _FILES

COMES = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "my.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modeling_my.py",
    "NOTICE",
    "LICENSE",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
    "assets/figure.png",
    "assets/README2.md",
    "__init__.py",
]
STAYS = [
    "config.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "consolidated.00.pth",
    "pytorch_model.bin",
    "model.gguf",
    "tf_model.h5",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "plan.json",
    "scores.json",
    "report.json",
    "report.html",
    "README.md",
    "quantize_config.json",
    "hf_quant_config.json",
    ".gitattributes",
    ".git/config",
    "__pycache__/modeling_my.pyc",
    "earlier/config.json",
    "earlier/tokenizer.json",
]


def make(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_what_comes_along(tmp_path: Path) -> None:
    make(tmp_path / "model", COMES + STAYS)
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path / "model", tmp_path / "out")
    assert found(tmp_path / "out") == set(COMES)
    assert all((tmp_path / "out" / name).read_text() == name for name in COMES)


def test_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    make(tmp_path, ["secret/key", "model/LICENSE"])
    model, out = tmp_path / "model", tmp_path / "out"
    for name in ("NOTICE", "tokenizer.key", "x.py"):
        (model / name).symlink_to("../secret/key")
    (model / "assets").symlink_to("../secret")
    (model / "again").symlink_to(".")
    (model / "COPYING").symlink_to("LICENSE")
    (model / "broken.txt").symlink_to("nothing")
    out.mkdir()
    copy_companions(model, out)
    assert found(out) == {"LICENSE", "COPYING"}


def test_a_snapshot_of_the_hub_links_to_its_own_blobs(tmp_path: Path) -> None:
    make(tmp_path, ["models--a/blobs/1", "models--b/blobs/2"])
    snapshot = tmp_path / "models--a" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    (snapshot / "NOTICE").symlink_to("../../../models--b/blobs/2")
    (tmp_path / "out").mkdir()
    copy_companions(snapshot, tmp_path / "out")
    assert found(tmp_path / "out") == {"tokenizer.json"}


@pytest.mark.parametrize("name", [n for n in COMES if not n.endswith(".png")])
def test_a_name_of_the_hub_brings_what_a_folder_has(name: str) -> None:
    assert list(filter_repo_objects([name], allow_patterns=_FILES)) == [name]


def test_a_name_of_the_hub_brings_weights_once() -> None:
    once = ["model.safetensors", "model-00001-of-00002.safetensors", "config.json"]
    more = ["consolidated.safetensors", "original/consolidated.00.safetensors", "a.bin", "a.gguf"]
    more += ["onnx/model.safetensors", "onnx/model.onnx"]
    assert list(filter_repo_objects(once + more, allow_patterns=_FILES)) == once
