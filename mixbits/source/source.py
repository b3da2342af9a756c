"""Open a model to be quantized: a folder or a Hugging Face name, checked before any work starts.

Weights are read from safetensors only (no pickle is ever loaded) and stay mapped from the files.
Those that are stored quantized (`mixbits.source.stored`) are made plain tensor by tensor, into a
folder beside the output that is mapped in their place and goes with the process. Code that comes
with a model runs only with `trust_remote_code`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError, plain_errors
from ..files.atomic import scratch_folder
from ..files.io import is_text, read_object
from ..formats.pack import check_finite
from ..model.layout import CausalLM, meta_model, model_class
from .model_files import WHOLE, already_quantized, check_folder, check_inside, check_name, indexed
from .weights import Files, Weights

# Of a repository on the hub: weights once (not consolidated ones, nor other formats), and all text.
_WEIGHTS = "model*.safetensors"
_FILES = [_WEIGHTS, "*.json", "*.jinja", "*.txt", "*.md", "*.py", "*.model", "*.tiktoken", "*.bpe"]
_FILES += ["tokenizer*", "LICENSE*", "NOTICE*"]
_TOKENIZERS = ("tokenizer*", "*.model", "vocab.json", "vocab.txt")
# transformers without mixbits only warns of a quantization that it does not know, and leaves
# weights random. But what config.json names as the weights' file must be such a file: anything else
# is an error that quotes it. With mixbits imported, `transformers_quantizer` takes it away again.
NOT_A_FILE = "this model is packed, and needs `import mixbits` before it is loaded, or mixbits.load"
SCRATCH_SHARD = 2 << 30  # bytes of weights that are made plain before they are written


@dataclass
class Source:
    """An original model: `path` is its folder, `name` what the user called it.

    `scratch` is where quantized weights are made plain, if there are any. `untied`: config.json
    ties the head, and the files have another (known once `shapes` are).
    """

    name: str
    path: Path
    config: Any
    trust_remote_code: bool = False
    scratch: Path | None = None
    untied: bool = False
    _plain: Any = field(default=None, repr=False)  # the temporary folder
    _digests: list[bytes] = field(default_factory=list, repr=False)  # of the weight files

    def weight_files(self) -> list[Path]:
        """The files that transformers reads, sorted by name. Raises UsageError for none."""
        named = str(getattr(self.config, "transformers_weights", None) or WHOLE)
        whole = self.path / (WHOLE if named == NOT_A_FILE else named)
        index = self.path / f"{WHOLE}.index.json"
        if whole.is_file():
            check_inside(whole, self.path)
            return [whole]
        if index.is_file():
            return indexed(index)
        others = sorted(p.name for p in self.path.glob("*.bin"))
        hint = f"; {others[0]} is a pickle and is not loaded" if others else ""
        raise UsageError(
            f"no *.safetensors file in {self.path} that transformers reads ({WHOLE}, or shards "
            f"with an index){hint}"
        )

    @property
    def has_weights(self) -> bool:
        """Whether weight files are here: only config.json may have been asked for."""
        return any(self.path.glob("*.safetensors"))

    @cached_property
    def shapes(self) -> CausalLM:
        """The model without storage, its head untied where the files have one of its own.

        Raises UsageError where config.json describes none, or other weights differ that are tied.
        """
        model = self._meta_model()
        is_ours = (self.quantization or {}).get("quant_method") == "mixbits"  # what it says is so
        if is_ours or not (self.has_weights and model.all_tied_weights_keys):
            return model
        if not (unlike := self._unlike(model)):
            return model
        self.untied = True  # as transformers does when it loads them
        self.config = copy.deepcopy(self.config)
        for part in (self.config, self.config.get_text_config()):
            part.tie_word_embeddings = False
        tied, model = model.all_tied_weights_keys, self._meta_model()
        # Only a head has an option for that, which may untie whatever else is shared.
        if model.all_tied_weights_keys.keys() != tied.keys() - unlike:
            raise UsageError(
                f"{type(model).__name__} shares {unlike[0]} with {tied[unlike[0]]}: got other "
                f"values of each ({self.path})"
            )
        return model

    def _meta_model(self) -> CausalLM:
        with plain_errors(f"no causal language model is described in {self.path}"):
            return meta_model(self.config, trust_remote_code=self.trust_remote_code)

    def _unlike(self, model: CausalLM) -> list[str]:
        """Tensors that a model ties to others, of which the files have each with its own values."""
        weights = Weights(model, Files(self.weight_files()), self.quantization, self.dtype)
        tied = model.all_tied_weights_keys.items()
        both = [pair for pair in tied if all(name in weights.groups for name in pair)]
        return [a for a, b in both if not torch.equal(weights.tensor(a), weights.tensor(b))]

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """How the weights are stored, as config.json says; None for plain ones."""
        for config in (self.config, self.config.get_text_config()):
            found: Any = getattr(config, "quantization_config", None)
            found = found.to_dict() if hasattr(found, "to_dict") else found
            if isinstance(found, dict):
                return dict(found)
            if found is not None:
                raise UsageError(
                    f"quantization_config must be an object: got {found!r:.60} ({self.path})"
                )
        beside = self.path / "hf_quant_config.json"  # ModelOpt's own
        if beside.is_file():
            told = read_object(beside).get("quantization", {})
            if not isinstance(told, dict):
                raise UsageError(f"quantization must be an object: got {told!r:.60} ({beside})")
            return {**told, "quant_method": "modelopt"}
        return None

    @cached_property
    def weights(self) -> Weights:
        """What the model's tensors are made of."""
        return Weights(self.shapes, Files(self.weight_files()), self.quantization, self.dtype)

    def sha256(self) -> str:
        """Hash of the configuration and of every weight file, which `load` has by the way."""
        files = Files([] if self._digests else self.weight_files())
        digests = self._digests or [files.sha256(path, lambda *_: None) for path in files.paths]
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for one in digests:
            digest.update(one)
        return digest.hexdigest()

    @property
    def has_tokenizer(self) -> bool:
        return any(path for pattern in _TOKENIZERS for path in self.path.glob(pattern))

    def tokenizer(self) -> Any:
        """The model's tokenizer, or None where it has none."""
        from transformers import AutoTokenizer

        if not self.has_tokenizer:
            return None
        with plain_errors(f"cannot read the tokenizer in {self.path}"):
            return AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code
            )

    @property
    def dtype(self) -> torch.dtype:
        """What quantized weights are made plain in, and the model runs in: its own 16-bit type.

        bfloat16 where it has none.
        """
        kinds = [getattr(c, "dtype", None) for c in (self.config, self.config.get_text_config())]
        name = str(next((kind for kind in kinds if kind is not None), None))
        return torch.float16 if name.removeprefix("torch.") == "float16" else torch.bfloat16

    @property
    def original(self) -> Source:
        """What a source is compared with: itself, or what it was folded of."""
        return self

    def load(self) -> nn.Module:
        """The model in `dtype`, weights mapped, every tensor present and finite.

        Raises UsageError that names the file or tensor otherwise.
        """
        self.check()
        return self._load(self.path if self.weights.is_plain else self._plain_folder(), self.dtype)

    def _load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        config = copy.deepcopy(self.config)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):  # nothing is quantized by now
                del part.quantization_config
        with plain_errors(f"cannot load the model in {self.path}"):
            loaded: Any = model_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in `info`
                output_loading_info=True,
                trust_remote_code=self.trust_remote_code,
            )
        model: nn.Module
        model, info = loaded
        missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
        if missing:
            raise UsageError(
                f"weights are missing or have another shape than config.json says: "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} ({self.path})"
            )
        return model.eval().requires_grad_(False)

    def check(self) -> None:
        """Raises UsageError that names a tensor that cannot be read, or is not finite."""
        self._digests = self._digests or self._checked()

    def _checked(self) -> list[bytes]:
        """Every tensor of every file is readable and finite; returns the files' hashes."""
        files = self.weights.files

        def look(name: str, value: Tensor) -> None:
            kind = value.dtype
            is_byte = kind.is_floating_point and kind.itemsize == 1  # torch cannot look at these
            check_finite(f"{name} in {files.places[name]}", value.float() if is_byte else value)

        return [files.sha256(path, look) for path in files.paths]

    def _plain_folder(self) -> Path:
        """The model with plain weights under its own names, made once for this process."""
        if self._plain is None:
            self._plain = self._make_plain()
        return Path(self._plain.name)

    def plain_bytes(self) -> int:
        """Of the weights, once they are made plain."""
        state = self.shapes.state_dict()
        return sum(state[name].numel() for name in self.weights.groups) * self.dtype.itemsize

    def scratch_bytes(self) -> int:
        """Of the weights that `load` writes into a scratch folder, if it does."""
        return 0 if self.weights.is_plain else self.plain_bytes()

    def _make_plain(self) -> Any:
        made = scratch_folder(self.scratch or Path(tempfile.gettempdir()), self.scratch_bytes())
        folder = Path(made.name)
        places: dict[str, str] = {}
        for number, tensors in enumerate(self._in_shards()):
            from safetensors.torch import save_file

            file = f"model-{number:05}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{WHOLE}.index.json").write_text(json.dumps(index), encoding="utf-8")
        for path in [*self.path.glob("*.py"), *self.path.glob("*config.json")]:
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        return made

    def _in_shards(self) -> Iterator[dict[str, Tensor]]:
        """Plain tensors of the model, as many at a time as `SCRATCH_SHARD` has room for."""
        waiting: dict[str, Tensor] = {}
        seen: set[str] = set()
        for name in self.weights.groups:
            if name in seen:
                continue
            made = self.weights.tensors(name)
            seen |= made.keys()
            waiting |= made
            if sum(t.nbytes for t in waiting.values()) >= SCRATCH_SHARD:
                yield waiting
                waiting = {}
        if waiting:
            yield waiting


