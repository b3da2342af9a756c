"""Scores: their definition against a plain computation, and against what really happens."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model

from mixbits.demo import MODEL_DIR, training_files
from mixbits.errors import UsageError
from mixbits.formats import reference
from mixbits.formats.arrange import Arrangement
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.measuring.evaluate import compare
from mixbits.measuring.fisher import PRIOR_SEQUENCES, _draw, sorted_columns
from mixbits.measuring.sensitivity import METHODS, measure
from mixbits.measuring.text import tokenize
from mixbits.model.layout import find_linears, weight_of
from mixbits.model.streaming import StreamedModel
from mixbits.pipeline import settings
from mixbits.runtime.fake import fake_quantize_model
from mixbits.source.source import open_source

SCHEMES = [parse_scheme(n) for n in ("MXFP4", "MXFP8", "W4A16", "MXFP4A16", "BF16")]

CALLING = tuple(method for method in METHODS if method != "weight")  # which run the model


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
        labels = _draw(logits.detach().softmax(-1), generator)[:, 0]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    record = _recorded(model, [i.name for i in linears], loss)
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
            slabs = torch.stack([part.sum() / 2 for part in columns.split(32)])
            if info.name.endswith(("k_proj", "v_proj")) and scheme.weight is not None:
                share = len(ids) / (len(ids) + PRIOR_SEQUENCES)
                joint = _joint_loss(weight, *record[info.name].values(), scheme, ids.shape)
                slabs = (1 - share) * slabs + share * joint
            found = scores[info.name][scheme.name]
            assert found == pytest.approx(slabs.tolist(), rel=2e-3), info.name


def _joint_loss(weight, x, g, gw, scheme, shape):
    """Per slab, nats per token: 1/2 sum_sequences (sum_t g_t . e_t)^2, from the errors e_t."""
    rounded, rounded_x = (
        t if fmt is None else reference.fake_quantize(t, fmt)
        for t, fmt in ((weight, scheme.weight), (x, scheme.activation))
    )
    slabs = []
    for columns in torch.arange(weight.shape[1]).split(32):
        parts = (t[:, columns].double() for t in (rounded_x, rounded, x, weight))
        xq, wq, xs, ws = parts
        effects = (g.double() * (xq @ wq.T - xs @ ws.T)).sum(1)
        slabs.append(effects.view(shape).sum(1).square().sum() / 2 / shape.numel())
    return torch.stack(slabs)


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


@pytest.mark.parametrize("method", METHODS)
def test_experts_may_be_left_alone(tmp_path, method):
    source, ids = _tiny(tmp_path, "qwen3_moe")
    linears = find_linears(source.load())
    some = [info for info in linears if ".experts.1." not in info.name]
    whole, part = (
        measure(StreamedModel(source.load()), chosen, SCHEMES[:1], ids, method)
        for chosen in (linears, some)
    )
    assert list(part) == [info.name for info in some] != list(whole)
    if method == "fisher":  # scores are of linears alone, in the model as it is
        assert part == {name: whole[name] for name in part}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_weight_equals_its_definition_and_needs_no_text(tmp_path, kind):
    source, _ = _tiny(tmp_path, kind)
    model, linears = source.load(), find_linears(source.load())
    with torch.no_grad():
        weight_of(model, linears[1]).zero_()
    none = torch.empty(0, 16, dtype=torch.int64)
    scores = measure(StreamedModel(model), linears, SCHEMES, none, "weight", seed=5)
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5))
    for info in linears:
        weight = weight_of(model, info).float()
        for scheme in SCHEMES:
            columns = torch.zeros(info.in_features, dtype=torch.float64)
            if scheme.weight is not None and weight.any():
                error = (weight - reference.fake_quantize(weight, scheme.weight)).double()
                columns += error.square().sum(0) / weight.double().square().sum()
            if scheme.activation is not None:
                moved = (x - reference.fake_quantize(x, scheme.activation)).double()
                columns += moved.square().sum() / x.double().square().sum() / info.in_features
            slabs = torch.stack([part.sum() for part in columns.split(32)])
            found = torch.tensor(scores[info.name][scheme.name], dtype=torch.float64)
            torch.testing.assert_close(found, slabs, rtol=1e-5, atol=1e-12)
    with pytest.raises(UsageError, match="weight scores columns as they come"):
        arranged = {linears[0].name: Arrangement(rotated=True)}
        measure(StreamedModel(model), linears, SCHEMES, none, "weight", arrangements=arranged)


def test_eight_bits_cost_less_than_four_and_bf16_nothing(tmp_path):
    source, ids = _tiny(tmp_path)
    linears = find_linears(source.load())
    scores = measure(StreamedModel(source.load()), linears, SCHEMES, ids)
    for row in scores.values():
        assert sum(row["MXFP8"]) < sum(row["MXFP4"])
        assert sum(row["MXFP4A16"]) < sum(row["MXFP4"])
        assert sum(row["BF16"]) == 0


def test_the_command_line_offers_these_methods():
    assert settings.METHODS == METHODS


def test_unknown_method_is_refused(tmp_path):
    source, ids = _tiny(tmp_path)
    with pytest.raises(
        UsageError, match="method must be one of fisher, deltaloss, weight: got 'mse'"
    ):
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
        fake_quantize_model(one, {info.name: Recipe.plain(scheme)})
        figures = compare(StreamedModel(model), StreamedModel(one), ids[8:16])
        predicted.append(sum(scores[info.name]["MXFP4"]))
        measured.append(figures["kl"])
    correlation = torch.corrcoef(torch.stack([_ranks(predicted), _ranks(measured)]))[0, 1].item()
    with capsys.disabled():
        print(f"\nrank correlation of Fisher scores with direct KL: {correlation:.3f}")
    # Unsound scores (no straight-through, weight error only) are at 0.1 and below.
    assert correlation > 0.8


def _folded(model, block, order):
    """The same function, the FFN's intermediate columns of one block in another order."""
    mlp = model.get_submodule(f"model.layers.{block}.mlp")
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight.data = getattr(mlp, name).weight.data[order]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
    return model


