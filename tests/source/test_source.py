"""Weight files are read once: their hash is made while their tensors are looked at."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixbits.errors import UsageError
from mixbits.source.source import open_source
from mixbits.source.weights import DTYPE_NAMES, Files


def expected(folder: Path) -> str:
    """Of config.json and the hashes of the files, each read as a whole."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def test_the_hash_of_tensors_is_that_of_their_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "some.safetensors", dict[str, Tensor]()
    tensors = {  # every dtype, none of the shapes usual
        f"{'zay'[i % 3]}.{name}": torch.randint(0, 2, (5, 3 - i % 4)[: 1 + i % 2]).to(dtype)
        for i, (dtype, name) in enumerate(DTYPE_NAMES.items())
        if "U" not in name or dtype == torch.uint8
    }
    tensors |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 4)}
    save_file(tensors, path, metadata={"format": "pt", "note": "\u00e9"})
    found = Files([path]).sha256(path, seen.__setitem__)
    assert found == hashlib.sha256(path.read_bytes()).digest()
    assert seen.keys() == tensors.keys()
    assert all(value.shape == tensors[name].shape for name, value in seen.items())


@pytest.mark.parametrize("size", ["1GB", "40kB"])
def test_what_was_loaded_is_not_read_again_for_its_hash(size: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
    model.save_pretrained(tmp_path / "cut", max_shard_size=size)
    files = list((tmp_path / "cut").glob("*.safetensors"))
    assert (len(files) > 2) is (size == "40kB")
    hashed, loaded = open_source(str(tmp_path / "cut")), open_source(str(tmp_path / "cut"))
    told = expected(tmp_path / "cut")
    assert hashed.sha256() == told
    loaded.load()
    for path in files:
        path.rename(path.with_suffix(".gone"))
    assert loaded.sha256() == told
    with pytest.raises(UsageError):
        hashed.load()
