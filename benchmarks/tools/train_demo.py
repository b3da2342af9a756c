"""Trains the bundled demo model from the standard library's sources, on a CPU, in an hour.

The command that made ``mixbits/demo/model`` (two cores, CPython 3.11):

    python benchmarks/tools/train_demo.py --minutes 53

It trains a byte-level BPE tokenizer on the training text, packs the files into one token stream
with a bos token before each, and trains a small Llama on random windows of it.  Four choices
get more out of an hour than the plain recipe does:

* Muon for the weight matrices of the layers (AdamW for the embedding and the norms), chosen
  for its reputation of needing fewer tokens at this size; it was not compared with AdamW here;
* bfloat16 autocast and ``torch.compile``;
* windows of 256 tokens at first, which are faster, and of the full 512 for the last 40 %;
* library modules are seen twice for every time test files are seen once, because the
  held-out text is library modules.

The learning rate is a function of the wall clock, not of the step count: it warms up, stays flat
and falls linearly to zero exactly when the budget of ``--minutes`` is spent, whatever the speed
of the machine.  The order of the data is fixed by ``--seed``; how far into it a run gets is not.
The output folder is written every few minutes, so an interrupted run leaves a usable model.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mixbits import demo

BOS, EOS = "<|bos|>", "<|eos|>"

# How text is cut before BPE.  A line break takes the indentation after it along, so that code
# costs one token per line start; a word takes one space or its leading underscores along.  No
# piece ever crosses from a non-space into a space, so adding a continuation that begins with
# a space or newline never changes the tokens before it.
PIECES = r"[\r\n]+[ \t]*| ?_*\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def main() -> None:
    """Train the tokenizer and the model and write the folder."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    paths = demo.training_files()
    tokenizer = train_tokenizer([path.read_text(encoding="utf-8") for path in paths], args.vocab)
    streams = token_streams(paths, tokenizer)
    model = LlamaForCausalLM(model_config(args, tokenizer))
    reset_parameters(model)
    log = Log(args.log)
    log(
        f"{model.num_parameters():,} parameters, {sum(map(len, streams)):,} training tokens "
        f"({len(streams[0]):,} library, {len(streams[1]):,} tests)"
    )
    train(model, tokenizer, streams, args, log)
    save(model, tokenizer, args.out)
    log(f"wrote {args.out}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=53.0, help="wall-clock training budget")
    parser.add_argument("--out", type=Path, default=demo.MODEL_DIR, help="folder to write")
    parser.add_argument("--log", type=Path, help="also append the progress lines to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens per step")
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--eager", action="store_true", help="do not torch.compile")
    parser.add_argument("--float32", action="store_true", help="do not use bfloat16 autocast")
    return parser.parse_args()


class Log:
    """Prints lines with the elapsed time and, if asked to, appends them to a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.start = time.monotonic()

    def __call__(self, message: str) -> None:
        line = f"{time.monotonic() - self.start:7.1f}s  {message}"
        print(line, flush=True)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


# ---------------------------------------------------------------------------------------- text


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training text: any text round-trips, there is no unknown token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def token_streams(paths: list[Path], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """The library files and the test files, each as one long row of tokens, bos before a file."""
    streams: tuple[list[int], list[int]] = ([], [])
    texts = [path.read_text(encoding="utf-8") for path in paths]
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    for path, tokens in zip(paths, encoded, strict=True):
        is_test = "test" in path.parts or "tests" in path.parts
        streams[is_test].extend([tokenizer.bos_token_id, *tokens.ids])
    return torch.tensor(streams[0]), torch.tensor(streams[1])


def batches(
    streams: tuple[Tensor, Tensor], window: int, batch: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches of windows.  Each epoch cuts the streams anew, at another random offset."""
    while True:
        pool = []
        for stream, repeats in zip(streams, (2, 1), strict=True):
            for _ in range(repeats):
                offset = int(torch.randint(window, (), generator=generator))
                count = max(0, (len(stream) - offset - 1) // window)
                starts = offset + window * torch.arange(count)
                pool.append(stream[starts[:, None] + torch.arange(window + 1)])
        windows = torch.cat(pool)
        order = torch.randperm(len(windows), generator=generator)
        for index in order[: len(order) // batch * batch].split(batch):
            yield windows[index]


# --------------------------------------------------------------------------------------- model


def model_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Hidden and FFN sizes are multiples of 128, so that every group size divides every row."""
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def reset_parameters(model: LlamaForCausalLM) -> None:
    """Start with every block's output at zero and everything else at a width-scaled normal."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=0.02 if "embed" in name else weight.shape[1] ** -0.5)


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the (tied) embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices,
        lr=args.muon_lr,
        momentum=0.95,
        weight_decay=0.02,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def lr_scale(progress: float) -> float:
    """Warm up over 2 % of the budget, stay until 35 %, then fall linearly to zero."""
    return min(1.0, (progress + 1e-3) / 0.02, max(0.0, 1.0 - progress) / 0.65)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    streams: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    log: Log,
) -> None:
    """Run until the wall-clock budget is spent."""
    step_loss = loss_function(model, args)
    steppers = optimizers(model, args)
    data = {
        window: batches(
            streams,
            window,
            args.batch_tokens // window,
            torch.Generator().manual_seed(args.seed + window),
        )
        for window in (256, 512)
    }
    for windows in data.values():
        step_loss(next(windows)).backward()  # compile before the clock starts
    budget, start = args.minutes * 60, time.monotonic()
    saved = start
    tokens, recent, since = 0, [], start
    step = 0
    while (progress := (time.monotonic() - start) / budget) < 1:
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(progress)
            optimizer.zero_grad()
        loss = step_loss(next(data[256 if progress < 0.6 else 512]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
        recent.append(loss.item())
        step += 1
        tokens += args.batch_tokens
        if step % 25 == 0:
            now = time.monotonic()
            rate = len(recent) * args.batch_tokens / (now - since)
            log(
                f"step {step}  {progress:6.1%}  tokens {tokens:,}  "
                f"loss {math.fsum(recent) / len(recent):.4f}  {rate:.0f} tokens/s"
            )
            recent, since = [], now
        if time.monotonic() - saved > args.save_minutes * 60:
            save(model, tokenizer, args.out)
            saved = time.monotonic()


def loss_function(model: LlamaForCausalLM, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """Next-token cross-entropy of a batch of windows, as a function of the batch."""

    def loss(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    return loss if args.eager else torch.compile(loss, dynamic=False)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder as Hugging Face wants it, weights in bfloat16."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors creates it for the owner only


if __name__ == "__main__":
    main()