def open_source(
    model: str,
    trust_remote_code: bool = False,
    config_only: bool = False,
    quantized: bool = False,
) -> Source:
    """Find a model's folder, downloading it where `model` is a Hugging Face name.

    With `config_only`, no weights are fetched; a quantized model is taken with `quantized` only.

    Raises UsageError in one sentence: no such folder or name, no configuration, quantized by us.
    """
    path = find_folder(model, config_only)
    check_folder(path, trust_remote_code)
    from transformers import AutoConfig

    with plain_errors(f"cannot read {path / 'config.json'}"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        inner = config.get_text_config()
    if not hasattr(inner, "num_hidden_layers") or _looks_ahead(config):
        raise UsageError(f"{path / 'config.json'} does not describe a decoder-only language model")
    source = Source(model, path, config, trust_remote_code)
    method = (source.quantization or {}).get("quant_method")
    if method == "mixbits" and not quantized:
        raise already_quantized(path)
    return source


def _looks_ahead(config: Any) -> bool:
    """Whether it describes an encoder, which transformers would run as if it were a decoder."""
    text = config.get_text_config()
    is_bert = hasattr(text, "add_cross_attention") and getattr(text, "is_decoder", None) is False
    is_xlm = getattr(text, "is_encoder", False) and not getattr(text, "causal", True)
    return is_bert or is_xlm or getattr(text, "attn_type", None) == "bi"


def find_folder(model: str, config_only: bool = False, revision: str | None = None) -> Path:
    """The folder of a model: `model` itself, or what the hub holds by that name, downloaded.

    With `config_only`, no weights are fetched; `revision` is a branch, tag or commit of the hub's.
    Raises UsageError for what is no folder and no name, and for a folder without config.json.
    """
    if not is_text(model):
        raise UsageError(f"MODEL must have a name in UTF-8: got {model!r:.160}")
    path = Path(model)
    if not path.is_dir():
        path = _download(model, _FILES[1:] if config_only else _FILES, revision)
    elif revision is not None:
        raise UsageError(f"a revision is one of the hub's: {model} is a folder")
    if not (path / "config.json").is_file():
        raise UsageError(f"a model folder must hold config.json: {path} does not")
    return path


def _download(model: str, patterns: list[str], revision: str | None = None) -> Path:
    check_name(model)
    from huggingface_hub import snapshot_download

    def sentence(why: str) -> str:
        return (
            f"{model!r} is no folder, and no model of that name could be fetched "
            f"({why}): pass the folder of a downloaded model"
        )

    with plain_errors(sentence):
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
