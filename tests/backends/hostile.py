"""Arguments of operations that somebody has tampered with, and what then happens.

    python hostile.py            every case once: its name, a tab and its outcome per line
    python hostile.py fuzz S N   random ones for S seconds, from seed N

An outcome is "right" (what the operation gives for an ordinary tensor of the same numbers),
"refused" (a ValueError or TypeError of one sentence), or it begins with "WRONG". A case that kills
the process is the last line without an outcome.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tampered import ALLOWED, SAME, TAMPERED, fake, flat, freed, shrunk
from torch import Tensor

from mixbits import ops
from mixbits.backends import cpu
from mixbits.formats.pack import Operand, Packed, Part, order_dtype
from mixbits.formats.schemes import INT_GROUPS, SCALE_MODES, Format

# As conftest's, which a program of its own has no sight of.
FORMATS = [Format(e, 32, scale_mode=m) for e in ("e2m1", "e4m3", "e5m2") for m in SCALE_MODES] + [
    Format(e, g, symmetric=s)
    for e in ("int2", "int4", "int8")
    for g in INT_GROUPS
    for s in (True, False)
]
MXFP4, INT4 = Format("e2m1", 32), Format("int4", 32, symmetric=False)
ROWS, COLUMNS = 6, 64


# --- operations and their tensors -----------------------------------------------------------------


def packed(rows: int = ROWS, columns: int = COLUMNS, fmt: Format = INT4) -> Packed:
    return ops.quantize_pack(torch.randn(rows, columns), fmt, "reference")


def part(rows: int = ROWS, columns: int = COLUMNS, fmt: Format = MXFP4) -> Part:
    return Part(packed(rows, columns, fmt), fmt)


def weights() -> dict[str, Tensor]:
    codes, scale, zero, _ = packed()
    assert zero is not None
    return {"codes": codes, "scale": scale, "zero": zero}


def mix(x: Tensor, codes: Tensor, scale: Tensor, order: Tensor, second: Packed) -> Tensor:
    parts = Part(Packed(codes, scale), MXFP4), Part(second, MXFP4)
    return ops.packed_matmuls(x, [Operand(parts, (COLUMNS, COLUMNS), order)])[0]


def tensors_of(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """An operation, and arguments that it takes."""
    x, (n, k) = torch.randn(ROWS, COLUMNS), (ROWS, COLUMNS)
    if name == "mix":
        codes, scale, *_ = packed(fmt=MXFP4)
        x, order = torch.randn(3, 2 * k), torch.randperm(2 * k).to(order_dtype(2 * k))
        arguments = {"x": x, "codes": codes, "scale": scale, "order": order}
        return lambda **a: mix(second=SECOND, **a), arguments
    native = torch.ops.mixbits
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "fake_quantize": (lambda x: ops.fake_quantize(x, MXFP4), {"x": x}),
        "torch.fake_quantize": (lambda x: native.fake_quantize(x, MXFP4.code), {"x": x}),
        "quantize_pack": (lambda weight: ops.quantize_pack(weight, INT4), {"weight": x}),
        "dequantize": (
            lambda codes, scale, zero: ops.dequantize(Packed(codes, scale, zero), INT4, k),
            weights(),
        ),
        "fold_rows": (
            lambda codes, scale: ops.fold_rows(Packed(codes, scale), MXFP4, k),
            dict(zip(("codes", "scale"), packed(fmt=MXFP4), strict=False)),
        ),
        "fisher_statistics": (
            lambda weight, row, column: ops.fisher_statistics(weight, row, column, FORMATS),
            {"weight": x, "row": torch.rand(n), "column": torch.rand(k)},
        ),
        "gradient_statistics": (
            lambda weight, gradient: ops.gradient_statistics(weight, gradient, FORMATS),
            {"weight": x, "gradient": torch.randn(n, k)},
        ),
        "square_sums": (lambda x: ops.square_sums(x, [MXFP4, INT4]), {"x": x}),
        "compensate_group": (
            lambda group, factor, importance: ops.compensate_group(group, factor, importance, INT4),
            {
                "group": x[:, :32].clone(),
                "factor": torch.rand(32, 32),
                "importance": torch.rand(32),
            },
        ),
        "packed_matmul": (
            lambda x, codes, scale, zero: ops.packed_matmul(x, Packed(codes, scale, zero), INT4),
            {"x": torch.randn(3, k), **weights()},
        ),
        "torch.packed_matmul": (
            lambda x, codes, scale, zero: native.packed_matmul(
                x, codes, scale, zero, None, INT4.code, 0
            ),
            {"x": torch.randn(3, k), **weights()},
        ),
        "packed_matmul_backward": (
            lambda gradient, codes, scale, zero: native.packed_matmul_backward(
                gradient, codes, scale, zero, None, INT4.code, k
            ),
            {"gradient": torch.randn(3, n), **weights()},
        ),
    }
    return found[name]


NAMES = (
    "fake_quantize",
    "torch.fake_quantize",
    "quantize_pack",
    "dequantize",
    "fold_rows",
    "fisher_statistics",
    "gradient_statistics",
    "square_sums",
    "compensate_group",
    "packed_matmul",
    "torch.packed_matmul",
    "packed_matmul_backward",
    "mix",
)
# torch itself refuses what its operators cannot be given, in words and errors of its own.
REFUSALS = (ValueError, TypeError)
TORCHS = (*REFUSALS, RuntimeError, AssertionError)


def agree(got: Any, wanted: Any) -> bool:
    pairs = list(zip(flat(got), flat(wanted), strict=True))
    return all(a is b or torch.equal(a, b) for a, b in pairs)


def outcome(run: Callable[[], Any], wanted: Any, refusals: tuple[type[Exception], ...]) -> str:
    try:
        got = run()
    except refusals as error:
        lines = str(error).strip().splitlines()
        said = lines[0] if lines else ""
        if not said or (len(lines) > 1 and refusals is REFUSALS):
            return f"WRONG: not one sentence: {error!r}"
        return f"refused: {said}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    if wanted is None:
        return "accepted"
    return "right" if agree(got, wanted) else "WRONG: other numbers"


def tampered_tensors() -> dict[str, tuple[str, Callable[[], str]]]:
    """Every argument of every operation in every way: name -> what is asked, and the trial."""
    cases: dict[str, tuple[str, Callable[[], str]]] = {}
    for name in NAMES:
        for argument in tensors_of(name)[1]:
            allowed = ALLOWED.get((name, argument), set())
            for way, change in {**SAME, **TAMPERED}.items():
                expected = "right" if way in SAME else "any" if way in allowed else "refused"
                cases[f"{name}, {argument} {way}"] = expected, trial(name, argument, way, change)
    return cases


def trial(name: str, argument: str, way: str, change: Callable[[Tensor], Any]) -> Callable[[], str]:
    def run() -> str:
        torch.manual_seed(0)
        call, arguments = tensors_of(name)
        is_torchs = name not in ("fold_rows", "mix") and not hasattr(ops, name)
        wanted = call(**arguments)
        try:
            changed = change(arguments[argument])
        except (RuntimeError, IndexError) as error:
            return f"not made: {error}"
        if not isinstance(changed, Tensor) and is_torchs:
            return "not made: torch takes tensors"
        refusals = TORCHS if is_torchs or name.startswith("torch.") else REFUSALS
        ordinary = None if way in TAMPERED else wanted
        return outcome(lambda: call(**{**arguments, argument: changed}), ordinary, refusals)

    return run


# --- composites, formats, names -------------------------------------------------------------------

SECOND = packed(fmt=MXFP4)


def orders() -> dict[str, Any]:
    """Orders of 64 columns that are none."""
    order = torch.randperm(64)
    return {
        "too short": order[:-1],
        "too long": torch.cat([order, order[:1]]),
        "a number twice": torch.where(order == 3, 4, order),
        "below 0": torch.where(order == 3, -1, order),
        "beyond": torch.where(order == 3, 64, order),
        "65535": torch.where(order == 3, 65535, order),
        "2^40": torch.where(order == 3, 2**40, order),
        "of floats": order.float(),
        "of bools": order.bool(),
        "of two dimensions": order[None],
        "of none": order[:0],
        "a scalar": order[0],
        "a list": order.tolist(),
        "on the meta device": order.to("meta"),
        "sparse": order.to_sparse(),
        "freed": freed(order),
        "shrunk": shrunk(order),
        "fake": fake(order),
    }


def mixes() -> dict[str, Any]:
    """Mixes for x [2, 64] that cannot be."""
    half = (part(8, 32), part(8, 32))
    found = {f"an order {name}": Operand(half, (32, 32), one) for name, one in orders().items()}
    return found | {
        "second has fewer rows": Operand((part(4000, 32), part(1, 32)), (32, 32)),
        "second has no rows": Operand((part(8, 32), part(0, 32)), (32, 32)),
        "second has more rows": Operand((part(1, 32), part(64, 32)), (32, 32)),
        "first has no rows": Operand((part(0, 32), part(8, 32)), (32, 32)),
        "no columns, first": Operand((part(8, 0), part(8, 64)), (0, 64)),
        "no columns, last": Operand((part(8, 64), part(8, 0)), (64, 0)),
        "no columns at all": Operand((part(8, 0),), (0,)),
        "negative columns": Operand((part(8, 96), part(8, 32)), (96, -32)),
        "columns of floats": Operand(half, (32.0, 32.0)),  # type: ignore[arg-type]
        "columns beyond int64": Operand(half, (2**64 + 32, 32)),
        "columns that are too few": Operand(half, (32, 31)),
        "columns that are too many": Operand(half, (32, 64)),
        "more columns than parts": Operand(half, (32, 16, 16)),
        "fewer columns than parts": Operand(half, (64,)),
        "no parts": Operand((), ()),
        "nine parts": Operand((part(8, 8),) * 9, (8,) * 8 + (0,)),
        "parts of no type": Operand((1, 2), (32, 32)),  # type: ignore[arg-type]
        "an operand in an operand": Operand((half[0], Operand((half[1],), (32,))), (32, 32)),  # type: ignore[arg-type]
        "packed of another format": Operand((half[0], half[1]._replace(format=INT4)), (32, 32)),
        "a format of no type": Operand((half[0], half[1]._replace(format=5)), (32, 32)),  # type: ignore[arg-type]
        "an activation of no type": Operand(
            (half[0], half[1]._replace(activation="MXFP4")),  # type: ignore[arg-type]
            (32, 32),
        ),
        "rotated by a number": Operand(half, (32, 32), None, 7),  # type: ignore[arg-type]
        "a tuple": (half, (32, 32)),
        "a part": half[0],
        "a part's members": tuple(half[0]),
        "nothing": None,
        "packed as a tuple": Operand((Part(tuple(half[0].packed), MXFP4),), (64,)),  # type: ignore[arg-type]
        "one segment on the meta device": Operand(
            (half[0], half[1]._replace(packed=half[1].packed.to("meta"))), (32, 32)
        ),
        "no zero points": Operand.plain(packed()._replace(weight_zero_point=None), INT4, 64),
        "zero points without a use": Operand.plain(packed(), Format("int4", 32), 64),
    }


CODES = [-1, 1, 3, 6, 0xFF, 1 << 13, 7 << 16, MXFP4.code | 0x300, MXFP4.code | 0xF00]
CODES += [MXFP4.code | 1 << 13, MXFP4.code & ~(1 << 12), INT4.code | 31 << 16, -MXFP4.code]
CODES += [2**31, 2**31 - 1, -(2**31), 2**40 | MXFP4.code, 2**63 - 1, -(2**63), 64 << 16 | 1 << 12]
BACKENDS: list[Any] = [5, b"cpu", ["cpu"], {}, torch.zeros(1), "no such", "CPU", True, "cuda\0"]
SIZES: list[Any] = [-1, -64, 65, 63.0, 64.0, 2**40, 2**64, None, "64", True, 0]


def calls() -> dict[str, Callable[[], Any]]:
    """Arguments that are no tensors."""
    x, one = torch.randn(2, COLUMNS), packed()
    native, found = torch.ops.mixbits, dict[str, Callable[[], Any]]()
    for code in CODES:
        found[f"fake_quantize, code {code}"] = lambda c=code: native.fake_quantize(x, c)
        found[f"packed_matmul, code {code}"] = lambda c=code: native.packed_matmul(x, *one, c, 0)
        found[f"packed_matmul, activation {code}"] = lambda c=code: native.packed_matmul(
            x, *one, INT4.code, c
        )
        found[f"backward, code {code}"] = lambda c=code: native.packed_matmul_backward(
            torch.randn(2, ROWS), *one, c, COLUMNS
        )
    for name in BACKENDS:
        found[f"fake_quantize, backend {name!r}"] = lambda b=name: ops.fake_quantize(x, MXFP4, b)
        found[f"packed_matmul, backend {name!r}"] = lambda b=name: ops.packed_matmul(
            x, one, INT4, backend=b
        )
    for size in SIZES:
        found[f"dequantize, in_features {size!r}"] = lambda s=size: ops.dequantize(one, INT4, s)
        found[f"fold_rows, in_features {size!r}"] = lambda s=size: ops.fold_rows(SECOND, MXFP4, s)
        if type(size) is int and -(2**63) <= size < 2**63:
            found[f"backward, in_features {size!r}"] = lambda s=size: native.packed_matmul_backward(
                torch.randn(2, ROWS), *one, INT4.code, s
            )
    for fmt in (None, "e2m1", 5, MXFP4.code, Format):
        found[f"fake_quantize, format {fmt!r}"] = lambda f=fmt: ops.fake_quantize(x, f)
        found[f"quantize_pack, format {fmt!r}"] = lambda f=fmt: ops.quantize_pack(x, f)
        found[f"dequantize, format {fmt!r}"] = lambda f=fmt: ops.dequantize(one, f, COLUMNS)
        found[f"square_sums, format {fmt!r}"] = lambda f=fmt: ops.square_sums(x, [MXFP4, f])
        found[f"square_sums, formats {fmt!r}"] = lambda f=fmt: ops.square_sums(x, f)
        found[f"compensate_group, format {fmt!r}"] = lambda f=fmt: ops.compensate_group(
            x[:, :32], torch.rand(32, 32), torch.rand(32), f
        )
    for columns in (0, 33, 129, 4096):
        found[f"compensate_group of {columns} columns"] = lambda n=columns: ops.compensate_group(
            torch.randn(3, n), torch.rand(n, n), torch.rand(n), MXFP4
        )
    for dtype in (torch.float64, torch.int8, None, "float32"):
        found[f"dequantize, dtype {dtype}"] = lambda d=dtype: ops.dequantize(one, INT4, 64, d)
    for form in (
        ("e2m1", 32, False),
        ("int4", 32, 2),
        ("int4", 32.0, True),
        ("int4", 33, True),
        ("int4", 0, True),
        ("int7", 32, True),
    ):
        found[f"Format{form}"] = lambda form=form: Format(*form)
    found["vmap"] = lambda: torch.func.vmap(lambda y: ops.fake_quantize(y, MXFP4))(x)
    found["vmap of a product"] = lambda: torch.func.vmap(
        lambda y: ops.packed_matmul(y[None], one, INT4)
    )(x)
    return found


def tampered_arguments() -> dict[str, tuple[str, Callable[[], str]]]:
    x = torch.randn(2, 64)
    cases: dict[str, tuple[str, Callable[[], str]]] = {}
    for name, one in mixes().items():
        for tokens in (x[:1], x, x.expand(9, 2, 64).flatten(0, 1)):
            cases[f"mix, {len(tokens)} tokens: {name}"] = (
                "refused",
                lambda one=one, t=tokens: outcome(
                    lambda: ops.packed_matmuls(t, [one]), None, REFUSALS
                ),
            )
    for name, call in calls().items():
        cases[name] = "refused", lambda call=call: outcome(call, None, REFUSALS)
    return cases


def cases() -> dict[str, tuple[str, Callable[[], str]]]:
    return tampered_tensors() | tampered_arguments()


# --- random ones -----------------------------------------------------------------------------


def random_tensor(rng: random.Random, shape: tuple[int, ...]) -> Tensor:
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    x = torch.randn(shape) * 2.0 ** rng.randint(-20, 12)
    if rng.random() < 0.3:
        x[torch.rand(shape) < 0.1] *= 1000.0
    if rng.random() < 0.1 and x.numel():
        x.view(-1)[rng.randrange(x.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf, -0.0])
    return x.to(dtype)


def random_product(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], str]:
    """A product, of one weight or in segments: by name its tensors, and how it may differ."""
    rows, tokens = rng.choice([0, 1, 2, 7, 33, 100]), rng.choice([0, 1, 2, 4, 5, 9, 40])
    count = rng.choice([1, 1, 2, 3, 8])
    widths = tuple(rng.choice([1, 7, 31, 32, 64, 96, 130]) for _ in range(count))
    columns, operands, tensors = sum(widths), [], {}
    for number, width in enumerate(widths):
        fmt = rng.choice(FORMATS)
        activation = rng.choice([None, None, *FORMATS])
        for name, value in packed(rows, width, fmt)._asdict().items():
            tensors[f"{name}.{number}"] = value
        operands.append((fmt, activation))
    tensors["x"] = random_tensor(rng, (tokens, columns))
    tensors["order"] = torch.randperm(columns) if rng.random() < 0.4 else None
    rotated, is_mix = rng.random() < 0.3, count > 1 or rng.random() < 0.3

    def call(backend: str | None = None, **t: Any) -> Any:
        parts = tuple(
            Part(Packed(*(t[f"{name}.{i}"] for name in Packed._fields)), fmt, activation)
            for i, (fmt, activation) in enumerate(operands)
        )
        whole = Operand(parts, widths, t["order"], rotated)
        return ops.packed_matmuls(t["x"], [whole], backend)[0]

    if not is_mix:
        tensors["order"], rotated = None, False
    return call, tensors, "close"


def random_rounding(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], str]:
    shape = (rng.choice([0, 1, 5, 33]), rng.choice([0, 1, 31, 32, 33, 130, 600]))
    fmt, formats = rng.choice(FORMATS), rng.sample(FORMATS, rng.randint(0, 5))
    x = random_tensor(rng, shape)
    kind = rng.choice(["fake", "pack", "dequantize", "squares", "fisher", "gradient"])
    if kind == "fake":
        return lambda x, backend=None: ops.fake_quantize(x, fmt, backend), {"x": x}, "equal"
    if kind == "pack":
        return lambda x, backend=None: ops.quantize_pack(x, fmt, backend), {"x": x}, "equal"
    if kind == "squares":
        return lambda x, backend=None: ops.square_sums(x, formats, backend), {"x": x}, "close"
    if kind == "dequantize":
        arguments = packed(*shape, fmt)._asdict()

        def decode(backend: str | None = None, **t: Any) -> Any:
            return ops.dequantize(Packed(**t), fmt, shape[1], torch.float32, backend)

        return decode, dict(arguments), "equal"
    if kind == "fisher":
        vectors = {"row": torch.rand(shape[0]), "column": torch.rand(shape[1]).double()}

        def fisher(x: Tensor, row: Tensor, column: Tensor, backend: str | None = None) -> Tensor:
            return ops.fisher_statistics(x, row, column, formats, backend)

        return fisher, {"x": x, **vectors}, "close"
    gradient = random_tensor(rng, shape)
    return (
        lambda x, gradient, backend=None: ops.gradient_statistics(x, gradient, formats, backend),
        {"x": x, "gradient": gradient},
        "close",
    )


def is_close(got: Tensor, wanted: Tensor, x: Tensor) -> bool:
    """Sums in another order, of activations in integers; and steps of the dtype."""
    if not torch.equal(got.isnan(), wanted.isnan()):
        return False
    got, wanted = got.double().nan_to_num(), wanted.double().nan_to_num()
    step = 2.0**-6 if x.dtype == torch.bfloat16 else 2.0**-9
    scale = wanted[wanted.abs() < 1e30].abs().max() if wanted.numel() else torch.zeros(())
    return bool(((got - wanted).abs() <= step * (wanted.abs() + scale) + 1e-30).all())


def fuzz(seconds: float, seed: int) -> int:
    """Valid and hostile arguments in turn; every line says what is tried before it is."""
    rng, end, count = random.Random(seed), time.monotonic() + seconds, 0
    torch.manual_seed(seed)
    isas = cpu.available_isas()
    while time.monotonic() < end:
        make = rng.choice([random_product, random_product, random_rounding])
        call, tensors, kind = make(rng)
        if isas:
            cpu.set_isa(rng.choice(isas))
        changed = dict(tensors)
        ways = {**SAME, **TAMPERED} if rng.random() < 0.5 else SAME
        told = []
        for name, x in tensors.items():
            if x is not None and x.dim() and rng.random() < 0.4:
                way = rng.choice(list(ways))
                try:
                    changed[name] = ways[way](x)
                except (RuntimeError, IndexError, ValueError):
                    continue  # torch has no such tensor
                told.append((name, way))
        print(f"{seed}/{count} {kind} {told}", flush=True)
        count += 1
        try:
            got = call(**changed)
        except (ValueError, TypeError) as error:
            if any(way in TAMPERED for _, way in told):
                continue
            print(f"WRONG: refused what is right: {error}")
            return 1
        if any(way in TAMPERED for _, way in told):
            continue  # perhaps it has another shape, and is another right argument
        wanted = call(backend="reference", **tensors)
        for a, b in zip(flat(got), flat(wanted), strict=True):
            same = a is b or torch.equal(a.nan_to_num(), b.nan_to_num())
            if not (same or (kind == "close" and is_close(a, b, tensors["x"]))):
                print(f"WRONG: other numbers, by {(a.double() - b.double()).abs().max()}")
                return 1
    print(f"{count} calls")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["fuzz"]:
        sys.exit(fuzz(float(sys.argv[2]), int(sys.argv[3])))
    for name, (_, run) in cases().items():
        print(f"{name}\t", end="", flush=True)
        print(run(), flush=True)
