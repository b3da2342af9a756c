"""A source whose model is folded into a rotated basis (`mixbits.source.folding`), as scratch.

Name, folder, companions and hash are the original's. What is turned lies in float32 in the scratch
folder, so that it is rounded once: where it is quantized, or else where it is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.layout import CausalLM, head_is_tied, output_head
from .folding import Folding, folding_of, gathered, untie
from .source import SCRATCH_SHARD, Source
from .stored import Header
from .weights import Files, Weights


class _FoldedWeights(Weights):
    """`kinds`: what the tensors are to be written in, where they lie in float32."""

    kinds: dict[str, torch.dtype]

    def stored_dtype(self, name: str) -> torch.dtype | None:
        return self.kinds.get(name)


@dataclass(kw_only=True)
class Folded(Source):
    """`of` is the source that is folded, and `folding` says how."""

    of: Source
    folding: Folding

    @classmethod
    def make(cls, of: Source) -> Folded:
        """Raises UsageError where the model cannot be folded, or would lose what goes with it."""
        shapes = of.shapes
        folding, is_tied = folding_of(shapes, of.trust_remote_code), head_is_tied(shapes)
        config = copy.deepcopy(of.config)
        if is_tied:
            untie(config)
        if of.has_weights and (carried := of.weights.carried_parts):
            raise UsageError(
                "--rotate fold needs weights that all belong to the model: got "
                f"{len(carried)} tensors that {type(shapes).__name__} does not take, and which "
                f"would not fit it any more ({carried[0]})"
            )
        untied = of.untied or is_tied
        return cls(
            of.name,
            of.path,
            config,
            of.trust_remote_code,
            untied=untied,
            of=of,
            folding=folding,
        )

    @property
    def original(self) -> Source:
        return self.of

    @property
    def head_bytes(self) -> int:
        """What the head takes that was tied to the embedding; 0 for one that was not."""
        head = output_head(self.shapes)[1].weight
        return head.numel() * self.dtype.itemsize if head_is_tied(self.of.shapes) else 0

    @cached_property
    def shapes(self) -> CausalLM:
        return self._meta_model()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Nothing is quantized any more."""
        return None

    @property
    def weights(self) -> Weights:
        """The scratch folder's; before it is made, names and shapes alone."""
        if self._plain is None:
            return self._expected
        return self._made

    @cached_property
    def _expected(self) -> Weights:
        files = Files([])
        state = self.shapes.state_dict()
        names = state.keys() & self._origins.keys()
        files.headers |= {n: Header(self._kinds[n], tuple(state[n].shape)) for n in sorted(names)}
        files.places |= dict.fromkeys(files.headers, self.path)
        return self._weights(files)

    @cached_property
    def _made(self) -> Weights:
        return self._weights(Files(sorted(Path(self._plain.name).glob("*.safetensors"))))

    def _weights(self, files: Files) -> Weights:
        found = _FoldedWeights(self.shapes, files, None, self.dtype)
        found.kinds = self._kinds
        return found

    @cached_property
    def _origins(self) -> dict[str, str]:
        """Tensor of the model -> the one of the original's files that it is made of."""
        tied = self.of.shapes.all_tied_weights_keys
        named = {name: tied.get(name, name) for name in self.shapes.state_dict()}
        return {name: origin for name, origin in named.items() if origin in self.of.weights.groups}

    @cached_property
    def _kinds(self) -> dict[str, torch.dtype]:
        stored = self.of.weights.stored_dtype
        return {name: stored(origin) or self.dtype for name, origin in self._origins.items()}

    def sha256(self) -> str:
        return self.of.sha256()

    def scratch_bytes(self) -> int:
        state = self.shapes.state_dict()
        sizes = (state[name].numel() * self._lies_in(name).itemsize for name in self._origins)
        return self.of.scratch_bytes() + sum(sizes)

    def _lies_in(self, name: str) -> torch.dtype:
        return torch.float32 if self.folding.changes(name) else self._kinds[name]

    def load(self) -> nn.Module:
        """The folded model in float32, weights mapped, from tensors that `Source.load` checks."""
        self.of.check()
        return self._load(self._plain_folder(), torch.float32)

    def _in_shards(self) -> Iterator[dict[str, Tensor]]:
        weights = self.of.weights
        folding = gathered(self.folding, lambda name: weights.tensor(self._origins[name]))
        waiting: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}  # made together with the one asked for last
        for name, origin in self._origins.items():
            if origin not in last:
                last = weights.tensors(origin)
            value = last[origin]
            if folding.changes(name):
                value = folding.folded(name, value, weights.tensor)
            waiting[name] = value.contiguous()
            if sum(t.nbytes for t in waiting.values()) >= SCRATCH_SHARD:
                yield waiting
                waiting = {}
        if waiting:
            yield waiting
