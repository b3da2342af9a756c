"""A packed folder in vLLM, on a machine with GPUs: `python -m benchmarks.peers.vllm_gpu DIR`.

In an environment with vllm and mixbits. Prompts are continued greedily, all at once; then
`mixbits.load` scores the same tokens on the CPU. Printed: the largest difference of a token's log
probability, how many tokens are not the reference's first choice, and tokens per second.

Not run yet: it was written without a GPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

PROMPTS, PROMPT_TOKENS = 8, 16


def prompts(folder: Path) -> list[list[int]]:
    """Pseudo-random tokens: what they say does not matter."""
    size = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(
        size, (PROMPTS, PROMPT_TOKENS), generator=generator
    ).tolist()
    return ids


def continue_in_vllm(args: argparse.Namespace) -> tuple[list[tuple[list[int], list[float]]], float]:
    """Token ids of every continuation with their log probabilities; tokens per second."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(args.folder),
        tensor_parallel_size=args.tensor_parallel,
        skip_tokenizer_init=True,
        enforce_eager=args.eager,
        max_model_len=PROMPT_TOKENS + args.tokens,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=args.tokens, logprobs=0, ignore_eos=True, detokenize=False
    )
    asked: list[Any] = [{"prompt_token_ids": ids} for ids in prompts(args.folder)]
    engine.generate(asked, sampling)  # compiles, captures graphs
    start = time.perf_counter()
    answers = engine.generate(asked, sampling)
    seconds = time.perf_counter() - start
    found = []
    for answer in answers:
        ids = list(answer.outputs[0].token_ids)
        steps = answer.outputs[0].logprobs or []
        found.append((ids, [step[i].logprob for i, step in zip(ids, steps, strict=True)]))
    return found, PROMPTS * args.tokens / seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.vllm_gpu")
    parser.add_argument("folder", type=Path, help="a folder from mixbits.quantize")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs")
    args = parser.parse_args()
    found, rate = continue_in_vllm(args)
    import mixbits

    model = mixbits.load(args.folder)
    worst, others = 0.0, 0
    for prompt, (ids, logprobs) in zip(prompts(args.folder), found, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, PROMPT_TOKENS - 1 : -1]
        scores = logits.float().log_softmax(-1)
        ours = scores.gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, float((ours - torch.tensor(logprobs)).abs().max()))
        others += int((scores.argmax(-1) != torch.tensor(ids)).sum())
    print(f"{torch.cuda.get_device_name()}, {args.tensor_parallel} in parallel")
    print(f"largest difference of a log probability: {worst:.4f}")
    print(f"tokens that are not the reference's first choice: {others} of {PROMPTS * args.tokens}")
    print(f"{rate:.0f} tokens per second, {PROMPTS} sequences at once")


if __name__ == "__main__":
    main()
