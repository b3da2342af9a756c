"""Rounding that is learned for the whole model at once: `--distill`.

Every other way of rounding looks at one linear, or one block, and keeps its output. Here the
quantized model learns from the original: gradient descent moves the weights, as they were rounded,
so as to lower what is measured in the end, KL(original || quantized) of the next token. A weight
moves in float, is rounded at each use with the scale that it was packed with, and its gradient
passes straight through the rounding, as the activations' does (quantization-aware distillation;
LLM-QAT, Liu et al., arXiv 2305.17888). Formats, scales and sizes stay: what is learned is codes.

A calibration text of 64 sequences would be learned by heart, so the original model writes more of
it, until no sequence is learned from more than twice: what it continues is distributed as it
predicts, which is all that is to be kept, and needs no data (LLM-QAT's observation as well).

Only the gradient's sign is followed, as by SignRound: as good as Adam here, without its moments. It
runs a block at a time like the measurement (`mixbits.model.streaming`); what is learned and its
gradient take 8 bytes for each weight below 8 bits. Weights of 8 bits err so little that they stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import GenerationConfig

from .. import ops, progress
from ..backends.gradients import straight_through
from ..errors import UsageError
from ..formats.arrange import arrangement_of
from ..formats.compensate import snap, snapper
from ..formats.pack import Packed, Rounded, pack, unpack
from ..formats.reference import Quantized, dequantize, encode, join_groups, split_groups
from ..formats.schemes import Assignment, Format, Recipe
from ..model.layout import CausalLM, LinearInfo, decoder_blocks
from ..model.probing import probed
from ..model.replaced import replaced
from ..model.streaming import StreamedModel
from .nearest import fake_input

RATE = 0.173  # of a group's scale, over the root of the steps: what the first one moves a weight
SEEN = 2  # times that a sequence is learned from, at most
PROMPT = 8  # tokens of the calibration text that a written sequence starts with
WRITTEN_AT_ONCE = 64
LEARNED_BITS = 7  # at most


class _Part:
    """Packed columns of one format; below 8 bits, with float weights to learn in their place.

    `latent` [N, groups, group] has these, in units of their group's scale: one rate suits all.
    """

    def __init__(self, packed: Packed, fmt: Format, columns: int) -> None:
        self.before, self.fmt, self.columns = packed, fmt, columns
        self.latent: Tensor | None = None
        if fmt.bits <= LEARNED_BITS:
            codes = unpack(packed, fmt, columns)
            self.scales = codes.scales
            self.grid = snapper(codes.scales, fmt).of_groups()
            latent = split_groups(dequantize(codes, fmt), fmt.group_size) / self.grid.scale
            self.latent = latent.requires_grad_()

    def weight(self) -> Tensor:
        """float32 [N, columns], rounded."""
        if self.latent is None:
            return ops.dequantize(self.before, self.fmt, self.columns)
        values = self.latent * self.grid.scale
        rounded = snap(values.detach(), self.grid, self.fmt)
        return join_groups(straight_through(values, rounded), self.columns)

    def packed(self) -> Packed:
        if self.latent is None:
            return self.before
        codes = encode(self.weight().detach(), self.scales, self.fmt)
        return pack(Quantized(codes, *self.scales), self.fmt)


class _Linear:
    """A linear whose rounding is learned."""

    def __init__(self, recipe: Recipe, packed: Sequence[Packed], columns: int) -> None:
        self.recipe = recipe
        self.arrangement = arrangement_of(recipe, packed[0].weight_packed.device)
        self.parts = [
            _Part(one, scheme.format, count)
            for one, (scheme, count) in zip(packed, recipe.parts(columns), strict=True)
        ]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rounded = fake_input(x, self.recipe, self.arrangement)
        weight = torch.cat([part.weight() for part in self.parts], 1).to(rounded.dtype)
        return torch.nn.functional.linear(rounded, weight, bias).to(x.dtype)


def _batches(ids: Tensor, count: int, size: int, seed: int) -> Iterator[Tensor]:
    """`count` batches of sequences: every one once, in random order, then again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count * size // len(ids))
    order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(rounds)])
    for rows in order[: count * size].split(size):
        yield ids[rows]


