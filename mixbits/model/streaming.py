"""Run a model block by block, so that only one block is ever resident in the compute dtype.

The weights of a model opened by transformers stay mapped from its files. A *resident* module has
its parameters copied to the compute dtype and device for as long as it runs; then the copies are
dropped. So the peak is one block (or the head, where that is larger), its gradients, and the
activations at the block borders of one batch. On a GPU the next block is brought while one runs
(mixbits.model.prefetch), and lies there in its stored dtype besides.

Backward works the same way. The forward pass runs without gradients and keeps each block's
input; the loss is differentiated down to the last block's output, and then block after block is
run once more with gradients, from the last to the first. It costs one more forward, which a few
tokens are spared at a time where no weight has to be copied: see `tokens_at_once`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .layout import CausalLM, LinearInfo, decoder_blocks, linear_weight, output_head
from .prefetch import Prefetcher, foreign_tensors
from .replaced import replaced

GRAPH_BYTES = 512 << 20  # what a backward pass over all blocks may keep of the forward pass

Progress = Callable[[], None]


def patched(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Let `module` run `forward` instead of its own, for the duration."""
    return replaced(module, "forward", forward)


@contextmanager
def resident(
    module: nn.Module,
    dtype: torch.dtype | None,
    device: torch.device,
    prefetched: dict[int, Tensor] | None = None,
) -> Iterator[None]:
    """Copy what `module` holds to `device`, its parameters to `dtype` too, for the duration.

    Buffers keep their dtype: they are packed codes and scales, and rotary frequencies. `prefetched`
    has copies that are on the device already, by the id of parameter or buffer; it is emptied, so
    that those in another dtype do not stay.
    """
    prefetched = {} if prefetched is None else prefetched
    parameters = [(p, p.data) for p in module.parameters()]
    buffers = [
        (owner, name, value)
        for owner in module.modules()
        for name, value in owner._buffers.items()
        if value is not None and value.device != device
    ]
    try:
        for parameter, data in parameters:
            parameter.data = prefetched.pop(id(parameter), data).to(device, dtype)
        for owner, name, value in buffers:
            owner._buffers[name] = prefetched.pop(id(value), value).to(device)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for owner, name, value in buffers:
            owner._buffers[name] = value


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
    return trim


