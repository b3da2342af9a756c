"""Scores: their definition against a plain computation, and against what really happens."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model

from mixbits import options, reference
from mixbits.calibration import tokenize
from mixbits.demo import MODEL_DIR, training_files
from mixbits.evaluate import compare
from mixbits.fake import fake_quantize_model
from mixbits.formats import UsageError, parse_scheme
from mixbits.model import find_linears, weight_of
from mixbits.sensitivity import METHODS, measure
from mixbits.source import open_source
from mixbits.streaming import StreamedModel

SCHEMES = [parse_scheme(n) for n in ("MXFP4", "MXFP8", "W4A16", "MXFP4A16", "BF16")]


def _tiny(folder, kind="llama"):
    make_model(folder, kind)
    source = open_source(str(folder))
    vocab = source.config.vocab_size
    ids = torch.randint(vocab, (6, 16), generator=torch.Generator().manual_seed(3))
    return source, ids


def _recorded(model, names, loss):
    """x, g = d loss / d output and gW of every linear, by hooks on the whole float32 model."""
    record = {}

    def hook(name):
        def forward(module, args, output):
            record[name] = {"x": args[0].detach().flatten(0, -2)}

            def backward(grad):
                flat = grad.flatten(0, -2)
                record[name] |= {"g": flat, "gw": flat @ module.weight}

            output.register_hook(backward)

        return forward

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    loss().backward()
    for handle in handles:
        handle.remove()
    return record


def test_fisher_equals_its_formula(tmp_path):
    source, ids = _tiny(tmp_path)
    linears = find_linears(source.load())
    scores = measure(StreamedModel(source.load()), linears, SCHEMES, ids, batch_size=6, seed=5)

    model = source.load().float().requires_grad_(True)

    def loss():
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        generator = torch.Generator().manual_seed(5)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    record = _recorded(model, [i.name for i in linears], loss)
    tokens = ids.numel()
    for info in linears:
        weight = weight_of(source.load(), info).float()
        x, g, gw = (record[info.name][k].double() for k in ("x", "g", "gw"))
        for scheme in SCHEMES:
            columns = torch.zeros(info.in_features, dtype=torch.float64)
            if scheme.weight is not None:
                error = (weight - reference.fake_quantize(weight, scheme.weight)).double()
                columns = (x**2).mean(0) * ((g**2).mean(0) @ error**2)
            if scheme.activation is not None:
                rounded = reference.fake_quantize(x.float(), scheme.activation).double()
                columns = columns + (gw**2).mean(0) * ((x - rounded) ** 2).mean(0)
            slabs = [float(part.sum()) / 2 for part in columns.split(32)]
            assert scores[info.name][scheme.name] == pytest.approx(slabs, rel=1e-3), info.name
    assert tokens == 96


def test_deltaloss_equals_its_definition(tmp_path):
    """AutoScheme's: at the quantized model, straight-through, summed over batches."""
    source, ids = _tiny(tmp_path)
    linears = find_linears(source.load())
    scheme = parse_scheme("MXFP4")
    scores = measure(
        StreamedModel(source.load()), linears, [scheme], ids, "deltaloss", batch_size=3
    )
    expected = {i.name: torch.zeros(i.in_features, dtype=torch.float64) for i in linears}
    for batch in ids.split(3):
        model = source.load().float().requires_grad_(True)
        record = {}
        for info in linears:
            module = model.get_submodule(info.name)
            rounded = reference.fake_quantize(module.weight.detach(), scheme.weight)
            leaf = rounded.clone().requires_grad_()

            def forward(x, name=info.name, leaf=leaf, bias=module.bias, record=record):
                # straight-through: the value is rounded, the gradient passes as if it were not
                xq = x + (reference.fake_quantize(x, scheme.activation) - x).detach()
                xq.retain_grad()
                record[name] = (x.detach(), xq, leaf)
                return torch.nn.functional.linear(xq, leaf, bias)

            module.forward = forward
        logits = model(input_ids=batch, use_cache=False).logits
        flat = logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(flat, batch[:, 1:].flatten()).backward()
        for info in linears:
            x, xq, leaf = record[info.name]
            weight = model.get_submodule(info.name).weight.detach()
            moved = (leaf.grad * (weight - leaf)).abs().double().sum(0)
            moved += (xq.grad * (x - xq)).abs().double().flatten(0, -2).sum(0)
            expected[info.name] += moved.detach()
    for info in linears:
        slabs = [float(part.sum()) for part in expected[info.name].split(32)]
        assert scores[info.name]["MXFP4"] == pytest.approx(slabs, rel=2e-3), info.name


@pytest.mark.parametrize("method", ["fisher", "deltaloss"])
def test_scores_do_not_depend_on_a_second_run(tmp_path, method):
    source, ids = _tiny(tmp_path, "qwen3_moe")
    linears = find_linears(source.load(), include_head=True)
    runs = [
        measure(StreamedModel(source.load()), linears, SCHEMES[:2], ids, method) for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_experts_that_no_token_reached_look_like_the_others(tmp_path):
    source, ids = _tiny(tmp_path, "qwen3_moe")
    linears = [i for i in find_linears(source.load()) if i.is_expert]
    scores = measure(StreamedModel(source.load()), linears, SCHEMES[:2], ids[:1, :2])
    assert all(sum(scores[i.name]["MXFP4"]) > 0 for i in linears)


def test_eight_bits_cost_less_than_four_and_bf16_nothing(tmp_path):
    source, ids = _tiny(tmp_path)
    linears = find_linears(source.load())
    scores = measure(StreamedModel(source.load()), linears, SCHEMES, ids)
    for row in scores.values():
        assert sum(row["MXFP8"]) < sum(row["MXFP4"])
        assert sum(row["MXFP4A16"]) < sum(row["MXFP4"])
        assert sum(row["BF16"]) == 0


def test_the_command_line_offers_these_methods():
    assert options.METHODS == METHODS


def test_unknown_method_is_refused(tmp_path):
    source, ids = _tiny(tmp_path)
    with pytest.raises(UsageError, match="method must be one of fisher, deltaloss: got 'mse'"):
        measure(StreamedModel(source.load()), find_linears(source.load()), SCHEMES, ids, "mse")


def _ranks(values):
    return torch.tensor(values).argsort().argsort().double()


def test_fisher_ranks_linears_as_direct_measurement_does(capsys):
    """Quantize one linear at a time, measure the KL: the scores must order it alike."""
    source = open_source(str(MODEL_DIR))
    model, tokenizer = source.load(), source.tokenizer()
    text = "\n\n".join(p.read_text(encoding="utf-8")[:6000] for p in training_files()[40:52])
    ids = tokenize(tokenizer, text)[: 24 * 128].reshape(24, 128)
    linears, scheme = find_linears(model), parse_scheme("MXFP4")
    scores = measure(StreamedModel(model), linears, [scheme], ids[:8])
    predicted, measured = [], []
    for info in linears:
        one = source.load()
        fake_quantize_model(one, {info.name: scheme})
        figures = compare(StreamedModel(model), StreamedModel(one), ids[8:16])
        predicted.append(sum(scores[info.name]["MXFP4"]))
        measured.append(figures["kl"])
    correlation = torch.corrcoef(torch.stack([_ranks(predicted), _ranks(measured)]))[0, 1].item()
    with capsys.disabled():
        print(f"\nrank correlation of Fisher scores with direct KL: {correlation:.3f}")
    # Unsound scores (no straight-through, weight error only) are at 0.1 and below.
    assert correlation > 0.8