def test_an_order_of_columns_scores_like_a_model_folded_that_way(tmp_path):
    source, ids = _tiny(tmp_path)
    linears = find_linears(source.load())
    order = torch.randperm(172)
    name = "model.layers.1.mlp.down_proj"
    ordered = measure(
        StreamedModel(source.load()), linears, SCHEMES, ids, arrangements={name: Arrangement(order)}
    )
    folded = measure(StreamedModel(_folded(source.load(), 1, order)), linears, SCHEMES, ids)
    plain = measure(StreamedModel(source.load()), linears, SCHEMES, ids)
    for scheme in SCHEMES:
        assert ordered[name][scheme.name] == pytest.approx(folded[name][scheme.name], rel=1e-4)
        assert scheme.weight is None or ordered[name] != plain[name]
    other = "model.layers.0.mlp.down_proj"
    assert ordered[other] == plain[other]


def test_a_rotation_scores_the_rotated_product(tmp_path):
    """With unit moments of g and gW the score is the error of rotated weights and inputs."""
    source, ids = _tiny(tmp_path)
    linears = find_linears(source.load())
    name = "model.layers.0.mlp.down_proj"
    rotated = Arrangement(None, rotated=True)
    got = measure(StreamedModel(source.load()), linears, SCHEMES, ids, arrangements={name: rotated})
    plain = measure(StreamedModel(source.load()), linears, SCHEMES, ids)
    whole = {s.name: (sum(got[name][s.name]), sum(plain[name][s.name])) for s in SCHEMES[:2]}
    for after, before in whole.values():  # another basis of the same linear: alike, not equal
        assert 0.3 * before < after < 3 * before and after != before
    # The last 12 columns of 172, an MX block of their own, are left as they are.
    for scheme in (SCHEMES[0], SCHEMES[1], SCHEMES[3]):
        assert got[name][scheme.name][-1] == pytest.approx(plain[name][scheme.name][-1], rel=1e-5)


def test_sorted_columns_begin_with_those_that_suffer_most(tmp_path):
    source, ids = _tiny(tmp_path)
    model = source.load()
    linears = find_linears(model)
    weak = torch.randperm(172)[:20]
    # Inputs that hardly vary, and meet hardly any weight, cannot matter.
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.up_proj.weight.data[weak] *= 1e-3
    readers = [[i] for i in linears if i.name.endswith("down_proj")]
    readers += [[i for i in linears if i.name.endswith((".q_proj", ".k_proj")) and i.block == 0]]
    found = sorted_columns(StreamedModel(model), linears, readers, SCHEMES[0], ids)
    assert set(found) == {i.name for group in readers for i in group}
    order = found["model.layers.0.mlp.down_proj"].order
    assert sorted(order.tolist()) == list(range(172))
    assert set(order[-20:].tolist()) == set(weak.tolist())
    q, k = (found[f"model.layers.0.self_attn.{leaf}_proj"].order for leaf in "qk")
    assert torch.equal(q, k)
    # The first slabs then carry more of the loss than they would as they come.
    shares = []
    for arrangements in ({}, found):
        scores = measure(
            StreamedModel(model), linears, SCHEMES[:1], ids, arrangements=arrangements
        )["model.layers.0.mlp.down_proj"]["MXFP4"]
        shares.append(sum(scores[:2]) / sum(scores))
    assert shares[1] > 1.2 * shares[0]


