"""Rounding learned from the original model: codes only, straight through, better on other text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FORMATS, assert_same_bits, by_format, format_id
from recipes import MODES, opened
from tiny import add_tokenizer, make_model, read

from mixbits import ops
from mixbits.errors import UsageError
from mixbits.formats.pack import pack
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.reference import Quantized, dequantize, encode, quantize
from mixbits.formats.schemes import Format
from mixbits.measuring.evaluate import sequence_kl
from mixbits.model import streaming
from mixbits.model.streaming import StreamedModel
from mixbits.rounding import distill
from mixbits.rounding.distill import enough_text, written
from mixbits.rounding.whole_model import RoundedModel, round_model
from mixbits.source.source import open_source

LEARNED = [f for f in FORMATS if f.bits < 8]


def part_of(fmt: Format) -> distill._Part:
    weight = torch.randn(24, 172)  # no group divides that
    weight[3] = 0.0
    return distill._Part(pack(quantize(weight, fmt), fmt), fmt, 172)


@by_format
def test_what_has_learned_nothing_is_what_was_packed(fmt: Format) -> None:
    part = part_of(fmt)
    assert (part.latent is None) == (fmt.bits == 8)
    for ours, theirs in zip(part.packed(), part.before, strict=True):
        if theirs is not None:
            assert_same_bits(ours, theirs)
    torch.testing.assert_close(part.weight(), ops.dequantize(part.before, fmt, 172))


@pytest.mark.parametrize("fmt", LEARNED, ids=format_id)
def test_a_weight_takes_the_nearest_code_and_gradients_pass_straight_through(fmt: Format) -> None:
    part = part_of(fmt)
    assert part.latent is not None
    scale = part.scales.scale
    factors = torch.exp2(scale.float() - 127) if fmt.scale == "e8m0" else scale.float()
    factors = factors.repeat_interleave(fmt.group_size, 1)[:, :172]
    with torch.no_grad():
        part.latent += torch.randn(part.latent.shape)
        moved = part.latent.flatten(1)[:, :172] * factors
    weight, gradient = part.weight(), torch.randn(24, 172)
    weight.backward(gradient)
    codes = encode(moved, part.scales, fmt)
    nearest = dequantize(Quantized(codes, *part.scales), fmt)
    torch.testing.assert_close(weight, nearest)
    torch.testing.assert_close(ops.dequantize(part.packed(), fmt, 172), nearest)
    assert part.latent.grad is not None
    found = part.latent.grad.flatten(1)
    torch.testing.assert_close(found[:, :172], gradient * factors)
    assert not found[:, 172:].any()  # what fills the last group


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe"])
def test_it_is_nearer_to_the_original_on_other_text(kind: str, tmp_path: Path) -> None:
    """Ordered, rotated and mixed linears, the head, and experts."""
    source, model, linears, chosen, _ = opened(tmp_path, kind)
    streamed = StreamedModel(model)
    ids = written(source.load(), torch.randint(0, 130, (4, 32)), 96)
    rounded = round_model(streamed, linears, chosen, "rtn")
    learned = distill.distill(streamed, linears, chosen, rounded, ids, 40, batch_size=8)
    assert set(learned) == set(rounded)
    fresh = written(source.load(), torch.randint(0, 130, (4, 32)), 32, seed=1)
    after, before = (
        float(sequence_kl(streamed, RoundedModel(streamed, linears, chosen, r), fresh).mean())
        for r in (learned, rounded)
    )
    assert after < 0.93 * before
    for info in linears:
        schemes = [scheme for scheme, _ in chosen[info.name].parts(info.in_features)]
        for new, old, scheme in zip(learned[info.name], rounded[info.name], schemes, strict=True):
            assert_same_bits(new.weight_scale, old.weight_scale)
            if scheme.element_bits == 8:
                assert_same_bits(new.weight_packed, old.weight_packed)


def test_blocks_one_at_a_time_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, ids = [], torch.randint(0, 130, (12, 32))
    for number, room in enumerate((1 << 34, 0)):
        monkeypatch.setattr(streaming, "GRAPH_BYTES", room)
        _, model, linears, chosen, _ = opened(tmp_path / str(number), "llama")
        streamed = StreamedModel(model.float())
        assert bool(streamed.tokens_at_once()) == bool(room)
        rounded = round_model(streamed, linears, chosen, "rtn")
        learned.append(distill.distill(streamed, linears, chosen, rounded, ids, 8, batch_size=8))
    for name, parts in learned[0].items():
        for one, other in zip(parts, learned[1][name], strict=True):
            same = one.weight_packed == other.weight_packed
            assert same.float().mean() > 0.98  # signs of the smallest gradients differ


def test_experts_that_no_token_reached_stay(tmp_path: Path) -> None:
    _, model, linears, _, _ = opened(tmp_path, "qwen3_moe")
    chosen = {i.name: parse_recipe("MXFP4", *MODES) for i in linears}
    streamed = StreamedModel(model)
    rounded = round_model(streamed, linears, chosen, "rtn")
    one_token = torch.zeros(1, 2, dtype=torch.int64)
    learned = distill.distill(streamed, linears, chosen, rounded, one_token, 60, batch_size=1)
    stayed = [
        torch.equal(learned[i.name][0].weight_packed, rounded[i.name][0].weight_packed)
        for i in linears
        if i.is_expert
    ]
    assert any(stayed) and not all(stayed)


def test_what_the_model_writes(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path)))
    model, ids = source.load(), torch.randint(0, 130, (3, 24))
    state = torch.random.get_rng_state()
    sequences = written(model, ids, 70)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sequences.shape == (70, 24) and sequences.dtype == torch.int64
    text = [row.tolist() for row in ids]
    for row in sequences.tolist():
        starts = [row[:8] == known[i : i + 8] for known in text for i in range(17)]
        assert any(starts)
    assert len({tuple(row[8:]) for row in sequences.tolist()}) == 70
    assert torch.equal(written(model, ids, 70), sequences)
    assert not torch.equal(written(model, ids, 70, seed=1), sequences)
    model.generation_config.repetition_penalty, model.generation_config.top_k = 5.0, 1
    assert torch.equal(written(model, ids, 70), sequences)
    assert model.generation_config.top_k == 1
    # Its own text is what it finds likely.
    loss = [
        torch.nn.functional.cross_entropy(model(x).logits[:, 7:-1].mT.float(), x[:, 8:])
        for x in (sequences, torch.randint(0, 130, (70, 24)))
    ]
    assert loss[0] < loss[1] - 0.2
    assert written(model, ids[:, :5], 2).shape == (2, 5)


def test_no_sequence_is_seen_more_than_twice(tmp_path: Path) -> None:
    model = open_source(str(make_model(tmp_path))).load()
    ids = torch.randint(0, 130, (5, 16))
    for steps, batch_size, sequences in ((6, 4, 12), (7, 3, 11), (2, 4, 5), (2, 5, 5)):
        enough = enough_text(model, ids, steps, batch_size=batch_size)
        assert enough.shape == (sequences, 16)
        assert torch.equal(enough[:5], ids)
        seen = torch.cat(list(distill._batches(enough, steps, batch_size, 0)))
        counts = seen.unique(dim=0, return_counts=True)[1]
        assert counts.sum() == steps * batch_size and counts.max() <= 2


def test_without_text(tmp_path: Path) -> None:
    _, model, linears, chosen, ids = opened(tmp_path, "llama")
    streamed = StreamedModel(model)
    rounded = round_model(streamed, linears, chosen, "rtn")
    with pytest.raises(UsageError, match="--distill needs calibration text"):
        distill.distill(streamed, linears, chosen, rounded, ids[:0], 1, batch_size=8)


@pytest.mark.parametrize("gate", [0, 4])
@pytest.mark.parametrize("granularity", ["layer", "slab"])
def test_the_command_ships_the_better_one(
    gate: int, granularity: str, run: Callable[..., int], tmp_path: Path
) -> None:
    model = make_model(add_tokenizer(tmp_path / "model"))
    options = ("--distill", 12, "--rounding", "rtn", "--gate", gate, "--granularity", granularity)
    assert run("--avg-bits", 5, *options, model=model) == 0
    report = read(tmp_path / "out" / "report.json")
    first = "slabs" if granularity == "slab" else "optimal"
    names = [row["name"] for row in (report["gate"] or {}).get("candidates", [])]
    assert (not gate) or {first, f"{first}, distilled"} <= set(names)
    if not gate or names[0] == f"{first}, distilled":
        assert report["rounding"]["distilled"] == 12
        assert report["rounding"]["written_sequences"] == 12 * 8 / 2 - 4
    assert report["rounding"]["method"] == "rtn"


def test_a_given_plan_is_distilled(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--avg-bits", 5, "--rounding", "rtn", "--solve-only", out="plan") == 0
    plan = tmp_path / "plan" / "plan.json"
    kl = {}
    for out, options in (("before", []), ("after", ["--distill", 60])):
        assert run("--plan", plan, "--rounding", "rtn", *options, out=out) == 0
        report = read(tmp_path / out / "report.json")
        assert ("distilled" in report["rounding"]) == bool(options)
        kl[out] = report["evaluation"]["held_out"]["kl"]
    assert kl["after"] != kl["before"]  # so little text promises no more


def test_without_the_gate_there_is_one_way_of_learning(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 5, "--distill", "--tune", "--gate", 0) == 2
    assert "without the gate only one can ship" in capsys.readouterr().err
