"""Open a model to be quantized: a folder or a Hugging Face name, checked before any work starts.

Weights are read from safetensors only (no pickle is ever loaded) and stay mapped from the files.
Code that comes with a model runs only with `trust_remote_code`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .formats import UsageError, first_line
from .linear import check_finite

_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "README.md"]


@dataclass
class Source:
    """An original model: `path` is its folder, `name` what the user called it."""

    name: str
    path: Path
    config: Any
    trust_remote_code: bool = False

    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted by name. Raises UsageError where there is none."""
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            others = sorted(p.name for p in self.path.glob("*.bin"))
            hint = f"; {others[0]} is a pickle and is not loaded" if others else ""
            raise UsageError(f"no *.safetensors file in {self.path}{hint}")
        return files

    def sha256(self) -> str:
        """Hash of the configuration and of every weight file."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in self.weight_files():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def has_tokenizer(self) -> bool:
        return any(self.path.glob("tokenizer*")) or any(self.path.glob("*.model"))

    def tokenizer(self) -> Any:
        """The model's tokenizer, or None where it has none."""
        from transformers import AutoTokenizer

        if not self.has_tokenizer:
            return None
        try:
            return AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"cannot read the tokenizer in {self.path}: {error}") from None

    @property
    def dtype(self) -> torch.dtype:
        """What unquantized tensors are kept in: the model's own 16-bit type, else bfloat16."""
        name = str(getattr(self.config, "dtype", None)).removeprefix("torch.")
        return torch.float16 if name == "float16" else torch.bfloat16

    def load(self) -> nn.Module:
        """The model in `dtype`, weights mapped, every tensor present and finite.

        Raises UsageError that names the file or tensor otherwise.
        """
        from transformers import AutoModelForCausalLM

        self._check_files()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=self.dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in `info`
                output_loading_info=True,
                trust_remote_code=self.trust_remote_code,
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise UsageError(f"cannot load the model in {self.path}: {first_line(error)}") from None
        model: nn.Module
        model, info = loaded
        missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
        if missing:
            raise UsageError(
                f"weights are missing or have another shape than config.json says: "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} ({self.path})"
            )
        return model.eval().requires_grad_(False)

    def _check_files(self) -> None:
        """Every tensor of every file is readable and finite."""
        from safetensors import SafetensorError, safe_open

        for path in self.weight_files():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                        check_finite(f"{name} in {path}", file.get_tensor(name))
            except (SafetensorError, OSError, RuntimeError) as error:
                raise UsageError(f"cannot read {path}: {error}; is the file complete?") from None


def open_source(
    model: str,
    trust_remote_code: bool = False,
    config_only: bool = False,
    quantized: bool = False,
) -> Source:
    """Find a model's folder, downloading it where `model` is a Hugging Face name.

    With `config_only`, no weights are fetched; a quantized model is taken with `quantized` only.

    Raises UsageError in one sentence: no such folder or name, no configuration, already quantized.
    """
    path = Path(model)
    if not path.is_dir():
        path = _download(model, _FILES[1:] if config_only else _FILES)
    if not (path / "config.json").is_file():
        raise UsageError(f"a model folder must hold config.json: {path} does not")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise UsageError(f"cannot read {path / 'config.json'}: {first_line(error)}") from None
    if getattr(config, "quantization_config", None) is not None and not quantized:
        raise UsageError(f"the model in {path} is quantized already: pass the original")
    if not hasattr(config.get_text_config(), "num_hidden_layers"):
        raise UsageError(f"{path / 'config.json'} does not describe a decoder-only language model")
    return Source(model, path, config, trust_remote_code)


def _download(model: str, patterns: list[str]) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists():
        raise UsageError(f"MODEL must be a folder or a Hugging Face name: {model} is no folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub client raises dozens of kinds
        raise UsageError(
            f"{model!r} is no folder, and no model of that name could be fetched "
            f"({first_line(error)}): pass the folder of a downloaded model"
        ) from None
