"""ggml's own quantizer and matrix multiplication, of the libggml inside llama-cpp-python.

Weights are quantized by ggml, activations are float32, and one multiplication is one graph of a
single `ggml_mul_mat` node on the CPU backend: what llama.cpp computes for a linear. As in
llama.cpp, weights go to the first "extra" buffer type that takes them (CPU_REPACK interleaves
eight rows when the weight is set), and to the plain buffer where none does. ggml rounds the
activations to 8 bits on the way, in blocks of 32 (Q8_0) or, beside weights in blocks of 256, of 256
(Q8_K); with F16 and BF16 weights it rounds them to those (`rounded_inputs`).

ggml aborts the process on a wrong argument, so shapes are checked here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {  # those that weights can have -> enum ggml_type
    **{"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11},
    **{"Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19},
    **{"IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30, "MXFP4": 39},
}
_NUMBERS = {"F32": 0, "Q8_K": 15, **TYPES}
# Types in blocks of 256 -> what llama.cpp gives a weight whose rows are not made of such.
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **{"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
_PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}  # without blocks
_GRAPH_SIZE = 8  # nodes and leafs that a graph has room for: three are used


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("block_size", c_int64),
        ("block_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


@_LogCallback
def _print_warnings(level: int, text: bytes, _: Any) -> None:
    """Every repacked weight would print a line otherwise."""
    if level in (3, 4):  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR
        print(text.decode(errors="replace"), end="", file=sys.stderr)


# Every pointer to an object of ggml is c_void_p. Name -> (result, arguments).
_BASE = {
    "ggml_log_set": (None, [_LogCallback, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_type_traits": (POINTER(_TypeTraits), [c_int]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int]),
    **{  # (from, to, count): Q8_K is a type of inputs only, which traits say nothing of
        f"{verb}_row_{name}": (None, [c_void_p, c_void_p, c_int64])
        for verb, name in (
            *(("quantize", "q8_0_ref"), ("dequantize", "q8_0")),
            *(("quantize", "q8_K_ref"), ("dequantize", "q8_K")),
        )
    },
    "ggml_threadpool_params_init": (None, [POINTER(_ThreadpoolParams), c_int]),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}
_CPU = {
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_new": (c_void_p, [POINTER(_ThreadpoolParams)]),
    "ggml_threadpool_free": (None, [c_void_p]),
}


class _Library:
    """The functions of `_BASE` and `_CPU` as attributes."""

    def __init__(self, folder: Path) -> None:
        for file, functions in (("libggml-base.so", _BASE), ("libggml-cpu.so", _CPU)):
            library = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is not among the functions that are bound")


@functools.cache
def library() -> Any:
    """libggml, bound; ImportError, OSError or AttributeError where there is none that fits."""
    # The package is found but not imported, which would load all of llama.cpp.
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama-cpp-python is not installed")
    lib = _Library(Path(spec.origin).parent / "lib")
    lib.ggml_log_set(_print_warnings, None)
    return lib


# --- weights -----------------------------------------------------------------------------------


def _traits(type_name: str, columns: int) -> Any:
    """ggml's description of a type, once it is known that rows of `columns` fit its blocks."""
    traits = library().ggml_get_type_traits(_NUMBERS[type_name]).contents
    if traits.type_name.decode().upper() != type_name:
        raise RuntimeError(f"this libggml numbers its types differently: {traits.type_name!r}")
    if columns % traits.block_size:
        raise ValueError(f"K must be a multiple of {traits.block_size} for {type_name}: {columns}")
    return traits


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of one row of `columns` weights."""
    traits = _traits(type_name, columns)
    return columns // traits.block_size * traits.type_size


def fitting(type_name: str, columns: int) -> str:
    """The type that llama.cpp gives a weight with rows of `columns` for which `type_name` is asked.

    Where 256 does not divide a row, another type takes the place of one in such blocks; F16, where
    32 does not either.
    """
    if type_name in _PLAIN or columns % (256 if type_name in FALLBACKS else 32) == 0:
        return type_name
    return FALLBACKS.get(type_name, type_name) if columns % 32 == 0 else "F16"


def quantize(type_name: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """float32 [N, K] -> uint8 [N, row_bytes], by ggml's quantizer (one thread; some are slow).

    `importance` [K] weighs the errors of columns, as llama.cpp's imatrix does; types that ignore it
    are Q8_0 and MXFP4. ValueError for a type that wants one and has none.
    """
    rows, columns = weight.shape
    number, source = TYPES[type_name], weight.float().contiguous()
    out = torch.empty((rows, row_bytes(type_name, columns)), dtype=torch.uint8)
    weighed = None if importance is None else importance.float().contiguous()
    if weighed is not None and weighed.shape != (columns,):
        raise ValueError(f"importance must be [{columns}]: got {list(weighed.shape)}")
    if weighed is None and library().ggml_quantize_requires_imatrix(number):
        raise ValueError(f"{type_name} cannot be quantized without importance")
    library().ggml_quantize_chunk(
        number,
        source.data_ptr(),
        out.data_ptr(),
        0,
        rows,
        columns,
        None if weighed is None else weighed.data_ptr(),
    )
    return out


def dequantize(type_name: str, packed: Tensor, columns: int) -> Tensor:
    """uint8 [N, row_bytes] -> float32 [N, columns]: the values the bytes stand for."""
    traits = _traits(type_name, columns)
    source, out = packed.contiguous(), torch.empty((packed.shape[0], columns))
    traits.to_float(source.data_ptr(), out.data_ptr(), out.numel())
    return out


def rounded_inputs(type_name: str, x: Tensor) -> Tensor:
    """float32 [..., K]: what ggml's CPU kernels take x for, beside weights of this type."""
    if type_name in _PLAIN:
        return x.to(_PLAIN[type_name]).float()
    # Q4_1 and Q5_1 go with Q8_1, which has the values of Q8_0 and their sums besides.
    name = "q8_K" if type_name in FALLBACKS else "q8_0"
    source, out = x.float().contiguous(), torch.empty(x.shape)
    size = row_bytes(name.upper(), x.shape[-1]) * (x.numel() // x.shape[-1])
    packed = torch.empty(size, dtype=torch.uint8)
    round_row = getattr(library(), f"quantize_row_{name}_ref")
    round_row(source.data_ptr(), packed.data_ptr(), x.numel())
    getattr(library(), f"dequantize_row_{name}")(packed.data_ptr(), out.data_ptr(), x.numel())
    return out


# --- multiplication ----------------------------------------------------------------------------


class MatMul:
    """y = x W^T for one x and several weights W of one type and shape.

    `packed` are uint8 [N, row_bytes] as from `quantize`, x is float32 [M, K]. Calling it with i
    multiplies by the i-th weight and returns y, float32 [M, N]; every call writes the same y.
    `buffer` names the buffer type that holds the weights ("CPU" is the plain one). With
    `repack=False` they stay as they are.
    """

    def __init__(
        self, type_name: str, packed: Sequence[Tensor], x: Tensor, threads: int, repack: bool = True
    ) -> None:
        rows, columns = packed[0].shape[0], x.shape[1]
        shape = (rows, row_bytes(type_name, columns))
        for weight in packed:
            if weight.shape != shape or weight.dtype != torch.uint8:
                raise ValueError(
                    f"packed must be uint8 {shape}: got {weight.dtype} {tuple(weight.shape)}"
                )
        self._lib = library()
        self._owned: list[tuple[Any, int]] = []
        weakref.finalize(self, _release, self._owned)
        self._x = x.float().contiguous()
        self._y = torch.empty((x.shape[0], rows))
        self._backend = self._make_backend(threads)
        tensors = self._place_weights(type_name, (rows, columns), len(packed), repack)
        for tensor, weight in zip(tensors, packed, strict=True):
            data = weight.contiguous()
            self._lib.ggml_backend_tensor_set(tensor, data.data_ptr(), 0, data.numel())
        self._graphs = self._build_graphs(tensors)

    def __call__(self, i: int) -> Tensor:
        status = self._lib.ggml_backend_graph_compute(self._backend, self._graphs[i])
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._y

    def _own(self, pointer: int | None, free: Any) -> int:
        """Note that `free` ends the life of what was just made at `pointer`."""
        if not pointer:
            raise MemoryError("ggml could not allocate")
        self._owned.append((free, pointer))
        return pointer

    def _context(self, tensors: int, graphs: int = 0) -> int:
        """A place for descriptions of tensors and graphs, but not for the tensors' data."""
        lib = self._lib
        size = tensors * lib.ggml_tensor_overhead()
        size += graphs * lib.ggml_graph_overhead_custom(_GRAPH_SIZE, False)
        return self._own(lib.ggml_init(_InitParams(size + 1024, None, True)), lib.ggml_free)

    def _make_backend(self, threads: int) -> int:
        """A CPU backend whose threads live as long as it does, as those of llama.cpp do."""
        lib, params = self._lib, _ThreadpoolParams()
        lib.ggml_threadpool_params_init(params, threads)
        pool = self._own(lib.ggml_threadpool_new(params), lib.ggml_threadpool_free)
        backend = self._own(lib.ggml_backend_cpu_init(), lib.ggml_backend_free)
        lib.ggml_backend_cpu_set_n_threads(backend, threads)
        lib.ggml_backend_cpu_set_threadpool(backend, pool)
        return backend

    def _buffer_types(self, repack: bool) -> list[int]:
        """Buffer types in llama.cpp's order of preference; the last one is the plain one."""
        lib = self._lib
        plain = [lib.ggml_backend_get_default_buffer_type(self._backend)]
        device = lib.ggml_backend_get_device(self._backend)
        registry = lib.ggml_backend_dev_backend_reg(device)
        name = b"ggml_backend_dev_get_extra_bufts"
        address = lib.ggml_backend_reg_get_proc_address(registry, name)
        if not repack or not address:
            return plain
        extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        found: list[int] = []
        while extra and (pointer := extra[len(found)]):  # the list ends with a null
            found.append(pointer)
        return found + plain

    def _place_weights(
        self, type_name: str, shape: tuple[int, int], count: int, repack: bool
    ) -> list[int]:
        """`count` weight tensors in the first buffer type that can multiply them."""
        lib = self._lib
        device = lib.ggml_backend_get_device(self._backend)
        for buffer_type in self._buffer_types(repack):
            kept = len(self._owned)
            context = self._context(count + 2)
            tensors = [
                lib.ggml_new_tensor_2d(context, TYPES[type_name], shape[1], shape[0])
                for _ in range(count)
            ]
            buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            self._own(buffer, lib.ggml_backend_buffer_free)
            # Whether it can is known only from a node whose weight has a buffer.
            x = lib.ggml_new_tensor_2d(context, _NUMBERS["F32"], shape[1], self._x.shape[0])
            if lib.ggml_backend_dev_supports_op(device, lib.ggml_mul_mat(context, tensors[0], x)):
                self.buffer = lib.ggml_backend_buft_name(buffer_type).decode()
                return tensors
            _release(self._owned, kept)
        raise RuntimeError(f"ggml's CPU backend cannot multiply {type_name} weights")

    def _build_graphs(self, weights: list[int]) -> list[int]:
        """One graph of one node per weight; x and y lie in torch's memory."""
        lib, graphs = self._lib, []
        context = self._context(len(weights) + 1, len(weights))
        x = lib.ggml_new_tensor_2d(context, _NUMBERS["F32"], self._x.shape[1], self._x.shape[0])
        self._alias(x, self._x)
        for weight in weights:
            node = lib.ggml_mul_mat(context, weight, x)
            self._alias(node, self._y)
            graph = lib.ggml_new_graph_custom(context, _GRAPH_SIZE, False)
            lib.ggml_build_forward_expand(graph, node)
            graphs.append(graph)
        return graphs

    def _alias(self, tensor: int, memory: Tensor) -> None:
        lib, address = self._lib, memory.data_ptr()
        buffer = lib.ggml_backend_cpu_buffer_from_ptr(address, memory.nbytes)
        self._own(buffer, lib.ggml_backend_buffer_free)
        lib.ggml_backend_tensor_alloc(buffer, tensor, address)


def _release(owned: list[tuple[Any, int]], keep: int = 0) -> None:
    """Free what was made last first, down to the first `keep`."""
    while len(owned) > keep:
        free, pointer = owned.pop()
        free(pointer)