def test_deltaloss_knows_no_arrangement(tmp_path):
    source, ids = _tiny(tmp_path)
    linears = find_linears(source.load())
    arrangements = {linears[0].name: Arrangement(None, rotated=True)}
    with pytest.raises(UsageError, match="need fisher"):
        measure(
            StreamedModel(source.load()),
            linears,
            SCHEMES,
            ids,
            "deltaloss",
            arrangements=arrangements,
        )


def test_labels_are_drawn_as_likely_as_they_are():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 2
    logits[0, ::7] = -torch.inf  # never
    probabilities = logits.softmax(-1)
    drawn = _draw(probabilities.expand(40000, -1), torch.Generator().manual_seed(0)).squeeze(-1)
    shares = torch.bincount(drawn, minlength=300) / len(drawn)
    assert (shares[::7] == 0).all()
    # Five standard deviations of a share.
    bound = 5 * (probabilities[0] * (1 - probabilities[0]) / len(drawn)).sqrt()
    assert ((shares - probabilities[0]).abs() <= bound).all()


@pytest.mark.parametrize("method", CALLING)
def test_a_linear_that_is_never_called_is_named(tmp_path, method):
    """Mamba multiplies with dt_proj's weight itself: no score would be its own."""
    source, ids = _tiny(tmp_path)
    model = source.load()
    attention = model.model.layers[1].self_attn
    attention.unused = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    with pytest.raises(
        UsageError, match=r"--ignore '\*\.unused' \(model.layers.1.self_attn.unused"
    ):
        measure(StreamedModel(model), find_linears(model), SCHEMES[:1], ids, method)


def _never_routed(model, expert):
    """A router whose logits are steered, so that `expert` is never chosen; the model itself."""
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            plain = module.forward

            def steered(hidden, *args, _plain=plain, _module=module):
                logits = torch.nn.functional.linear(hidden, _module.weight)
                logits[..., expert] = -torch.inf
                top, index = logits.softmax(-1).topk(_module.top_k, dim=-1)
                return logits, (top / top.sum(-1, keepdim=True)).to(hidden.dtype), index

            module.forward = steered
    return model


@pytest.mark.parametrize("method", CALLING)
def test_experts_that_no_token_reached_cost_what_the_others_do(tmp_path, method):
    source, ids = _tiny(tmp_path, "qwen3_moe")
    model = _never_routed(source.load(), expert=2)
    linears = find_linears(model)
    scores = measure(StreamedModel(model), linears, SCHEMES, ids, method)
    for info in linears:
        if not info.is_expert or ".2." not in info.name.partition("experts")[2]:
            continue
        others = [info.name.replace("experts.2", f"experts.{n}") for n in (0, 1, 3)]
        for scheme in SCHEMES:
            if scheme.weight is None:
                continue
            own = scores[info.name][scheme.name]
            rest = [scores[name][scheme.name] for name in others]
            assert min(own) > 0  # every slab of them, not only the sum
            assert min(map(sum, rest)) * 0.5 < sum(own) < max(map(sum, rest)) * 2


@pytest.mark.parametrize("method", CALLING)
def test_experts_of_which_none_was_reached_are_named(tmp_path, method):
    source, ids = _tiny(tmp_path, "qwen3_moe")
    model = _never_routed(source.load(), expert=2)
    only = [i for i in find_linears(model) if not i.is_expert or ".experts.2." in i.name]
    with pytest.raises(UsageError, match=r"got 6 that no token .*experts\.2\.gate_proj\)"):
        measure(StreamedModel(model), only, SCHEMES[:1], ids, method)


def test_columns_of_an_idle_expert_have_an_order(tmp_path):
    source, ids = _tiny(tmp_path, "qwen3_moe")
    model = _never_routed(source.load(), expert=2)
    linears = find_linears(model)
    name = "model.layers.0.mlp.experts.2.down_proj"
    readers = [[i] for i in linears if i.name == name]
    order = sorted_columns(StreamedModel(model), linears, readers, SCHEMES[0], ids)[name].order
    assert sorted(order.tolist()) == list(range(48)) != order.tolist()


@pytest.mark.parametrize("method", CALLING)
def test_a_linear_whose_output_goes_nowhere_is_named(tmp_path, method):
    source, ids = _tiny(tmp_path)
    model = source.load()
    attention = model.model.layers[1].self_attn
    attention.aside = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    plain = attention.forward

    def forward(hidden_states, *args, **kwargs):
        attention.aside(hidden_states)
        return plain(hidden_states, *args, **kwargs)

    attention.forward = forward
    with pytest.raises(UsageError, match=r"--ignore '\*\.aside'"):
        measure(StreamedModel(model), find_linears(model), SCHEMES[:1], ids, method)
