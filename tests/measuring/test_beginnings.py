"""Sequences begin as the tokenizer begins a text: found by asking it, seen token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokens import BOS, EOS, MASK, SOP, SPECIAL, VOCAB, make_tokenizer
from tiny import read
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mixbits import quantize
from mixbits.errors import UsageError
from mixbits.measuring.evaluate import _without_suffix, compare, per_sequence, summary
from mixbits.measuring.text import begin, cut, load_sequences, prefix_tokens
from mixbits.model.streaming import StreamedModel
from mixbits.rounding.distill import written

NOT_ROTATED = ["--rotate", "none"]  # a row of one number, spread, lies below float16's scales
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATES: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "one": (["<s>", "$A"], (BOS,)),
    "two": (["[gMASK]", "<sop>", "$A"], (MASK, SOP)),
    "none": (["$A"], ()),
    "both ends": (["<s>", "$A", "</s>"], (BOS,)),
    "end only": (["$A", "</s>"], ()),
}


@torch.no_grad()
def make_model(folder: Path, sink: int) -> Path:
    """A Llama that says the alphabet, if its texts begin with the token `sink`, and useless if not.

    All queries look for that token, whose value is 0; where it is missing, attention adds noise.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 64}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}
    config = LlamaConfig(
        vocab_size=VOCAB, bos_token_id=BOS, eos_token_id=EOS, **sizes, **heads, **rope
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    known = torch.nn.functional.normalize(torch.randn(VOCAB, 32, generator=generator), dim=1)
    embedding = torch.zeros(VOCAB, 64)
    embedding[:, :32], embedding[:, 32] = known, 0.5
    embedding[sink] = 0.0
    embedding[sink, 32:34] = torch.tensor([0.5, 1.0])
    head = torch.zeros(VOCAB, 64)
    codes = [ord(c) + len(SPECIAL) for c in LETTERS]
    head[codes[1:] + codes[:1], :32] = 4 * known[codes]
    model.model.embed_tokens.weight.copy_(embedding)
    model.lm_head.weight.copy_(head)
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.zero_()
        attention.q_proj.weight[7, 32] = 10.0  # the pair of columns that turns slowest
        attention.k_proj.weight[7, 33] = 10.0
        attention.v_proj.weight[:, :32] = torch.randn(16, 32, generator=generator)
        attention.o_proj.weight[:32] = 4 * torch.randn(32, 16, generator=generator)
        layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every batch of token ids that any stage gives to a model."""
    batches: list[Tensor] = []
    run = StreamedModel._run

    def record(self: StreamedModel, ids: Tensor, *args: Any) -> Tensor:
        batches.append(ids.cpu().clone())
        return run(self, ids, *args)

    monkeypatch.setattr(StreamedModel, "_run", record)
    yield batches


def call(folder: Path, text: Path, *options: object, out: str = "out") -> dict[str, Any]:
    words = [folder / "model", "--out", folder / out, "--dataset", text, "--avg-bits", 8]
    words += ["--nsamples", 4, "--seqlen", 16, "--eval-nsamples", 4, "--gate", 2, "--batch-size", 3]
    words += NOT_ROTATED
    assert quantize.main([str(word) for word in [*words, *options]]) == 0
    report: dict[str, Any] = read(folder / out / "report.json")
    return report


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(LETTERS * 40)
    return path


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_prefix_is_what_the_tokenizer_puts_before_a_text(case: str) -> None:
    template, expected = TEMPLATES[case]
    assert prefix_tokens(make_tokenizer(template)) == expected


def test_a_bos_that_is_known_is_not_always_put() -> None:
    assert prefix_tokens(make_tokenizer(None)) == ()
    assert prefix_tokens(make_tokenizer(["<s>", "$A"], add_bos_token=False)) == ()
    assert prefix_tokens(None) == ()


def test_a_tokenizer_that_splits_otherwise_behind_its_prefix() -> None:
    def tokenizer(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        ids = [ord(c) for c in text]
        return {"input_ids": [7, 8, ids[0] + 500, *ids[1:]] if add_special_tokens else ids}

    assert prefix_tokens(tokenizer) == (7, 8)


STREAMS: dict[str, tuple[list[int], tuple[int, ...], list[list[int]]]] = {
    "no prefix": ([5, 6, 7, 8, 9], (), [[5, 6, 7, 8]]),
    "no prefix, but a BOS": ([0, 6, 7, 8, 0, 0, 5, 5], (), [[0, 6, 7, 8], [0, 0, 5, 5]]),
    "text": ([5, 6, 7, 8, 9, 10, 11], (0,), [[0, 5, 6, 7], [0, 8, 9, 10]]),
    "a BOS at the start": ([0, 5, 6, 7, 8, 9, 10], (0,), [[0, 5, 6, 7], [0, 8, 9, 10]]),
    "twice at the start": ([0, 0, 5, 6, 7], (0,), [[0, 5, 6, 7]]),
    "documents": ([0, 5, 6, 7, 0, 8, 9, 10, 0, 11], (0,), [[0, 5, 6, 7], [0, 8, 9, 10]]),
    "documents of other lengths": ([0, 5, 6, 0, 7, 8, 9], (0,), [[0, 5, 6, 0], [0, 7, 8, 9]]),
    "two tokens": ([5, 6, 7, 8, 9], (2, 3), [[2, 3, 5, 6], [2, 3, 7, 8]]),
    "two tokens, held": ([2, 3, 5, 6, 2, 3, 7, 8], (2, 3), [[2, 3, 5, 6], [2, 3, 7, 8]]),
    "two tokens, cut amid them": ([5, 2, 3, 7, 8], (2, 3), [[2, 3, 5, 2], [2, 3, 7, 8]]),
    "nothing else": ([0, 0, 0, 0], (0,), []),
}


@pytest.mark.parametrize("case", STREAMS)
def test_sequences_begin_with_the_prefix_once(case: str) -> None:
    stream, prefix, expected = STREAMS[case]
    found = cut(torch.tensor(stream), 4, "ids", 20, prefix)
    assert found.ids.tolist() == expected and found.ids.shape[1] == 4
    assert found.describe()["prefix"] == list(prefix)
    # Cut again, as from a file of them, they are the same.
    assert torch.equal(cut(found.ids.flatten(), 4, "ids", 20, prefix).ids, found.ids)


def test_a_prefix_needs_room_and_a_place_in_the_vocabulary() -> None:
    with pytest.raises(UsageError, match=r"--seqlen must be above 2, .* got 2"):
        cut(torch.arange(9), 2, "ids", 20, (2, 3))
    with pytest.raises(UsageError, match=r"must be in 0\.\.9, .* got 0\.\.12 .*another model's"):
        cut(torch.arange(9), 4, "ids", 10, (12,))
    assert begin(torch.tensor([0, 0, 5]), (0,)).tolist() == [0, 5]
    assert begin(torch.tensor([5]), (2, 3)).tolist() == [2, 3, 5]
    assert begin(torch.tensor([0, 5]), ()).tolist() == [0, 5]


def test_files_of_ids_and_of_chats_that_hold_it(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(["<s>", "$A"])
    rows = [[BOS, *range(10, 17)], [BOS, *range(20, 27)], [BOS, *range(30, 37)]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    np.save(tmp_path / "rows.npy", np.array(rows))
    for name in ("rows.json", "rows.npy"):
        first, held = load_sequences(str(tmp_path / name), tokenizer, VOCAB, 2, 1, 8)
        assert [*first.ids.tolist(), *held.ids.tolist()] == rows
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = [[{"role": "user", "content": letter * 6}] for letter in "abcdef"]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert texts[0] == "<s>aaaaaa"
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    # Two line feeds lie between texts: 8 tokens and a BOS, of which sequences hold 8 in turn.
    first, _ = load_sequences(str(path), tokenizer, VOCAB, 5, 0, 9)
    assert tokenizer.batch_decode(first.ids) == [f"<s>{c * 6}\n\n" for c in "abcde"]
    plain, _ = load_sequences(str(path), tokenizer, VOCAB, 3, 0, 9, bos=False)
    assert tokenizer.decode(plain.ids.flatten()) == "\n\n".join(texts)[: 27 + 3 * 2]


OPTIONS: dict[str, list[object]] = {
    "gate": [],
    "deltaloss": ["--method", "deltaloss"],
    "refine": ["--refine", 1],
    "diagnose": ["--diagnose"],
    # All tokens read the value of one, 0, which compensation spoils: it weighs tokens alike.
    "search": ["--max-kl", 3.0, "--rounding", "search"],
    "distill": ["--distill", 4],
}


# Where there is no prefix, one stage and what the model writes will do.
STAGES = [(c, o) for c in ("one", "two") for o in OPTIONS] + [("none", "gate"), ("none", "distill")]


@pytest.mark.parametrize(("case", "options"), STAGES)
def test_every_stage_sees_it(case: str, options: str, tmp_path: Path, seen: list[Tensor]) -> None:
    template, prefix = TEMPLATES[case]
    make_tokenizer(template).save_pretrained(make_model(tmp_path / "model", (*prefix, BOS)[0]))
    more = OPTIONS[options]
    if "--max-kl" in more:  # in the place of a budget
        words = [str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--seqlen", "16"]
        words += ["--dataset", str(text_file(tmp_path)), "--nsamples", "4", "--gate", "2"]
        words += NOT_ROTATED
        assert quantize.main([*words, *map(str, more), "--eval-nsamples", "4"]) == 0
        report = read(tmp_path / "out" / "report.json")
    else:
        report = call(tmp_path, text_file(tmp_path), *more)
    count = len(prefix)
    assert seen
    for batch in seen:
        assert batch.shape[1] == 16  # the prefix counts
        assert (batch[:, :count] == torch.tensor(prefix)).all()
        assert not torch.isin(batch[:, count], torch.tensor(list(SPECIAL.values()))).any()
    texts = {tuple(row[count:].tolist()) for batch in seen for row in batch}
    codes = torch.tensor([ord(c) + len(SPECIAL) for c in LETTERS * 12]).split(16 - count)
    assert {tuple(piece.tolist()) for piece in codes[:10]} <= texts
    if "--distill" not in more:
        assert len(texts) == 10  # 4 to calibrate, 2 of the gate, 4 held out
    held = report["evaluation"]["held_out"]
    for part in (report["calibration"], report["gate"], held):
        assert part is None or part["prefix"] == list(prefix)
    if case == "one":  # the first letter of a sequence is anyone's guess: 1 of 15
        assert held["perplexity_reference"] < 3


def test_without_it_the_model_is_useless(tmp_path: Path, seen: list[Tensor]) -> None:
    make_tokenizer(["<s>", "$A"]).save_pretrained(make_model(tmp_path / "model", BOS))
    text = text_file(tmp_path)
    having = call(tmp_path, text)["evaluation"]["held_out"]
    seen.clear()
    lacking = call(tmp_path, text, "--no-bos", out="old")["evaluation"]["held_out"]
    assert lacking["prefix"] == [] and not any((batch == BOS).any() for batch in seen)
    assert lacking["perplexity_reference"] > 10 * having["perplexity_reference"]
    # Other text for the end, and scores of either kind, know it as well.
    seen.clear()
    scores = tmp_path / "out" / "scores.json"
    again = call(tmp_path, text, "--eval-dataset", text, "--scores", scores, out="again")
    assert again["evaluation"]["held_out"]["prefix"] == [BOS]
    assert all((batch[:, 0] == BOS).all() for batch in seen)
    words = [str(tmp_path / "model"), "--out", str(tmp_path / "no"), "--dataset", str(text)]
    words += ["--scores", str(scores), "--seqlen", "16", "--no-bos"]
    assert quantize.main(words) == 2


def test_the_first_token_of_the_text_is_the_first_that_is_judged(tmp_path: Path) -> None:
    for case, first in (("one", 0), ("two", 1), ("none", 0)):
        template, _ = TEMPLATES[case]
        tokenizer = make_tokenizer(template)
        _, held = load_sequences(str(text_file(tmp_path)), tokenizer, VOCAB, 0, 3, 16)
        assert held.judged_from == first
        model = StreamedModel(LlamaForCausalLM.from_pretrained(make_model(tmp_path / case, MASK)))
        logits = model.logits(held.ids).double()
        losses = torch.nn.functional.cross_entropy(
            logits[:, first:-1].mT, held.ids[:, first + 1 :], reduction="none"
        )
        found = compare(model, model, held.ids, first=held.judged_from)
        assert found["perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-6)
        assert found["kl"] == 0.0
        means = per_sequence(model, model, held.ids, first=held.judged_from)
        torch.testing.assert_close(means[:, 1], losses.mean(1))
        assert summary(means) == found


@pytest.mark.parametrize("prefix", [(), (BOS,), (MASK, SOP)], ids=len)
def test_what_the_model_writes_begins_so(prefix: tuple[int, ...], tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(make_model(tmp_path, (*prefix, BOS)[0]))
    documents = torch.tensor([[*prefix, 40, 41, *prefix, 42, 43, 44, 45]] * 3)
    found = written(model, documents, 40, prefix=prefix)
    assert found.shape == (40, documents.shape[1])
    assert (found[:, : len(prefix)] == torch.tensor(prefix)).all()
    assert not torch.isin(found[:, len(prefix)], torch.tensor(prefix)).any()
    assert torch.equal(
        found[:, : len(prefix) + 1].unique(dim=0)[:, -1].unique()[:1], torch.tensor([40])
    )


def test_lm_eval_begins_so_and_ends_with_nothing() -> None:
    for case in TEMPLATES:
        template, prefix = TEMPLATES[case]
        tokenizer = make_tokenizer(template)
        used = _without_suffix(tokenizer, prefix)
        if prefix:
            assert used("ab")["input_ids"] == [*prefix, ord("a") + 4, ord("b") + 4]
        assert tokenizer("ab")["input_ids"] == make_tokenizer(template)("ab")["input_ids"]


def test_scores_do_not_silence_nsamples(
    run: Callable[..., int], tmp_path: Path, seen: list[Tensor]
) -> None:
    assert run("--avg-bits", 5, "--solve-only", "--nsamples", 3) == 0
    scores = ["--scores", tmp_path / "out" / "scores.json"]
    for count in (2, 6):
        seen.clear()
        assert run("--avg-bits", 5, *scores, "--nsamples", count, out=str(count)) == 0
        assert read(tmp_path / str(count) / "report.json")["rounding"]["nsamples"] == count
        assert len(seen[0]) == count  # of error compensation: all at once
        # What is judged begins where both the scores' and this run's text end.
        held = seen[-3][0].tolist()  # then the calibration text is judged, by two models too
        ids = torch.cat([batch.flatten() for batch in seen[:1]]).tolist()
        assert held != ids[: len(held)]
