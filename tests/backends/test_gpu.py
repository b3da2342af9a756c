"""The pipeline on a GPU, against the same on the CPU. Skipped, visibly, where there is none."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import INT_FORMATS, MX_FORMATS, assert_same_bits, format_id
from tiny import SMALL, make_model

import mixbits
from mixbits import ops, quantize
from mixbits.backends import cuda
from mixbits.backends.cuda_choice import Device
from mixbits.formats import reference
from mixbits.formats.pack import Operand, Part, order_dtype
from mixbits.formats.schemes import Format, parse_scheme
from mixbits.measuring.sensitivity import measure
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.source.source import open_source

pytestmark = pytest.mark.gpu
BACKENDS = ["cuda", "triton"]
SCHEMES = [parse_scheme(name) for name in ("MXFP4", "MXFP8", "W4A16", "BF16")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    why = ops.backends()[request.param]
    if why is not None:
        required = os.environ.get("MIXBITS_REQUIRE_GPU") == "1"
        (pytest.fail if required else pytest.skip)(f"{request.param}: {why}")
    return request.param


def _model(folder, **overrides):
    make_model(folder, **overrides)
    return open_source(str(folder)).load()


def _ids(rows=4, length=16):
    return torch.randint(130, (rows, length), generator=torch.Generator().manual_seed(0))


def test_streamed_logits_are_those_of_the_cpu(tmp_path):
    model = _model(tmp_path)
    ours = StreamedModel(model, device="cuda").logits(_ids())
    assert ours.device.type == "cuda"
    expected = StreamedModel(model).logits(_ids())
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("method", ["fisher", "deltaloss"])
def test_scores_repeat_and_are_near_those_of_the_cpu(tmp_path, method):
    model = _model(tmp_path)
    linears = find_linears(model, include_head=True)
    first, second = (
        measure(StreamedModel(model, device="cuda"), linears, SCHEMES, _ids(64), method)
        for _ in range(2)
    )
    assert first == second
    if method == "deltaloss":  # fisher draws its labels from the device's own generator
        cpu = measure(StreamedModel(model), linears, SCHEMES, _ids(64), method)
        for info in linears:
            for scheme in SCHEMES:
                pair = (sum(s[info.name][scheme.name]) for s in (first, cpu))
                assert next(pair) == pytest.approx(next(pair), rel=0.05, abs=1e-6)


def test_no_more_than_a_few_blocks_are_on_the_gpu(tmp_path):
    """Weights are streamed: the peak does not grow with the number of blocks."""
    peaks = []
    for layers in (4, 16):
        size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers}
        model = _model(tmp_path / str(layers), **size)
        linears = find_linears(model)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure(StreamedModel(model, device="cuda"), linears, SCHEMES[:2], _ids())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert peaks[1] - peaks[0] < block


@pytest.mark.parametrize("fmt", [MX_FORMATS[0], INT_FORMATS[0]], ids=format_id)
def test_offsets_beyond_2_to_the_31(backend, fmt):
    rows, columns = 65600, 32768
    x = torch.randn(64, columns, device="cuda").bfloat16().repeat(rows // 64, 1)
    got = ops.fake_quantize(x, fmt, backend)
    assert torch.equal(got[-64:], got[:64])
    packed = ops.quantize_pack(x, fmt, backend)
    for part in packed:
        assert part is None or torch.equal(part[-64:], part[:64])
    del got
    values = ops.dequantize(packed, fmt, columns, torch.bfloat16, backend)
    assert torch.equal(values[-64:], values[:64])
    del values
    tokens = x[:2].contiguous()
    y = ops.packed_matmul(tokens, packed, fmt, None, backend)
    assert torch.equal(y[:, -64:], y[:, :64])


def check_replay(step, x):
    """A graph of `step` gives its bits, also once x has others."""
    eager = step()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, eager)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, step())


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8", "MXFP8A16", "W2A16", "W4A16", "W8A16"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 300])
@pytest.mark.parametrize("rows", [256, 16448])
def test_a_graph_replays_an_operation_to_the_bit(backend, name, tokens, rows):
    scheme = parse_scheme(name)
    packed = ops.quantize_pack(torch.randn(rows, 1024, device="cuda"), scheme.weight, backend)
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()

    def step():
        return ops.packed_matmul(x, packed, scheme.weight, scheme.activation, backend)

    check_replay(step, x)


@pytest.mark.parametrize("schemes", [("MXFP8", "MXFP4"), ("W8A16", "W4A16")], ids="+".join)
@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 1100])
def test_a_graph_replays_a_mix_to_the_bit(backend, schemes, tokens):
    columns = (384, 640)
    parts = []
    for name, width in zip(schemes, columns, strict=True):
        scheme = parse_scheme(name)
        packed = ops.quantize_pack(torch.randn(256, width, device="cuda"), scheme.weight, backend)
        parts.append(Part(packed, scheme.weight, scheme.activation))
    order = torch.randperm(1024, device="cuda").to(order_dtype(1024))
    mix = Operand(tuple(parts), columns, order, rotated=parts[0].activation is not None)
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()

    def step():
        return ops.packed_matmuls_unchecked(x, [mix], backend)[0]

    check_replay(step, x)


def test_square_sums(backend):
    x = torch.randn(300, 1000, device="cuda")
    formats = [MX_FORMATS[0], Format("int4", 128)]
    expected = reference.square_sums(x.cpu(), formats)
    torch.testing.assert_close(ops.square_sums(x, formats, backend).cpu(), expected)


def test_the_whole_command_and_what_it_writes(tmp_path, shared):
    command = [str(shared / "llama"), "--dataset", str(shared / "ids.npy"), *SMALL]
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        assert quantize.main([*command, "--device", device, "--out", str(out)]) == 0
    reports = [json.loads((tmp_path / d / "report.json").read_text()) for d in ("cuda", "cpu")]
    held_out = [report["evaluation"]["held_out"] for report in reports]
    assert held_out[0]["perplexity_reference"] == pytest.approx(
        held_out[1]["perplexity_reference"], rel=1e-3
    )
    models = [mixbits.load(tmp_path / "cuda", device=device) for device in ("cuda", "cpu")]
    with torch.no_grad():
        logits = [m.float()(_ids().to(m.device)).logits.cpu() for m in models]
    # Rounded activations may part where a sum ends a bit apart; weights are the same codes.
    assert torch.corrcoef(torch.stack([t.flatten() for t in logits]))[0, 1] > 0.999
    for ours, theirs in zip(models[0].buffers(), models[1].buffers(), strict=True):
        if ours.dtype == torch.uint8:
            assert_same_bits(ours.cpu(), theirs)


def test_generate_on_a_loaded_model(tmp_path, shared, run):
    assert run("--avg-bits", "8.25", "--schemes", "MXFP8A16") == 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = _ids(1).cuda()
    outputs = [
        mixbits.load(tmp_path / "out", device="cuda", cuda_graphs=graphs).generate(ids, **options)
        for graphs in (True, False)
    ]
    assert outputs[0].shape == (1, ids.shape[1] + 12)
    assert torch.equal(*outputs)


def test_a_model_with_activations_in_8_bit_floats(tmp_path, shared, run, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    # A device with one processor, which so small a model fills.
    monkeypatch.setattr(cuda, "_device", lambda device: Device((9, 0), 1))
    assert run("--avg-bits", "5", "--schemes", "MXFP4A16,MXFP8A16") == 0
    models = [
        mixbits.load(tmp_path / "out", device="cuda", fp8_activations=fp8) for fp8 in (True, False)
    ]
    assert any(getattr(module, "row_scale", None) is not None for module in models[0].modules())
    with torch.no_grad():
        logits = [model(_ids(40).cuda()).logits.float().flatten() for model in models]
    assert not torch.equal(*logits)
    assert torch.corrcoef(torch.stack(logits))[0, 1] > 0.99
