"""What every test shares: the environment, the formats, hard inputs, and exact comparison."""

import os
import signal

if hasattr(signal, "SIGHUP"):  # nohup has it ignored, here and in what tests start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Before torch is imported: waiting threads must not spin on cores that other work needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core: their threads would only take turns
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from matrix import MARK, WRITE, Matrix, Summary, format_id
from tiny import SMALL, add_tokenizer, make_model, write_ids
from torch import Tensor

from mixbits import progress, quantize
from mixbits.backends import choice, cpu
from mixbits.formats import reference
from mixbits.formats.schemes import INT_GROUPS, SCALE_MODES, SCALES, Format

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Elements that every backend holds, with scales in e8m0 and in float16.
FLOATS, INTS = ("e2m1", "e4m3", "e5m2"), ("int2", "int4", "int8")
MX_FORMATS = [Format(e, 32, scale_mode=mode) for e in FLOATS for mode in SCALE_MODES]
INT_FORMATS = [
    Format(e, group, symmetric=symmetric)
    for e in INTS
    for group in INT_GROUPS
    for symmetric in (True, False)
]
FORMATS = MX_FORMATS + INT_FORMATS  # what every backend holds
# Every other that there can be, of which a backend may hold some.
MORE_FORMATS = [
    fmt
    for kind, scale in SCALES.items()
    for element in scale.elements
    for size in scale.group_sizes
    for mode in (SCALE_MODES if kind == "e8m0" else SCALE_MODES[:1])
    for symmetric in ((True, False) if kind == "float16" else (True,))
    for per in (("tensor", "row") if kind == "e4m3" else ("",))
    if (fmt := Format(element, size, symmetric, mode, kind, per)) not in FORMATS
]
CPU_FORMATS = FORMATS + [fmt for fmt in MORE_FORMATS if cpu.holds(fmt)]
# Of these, what weights are packed in: they share no scale of a row.
CPU_PACKED = [fmt for fmt in CPU_FORMATS if fmt.tensor_scale != "row"]
# The instruction sets of this CPU; without the native library one that skips.
ISAS = cpu.available_isas() or ["scalar"]


by_format = pytest.mark.parametrize("fmt", FORMATS, ids=format_id)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# The instruction sets take turns on each input, so that a cache of one input's results serves all.
by_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the reports of all workers come to their master
        names = [format_id(fmt) for fmt in FORMATS + MORE_FORMATS]
        config.pluginmanager.register(Summary(names, os.environ.get(WRITE)))


@pytest.hookimpl(tryfirst=True)  # before items are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if MARK in getattr(item, "fixturenames", ()):
            item.add_marker(MARK)
    # Workers take file after file: those that compile come first, or one core waits at the end.
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest), so that an unwritten output cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def printed() -> Iterator[None]:
    """Lines of the logger `mixbits` are printed, as by a command."""
    with progress.printed():
        yield


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Matrix:
    """Where a test says which cells it compares."""
    return Matrix(request.node)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with every instruction set that this CPU has."""
    if why := cpu.why_unavailable():
        pytest.skip(why)
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    """Backends are chosen as if for the first time, in a test and after it."""
    caches = choice.choose_backend, choice._holder
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def hard_rows(columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows [16, columns] on which rounding goes wrong if it can: see the comments."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, columns, generator=generator)
    x[1] *= torch.exp2(torch.randint(-60, 60, (columns,), generator=generator).float())
    x[2] = torch.randint(-24, 25, (columns,), generator=generator) / 4  # ties of e2m1
    x[3] = torch.randint(-32, 33, (columns,), generator=generator) / 2  # ties of integers
    x[4] = 0.0
    x[5] = -0.0
    x[6] *= 2.0**-127  # float32 subnormals, and scales at e8m0's lower end
    x[7] *= 2.0**-145
    x[8] = x[8].sign() * torch.finfo(dtype).max
    x[9] *= 1e-6  # around the floor of integer scales
    x[10] = x[10].abs()  # one sign only: asymmetric zero points at an end
    x[11] = -x[11].abs()
    x[12, columns // 2] = torch.nan
    x[13, columns // 2] = torch.inf
    x[14, -1] = -torch.inf
    x[15] = torch.nextafter(torch.exp2(x[15].round()), torch.zeros(()))  # just below 2^k
    return x.to(dtype)


def all_codes_and_scales(fmt: Format) -> reference.Quantized:
    """256 rows of all codes, at least 64: scales are all bytes, or floats of all kinds.

    Zero points are all that there are.
    """
    codes = torch.arange(max(64, 1 << fmt.bits)) % (1 << fmt.bits)
    codes = codes.to(torch.uint8).repeat(256, 1)
    shape = (256, fmt.groups(codes.shape[1]))
    number = torch.arange(256, dtype=torch.int32)[:, None].expand(shape)
    if fmt.scale == "float16":
        scale = (number * 257).to(torch.uint16).view(torch.float16)
    elif fmt.scale == "float32":
        scale = (number * 0x01010101).view(torch.float32)
    else:
        scale = number.to(torch.uint8)
    zero_point = None if fmt.symmetric else (number % (1 << fmt.bits)).to(torch.uint8)
    divisor = torch.tensor([3.7]) if fmt.tensor_scale else None
    return reference.Quantized(codes, scale.contiguous(), zero_point, divisor)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal to the bit, zeros' signs included; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not actual.is_floating_point():
        differ = actual != expected
    else:
        same = (actual == expected) & (torch.signbit(actual) == torch.signbit(expected))
        differ = ~(same | (actual.isnan() & expected.isnan()))
    if differ.any():
        where = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differ.sum())} of {differ.numel()} differ, first at {where}: "
            f"{actual[where].item()!r}, expected {expected[where].item()!r}"
        )


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llama` (and its tokenizer) and `ids.npy`; tests only read it."""
    folder = tmp_path_factory.mktemp("shared")
    add_tokenizer(make_model(folder / "llama"))
    write_ids(folder / "ids.npy")
    return folder


@pytest.fixture
def run(shared: Path, tmp_path: Path) -> Callable[..., int]:
    """`run(*options, model=, out=)`: quantize with little text, into tmp_path/out."""

    def call(*options: object, model: object = shared / "llama", out: str = "out") -> int:
        text = () if "--dataset" in options else ("--dataset", shared / "ids.npy")
        words = [model, "--out", tmp_path / out, *text, *SMALL, *options]
        return quantize.main([str(word) for word in words])

    return call