def _give_back_memory() -> None:
    """Return freed blocks to the system.

    glibc keeps the memory of freed tensors for reuse, in holes that the next block's tensors do
    not fit; without this the peak grows by half a block's size with every block.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


def _repeatable_attention(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU, attention whose gradients repeat to the bit: the fused kinds add as they arrive."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def gradient_dtype(stored: torch.dtype, device: torch.device | str) -> torch.dtype:
    """What to differentiate a model in: bfloat16 if it is stored in that and the CPU is fast at it.

    Scores from bfloat16 gradients differ from those of float32 by 0.2 % on average, 1 % at most
    (a random Llama of 100 million parameters): less than by another batch of text.
    """
    native = torch.device(device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return stored if stored == torch.bfloat16 and native else torch.float32


class StreamedModel:
    """A causal language model that computes in `dtype` on `device`, one block at a time."""

    def __init__(
        self,
        model: CausalLM,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.dtype, self.device = dtype, torch.empty(0, device=device).device  # with its index
        self.blocks = decoder_blocks(model)[1]
        self.prefetcher = Prefetcher(self.device) if self.device.type == "cuda" else None

    @contextmanager
    def _resident(
        self, module: nn.Module, dtype: torch.dtype | None, following: nn.Module | None = None
    ) -> Iterator[None]:
        """`module` is resident; meanwhile `following` is brought, which must be the next one."""
        prefetched = {}
        if self.prefetcher is not None:
            prefetched = self.prefetcher.take(foreign_tensors(module, self.device))
            if following is not None:
                self.prefetcher.start(foreign_tensors(following, self.device))
        with resident(module, dtype, self.device, prefetched):
            yield

    def _block(self, index: int) -> nn.Module | None:
        return self.blocks[index] if 0 <= index < len(self.blocks) else None

    def visit(self, linears: Sequence[LinearInfo]) -> Iterator[LinearInfo]:
        """Each of `linears` in the order of blocks, its weight on the device as it is stored."""
        members: dict[int | None, list[LinearInfo]] = {}
        for info in linears:
            members.setdefault(info.block, []).append(info)
        modules = {
            index: output_head(self.model)[1] if index is None else self.blocks[index]
            for index in members
        }
        following = [*list(modules.values())[1:], None]
        for (index, module), after in zip(modules.items(), following, strict=True):
            with self._resident(module, None, after):
                yield from members[index]

    def tokens_at_once(self) -> int:
        """Tokens that one backward pass over all blocks has room for; 0 if weights are copied.

        Autograd keeps about the inputs and outputs of all linears, in float32 or the like.
        """
        parameters = self.model.parameters()
        if any(p.dtype != self.dtype or p.device != self.device for p in parameters):
            return 0
        weights = map(linear_weight, self.blocks.modules())
        return GRAPH_BYTES // max(1, sum(4 * sum(w.shape) for w in weights if w is not None))

    def _outer_modules(self) -> list[nn.Module]:
        """What runs outside the blocks and holds tensors: rotary embedding, norm and head."""
        inside = {id(m) for m in self.blocks.modules()}
        embedding = self.model.get_input_embeddings()
        return [
            module
            for module in self.model.modules()
            if id(module) not in inside
            and module is not embedding
            and (module._parameters or module._buffers)
        ]

    def _embed(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Look up in the compute dtype, with only the rows resident that occur."""
        embedding = self.model.get_input_embeddings()

        def run(ids: Tensor) -> Tensor:
            used, index = ids.to(embedding.weight.device).unique(return_inverse=True)
            data = embedding.weight.data
            embedding.weight.data = data[used].to(self.device, self.dtype)
            try:
                return forward(index.to(self.device))
            finally:
                embedding.weight.data = data

        return run

    def _cast(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if is_float else value

    def _lazily(
        self, module: nn.Module, forward: Callable[..., Any], stack: ExitStack
    ) -> Callable[..., Any]:
        """Become resident when first called, until `stack` closes: a loss may need it again."""

        def run(*args: Any, **kwargs: Any) -> Any:
            stack.enter_context(self._resident(module, self.dtype))
            # Some models cast what they pass to the dtype that the weight had before.
            return forward(*map(self._cast, args), **kwargs)

        return run

    def _run(self, ids: Tensor, stack: ExitStack, block: Callable[..., Any]) -> Tensor:
        """Logits [B, S, V]; `block(index, hidden, *args, **kwargs)` runs in place of a block."""
        embedding = self.model.get_input_embeddings()
        stack.enter_context(patched(embedding, self._embed(embedding.forward)))
        for module in self._outer_modules():
            stack.enter_context(patched(module, self._lazily(module, module.forward, stack)))
        for index, layer in enumerate(self.blocks):

            def run(hidden_states: Tensor, *args: Any, _index: int = index, **kwargs: Any) -> Any:
                return block(_index, hidden_states, *args, **kwargs)

            stack.enter_context(patched(layer, run))
        return self.model(input_ids=ids.to(self.device), use_cache=False).logits

    def run_block(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """A block's own forward, resident for as long as it runs."""
        layer = self.blocks[index]
        with self._resident(layer, self.dtype, self._block(index + 1)):
            return type(layer).forward(layer, *args, **kwargs)

    @torch.no_grad()
    def run(self, ids: Tensor, block: Callable[..., Any]) -> Tensor:
        """Logits [B, S, V] of ids [B, S]; `block(index, hidden, ...)` stands for each block."""
        with ExitStack() as stack:
            return self._run(ids, stack, block)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]."""
        return self.run(ids, self.run_block)

    def forward_backward(
        self, ids: Tensor, loss: Callable[[Tensor, Tensor], Tensor], progress: Progress
    ) -> float:
        """Differentiate loss(logits, ids) down to the embedding; hooks and patches see it all.

        Blocks run twice, first without gradients and then with, unless there is room for all
        (`tokens_at_once`). Returns the loss. `progress` is called 2 x blocks times.
        """
        if ids.numel() <= self.tokens_at_once():
            return self._whole_backward(ids, loss, progress)
        inputs: list[tuple[Tensor, tuple, dict]] = []
        last: list[Tensor] = []

        def block(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs.append((hidden.detach(), args, kwargs))
            with torch.no_grad():
                out = self.run_block(index, hidden, *args, **kwargs)
            progress()
            if index < len(self.blocks) - 1:
                return out
            tensor = (out[0] if isinstance(out, tuple) else out).detach().requires_grad_()
            last.append(tensor)
            return (tensor, *out[1:]) if isinstance(out, tuple) else tensor

        with ExitStack() as stack, torch.enable_grad():
            logits = self._run(ids, stack, block)
            if self.prefetcher is not None:  # the last block runs again
                self.prefetcher.start(foreign_tensors(self.blocks[-1], self.device))
            value = loss(logits, ids.to(self.device))
            del logits
            value.backward()
        gradient = last[0].grad
        _give_back_memory()
        for index in reversed(range(len(self.blocks))):
            hidden, args, kwargs = inputs.pop()
            hidden.requires_grad_()
            layer, before = self.blocks[index], self._block(index - 1)
            repeatable = _repeatable_attention(self.device)
            with torch.enable_grad(), repeatable, self._resident(layer, self.dtype, before):
                out = type(layer).forward(layer, hidden, *args, **kwargs)
                (out[0] if isinstance(out, tuple) else out).backward(gradient)
            gradient = hidden.grad
            del out
            _give_back_memory()
            progress()
        return float(value.detach())

    def _whole_backward(
        self, ids: Tensor, loss: Callable[[Tensor, Tensor], Tensor], progress: Progress
    ) -> float:
        """`forward_backward` with every block's graph held at once."""

        def block(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                hidden = hidden.detach().requires_grad_()
            out = self.run_block(index, hidden, *args, **kwargs)
            progress()
            return out

        with ExitStack() as stack, torch.enable_grad():
            value = loss(self._run(ids, stack, block), ids.to(self.device))
            value.backward()
        for _ in self.blocks:
            progress()
        return float(value.detach())
