"""A tokenizer with a token per byte, and special ones that can stand around a text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

BOS, EOS, MASK, SOP = range(4)
SPECIAL = {"<s>": BOS, "</s>": EOS, "[gMASK]": MASK, "<sop>": SOP}
VOCAB = 132


def make_tokenizer(template: list[str] | None, **options: Any) -> PreTrainedTokenizerFast:
    """One token per byte, four special ones, and what stands around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    vocab = SPECIAL | {chr(i): i + len(SPECIAL) for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if template is not None:
        known = list(SPECIAL.items())
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=known)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    names["additional_special_tokens"] = ["[gMASK]", "<sop>"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)