def _divergence(reference: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss: mean KL(reference || logits) per token, both [B, S, V]."""
    target = reference.flatten(0, -2).float().log_softmax(-1)

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        found = logits.flatten(0, -2).float().log_softmax(-1)
        return kl_div(found, target, reduction="batchmean", log_target=True)

    return loss


def enough_text(
    model: CausalLM,
    ids: Tensor,
    steps: int,
    *,
    batch_size: int,
    seed: int = 0,
    prefix: Sequence[int] = (),
) -> Tensor:
    """ids [sequences, length], and what the model has to write for `steps` to learn from.

    All of them begin with the tokens of `prefix`. The model must hold its weights, on the device
    that is to compute.
    """
    count = -(-steps * batch_size // SEEN) - len(ids)
    return torch.cat([ids, written(model, ids, count, seed, prefix)]) if count > 0 else ids


def distill(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    recipes: Assignment,
    rounded: Rounded,
    ids: Tensor,
    steps: int,
    *,
    batch_size: int,
    seed: int = 0,
) -> dict[str, list[Packed]]:
    """Learn the codes of packed weights `rounded` (linear -> its parts): the same, learned.

    With token ids [sequences, length], `batch_size` sequences a step. They come back on the CPU.
    Raises UsageError without text.
    """
    if not len(ids):
        raise UsageError("--distill needs calibration text")
    columns = {info.name: info.in_features for info in linears}
    learned = {
        name: _Linear(recipes[name], [part.to(model.device) for part in parts], columns[name])
        for name, parts in rounded.items()
    }
    latents = [p.latent for one in learned.values() for p in one.parts if p.latent is not None]
    if latents:
        batches = _batches(ids, steps, batch_size, seed)
        _descend(model, linears, learned, latents, batches, steps, batch_size)
    return {name: [part.packed().to("cpu") for part in one.parts] for name, one in learned.items()}


def _descend(
    model: StreamedModel,
    linears: Sequence[LinearInfo],
    learned: Mapping[str, _Linear],
    latents: Sequence[Tensor],
    batches: Iterator[Tensor],
    count: int,
    size: int,
) -> None:
    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if name not in learned:
            return torch.nn.functional.linear(x, weight, bias)
        return learned[name](x, bias)

    rate = RATE / math.sqrt(count)
    advance = progress.steps(count * size, (progress.BACKWARD + 1) * len(model.blocks))
    for step, batch in enumerate(batches):
        loss = _divergence(model.logits(batch))
        with probed(model.model, linears, probe):
            value = model.forward_backward(batch, loss, lambda: None)
        _move(latents, rate * (1 - step / count))
        with progress.part(f"distilled {step + 1} of {count} steps, KL {value:.4f}"):
            advance(len(batch))


@torch.no_grad()
def _move(latents: Sequence[Tensor], distance: float) -> None:
    """Every latent by `distance` against the sign of its gradient, which is used up."""
    for latent in latents:
        if latent.grad is not None:  # an expert may have seen no token
            latent -= distance * latent.grad.sign()
            latent.grad = None


def _prompts(ids: Tensor, count: int, seed: int, prefix: Sequence[int]) -> Tensor:
    """int64 [count, tokens]: `prefix`, and some tokens from anywhere in ids [sequences, length]."""
    generator = torch.Generator().manual_seed(seed)
    texts = ids[:, len(prefix) :]  # each begins with them, and not twice
    length = texts.shape[1]
    prompt = min(PROMPT, length - 1)
    rows = torch.randint(len(ids), (count,), generator=generator)
    starts = torch.randint(length - prompt + 1, (count,), generator=generator)
    if prompt:
        begin_again = torch.isin(texts[rows, starts], torch.tensor(prefix, dtype=torch.int64))
        starts = starts.masked_fill(begin_again, 0)
    prompts = texts[rows[:, None], starts[:, None] + torch.arange(prompt)]
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), prompts], 1)


def written(
    model: CausalLM, ids: Tensor, count: int, seed: int = 0, prefix: Sequence[int] = ()
) -> Tensor:
    """`count` sequences that the model continues from a few tokens of ids [sequences, length].

    int64 [count, length] on the CPU, drawn from the model's own distribution; each begins with the
    tokens of `prefix`, as those of `ids` do. The model must hold its weights, on the device that is
    to compute.
    """
    prompts = _prompts(ids, count, seed, prefix)
    missing = ids.shape[1] - prompts.shape[1]
    options = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=missing,
        min_new_tokens=missing,
        pad_token_id=0,
    )
    found = []
    # Options that are not given would come from the model's own, such as a penalty of repetition.
    own = replaced(model, "generation_config", options)
    advance = progress.steps(count, len(decoder_blocks(model)[1]))
    with own, progress.part("the original writes text"), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in prompts.split(WRITTEN_AT_ONCE):
            batch = batch.to(model.device)
            found.append(model.generate(batch, attention_mask=torch.ones_like(batch)).cpu())
            advance(len(batch))
    return torch.cat(found)
