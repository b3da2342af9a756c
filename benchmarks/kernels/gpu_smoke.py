"""Every GPU kernel once, on awkward shapes: a small program for compute-sanitizer.

    compute-sanitizer --tool racecheck python -m benchmarks.kernels.gpu_smoke cuda

Results are compared with mixbits.formats.reference on the CPU, so that it also says whether they
are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from mixbits import ops
from mixbits.errors import UsageError
from mixbits.formats import fp8_weights as folding
from mixbits.formats import reference
from mixbits.formats.pack import Operand, Packed, Part, order_dtype, unpack
from mixbits.formats.schemes import Format

FORMATS = (
    Format("e2m1", 32),
    Format("e4m3", 32, scale_mode="even"),
    Format("e5m2", 32, scale_mode="rceil"),
    Format("int2", 32, symmetric=False),
    Format("int4", 128),
    Format("int8", 64, symmetric=False),
)
ROWS = 70
COLUMNS = (172, 1056)  # neither is a multiple of 128; the second is long enough to be split
TOKENS = (1, 3, 17, 70, 300)


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    error = (got.double().cpu() - expected.double().cpu()).norm()
    return bool(error <= tolerance * expected.double().norm())


def checks(backend: str, device: str) -> Iterator[tuple[str, bool]]:
    """(operation, whether its result is right)."""
    for columns in COLUMNS:
        generator = torch.Generator().manual_seed(columns)
        weight = torch.randn(ROWS, columns, generator=generator).bfloat16()
        gradient = torch.randn(ROWS, columns, generator=generator).bfloat16()
        row, column = weight.float().abs().mean(1), weight.float().abs().mean(0)
        on = [t.to(device) for t in (weight, row, column, gradient)]
        formats = list(FORMATS[:2])
        got = ops.fisher_statistics(*on[:3], formats, backend)
        expected = reference.fisher_statistics(weight, row, column, formats)
        yield f"fisher_statistics {columns}", _close(got, expected, 1e-6)
        got = ops.gradient_statistics(on[0], on[3], formats, backend)
        expected = reference.gradient_statistics(weight, gradient, formats)
        yield f"gradient_statistics {columns}", _close(got, expected, 1e-6)
        got = ops.square_sums(on[0], formats, backend)
        yield f"square_sums {columns}", _close(got, reference.square_sums(weight, formats), 1e-6)
        for fmt in FORMATS:
            yield from _format_checks(weight, fmt, backend, device)
    yield from _fp8_checks(backend, device)


def _fp8_checks(backend: str, device: str) -> Iterator[tuple[str, bool]]:
    """Activations in 8-bit floats, where that is possible; enough blocks for it to be chosen."""
    try:
        ops.require_fp8(device, backend)
    except UsageError as error:
        print(f"skipped: {error}")
        return
    fmt, columns, generator = FORMATS[0], COLUMNS[1], torch.Generator().manual_seed(0)
    packed = ops.quantize_pack(torch.randn(130, columns, generator=generator), fmt, "reference")
    x = torch.randn(9000, columns, generator=generator).bfloat16()
    row_scale = ops.fold_rows(packed, fmt, columns)
    assert row_scale is not None
    there = packed.to(device), fmt, row_scale.to(device)
    y = ops.packed_matmul_fp8(x.to(device), *there, backend)
    yield "packed_matmul_fp8", _close(y, folding.matmul(x, packed, row_scale), 1e-2)


def _format_checks(
    weight: Tensor, fmt: Format, backend: str, device: str
) -> Iterator[tuple[str, bool]]:
    name, columns = f"{fmt.element} {weight.shape[1]}", weight.shape[1]
    rounded = reference.fake_quantize(weight, fmt)
    there = weight.to(device)
    got = ops.fake_quantize(there, fmt, backend)
    yield f"fake_quantize {name}", torch.equal(got.cpu(), rounded)
    packed = ops.quantize_pack(there, fmt, backend)
    q = unpack(Packed(*(t if t is None else t.cpu() for t in packed)), fmt, columns)
    yield f"quantize_pack {name}", torch.equal(q.codes, reference.quantize(weight, fmt).codes)
    values = ops.dequantize(packed, fmt, columns, torch.bfloat16, backend)
    yield f"dequantize {name}", torch.equal(values.cpu(), rounded)
    activation = fmt if fmt.is_float else None
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
        x = x.bfloat16()
        expected = reference.matmul(x, q, fmt, activation)
        y = ops.packed_matmul(x.to(device), packed, fmt, activation, backend)
        yield f"packed_matmul {name} M={tokens}", _close(y, expected, 1e-2)


def _mixed_checks(backend: str, device: str) -> Iterator[tuple[str, bool]]:
    """Weights in segments, in an order of their own; MX ones rotated."""
    columns, width = COLUMNS[1], 352
    for high, low in ((FORMATS[1], FORMATS[0]), (FORMATS[5], FORMATS[4])):
        weight = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(width))
        pieces = zip((high, low), weight.split((width, columns - width), 1), strict=True)
        parts = [
            Part(ops.quantize_pack(part, fmt, "reference"), fmt, fmt if fmt.is_float else None)
            for fmt, part in pieces
        ]
        order = torch.arange(columns).flip(0).to(order_dtype(columns))
        mix = Operand(tuple(parts), (width, columns - width), order, high.is_float)
        there = mix._replace(
            parts=tuple(one._replace(packed=one.packed.to(device)) for one in parts),
            order=order.to(device),
        )
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
            x = x.bfloat16()
            expected = ops.packed_matmuls(x, [mix], "reference")[0]
            y = ops.packed_matmuls(x.to(device), [there], backend)[0]
            yield f"mix {high.element}+{low.element} M={tokens}", _close(y, expected, 1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.gpu_smoke", description=__doc__
    )
    parser.add_argument("backend", choices=ops.BACKENDS)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    results = [*checks(args.backend, args.device), *_mixed_checks(args.backend, args.device)]
    if args.device == "cuda":
        torch.cuda.synchronize()
    wrong = [name for name, right in results if not right]
    print(f"{args.backend}: {len(results) - len(wrong)} of {len(results)} right")
    if wrong:
        raise SystemExit("wrong: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
