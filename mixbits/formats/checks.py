"""What the arguments of operations must be: kernels are given addresses, and look at nothing.

Composites are looked at part against part: the rows of segments, their columns, and an order of
them. A tensor is more than its shape: `in_memory` sees to it that its memory is there, and holds
what the tensor says. Everything raises TypeError or ValueError that says what was required and
what was received.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arrange import check_order
from .pack import Operand, Packed, Part, order_dtype, packed_spec
from .schemes import MAX_SEGMENTS, Format

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (Tensor, nn.Parameter)


# --- one tensor --------------------------------------------------------------------------------


def check_tensor(name: str, x: Any) -> None:
    """That x is a tensor, and one whose numbers lie in rows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor: got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} must be a dense tensor: got {layout}")


def check_values(name: str, x: Tensor, dims: int | None = None) -> None:
    """That x is dense, of a dtype that is rounded and multiplied, and has `dims` dimensions."""
    check_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16 or float32: got {x.dtype}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions: got shape {tuple(x.shape)}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}: got {tuple(x.shape)}")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as the other tensors: got {x.device}")


def check_size(name: str, value: Any) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number from 0 on: got {value!r}")


def is_wrapped(x: Tensor) -> bool:
    """Whether x stands for other tensors, inside a transformation of torch.func."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def in_memory(name: str, x: Tensor) -> Tensor:
    """x, as numbers that lie one behind the other from its address on, wherever that is.

    Strides, a negative bit, zeros that are a promise, a class of its own: they are carried out, in
    a copy. Raises ValueError where its memory ends before it does (a storage can be made smaller,
    or freed), TypeError where it has none. A tensor on the meta device is left alone.
    """
    if is_in_memory(x):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        if x._is_zerotensor():
            x = x.clone()
        _check_memory(name, x)
        return x.detach().as_subclass(Tensor).resolve_neg().contiguous()


def rows_in_memory(name: str, x: Tensor) -> Tensor:
    """x [N, K] likewise, but where its rows already lie in memory, apart, it stays as it is."""
    is_plain = type(x) in _PLAIN and not x.is_neg() and not x._is_zerotensor()
    if not is_plain or x.stride(1) != 1:
        return in_memory(name, x)
    _check_memory(name, x)
    return x


def is_in_memory(x: Tensor) -> bool:
    """Whether `in_memory` has nothing to do, and nothing to say."""
    if type(x) not in _PLAIN or not x.is_contiguous() or x.is_neg():
        return False
    try:
        end = x.storage_offset() * x.element_size() + x.nbytes
        return x.data_ptr() != 0 and end <= x.untyped_storage().nbytes()
    except RuntimeError:  # of tensors that stand for others
        return False


def keep_size(tensors: Iterable[Tensor | None]) -> bool:
    """Have torch refuse from now on to resize the memory of tensors on the CPU.

    It does so for all that numpy has seen. Kernels are then given addresses without another look.
    Returns whether that could be done: not inside a transformation of torch.func.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for x in tensors:
        if x is not None and x.is_cpu:
            x.detach().view(torch.uint8).numpy()
    return True


def _check_memory(name: str, x: Tensor) -> None:
    if x.numel() == 0:
        return
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    end = (x.storage_offset() + last + 1) * x.element_size()
    size: int | torch.SymInt
    try:
        size, is_real = x.untyped_storage().nbytes(), x.is_meta or x.data_ptr() != 0
    except (NotImplementedError, RuntimeError):  # of kinds of tensors without storage
        size, is_real = end, False
    if end > size:
        raise ValueError(f"{name} needs {end} bytes of memory: got a storage of {size} bytes")
    if not is_real:
        raise TypeError(f"{name} must be a tensor with memory of its own: got none")


# --- packed weights ------------------------------------------------------------------------------


def check_format(name: str, fmt: Any) -> None:
    if not isinstance(fmt, Format):
        raise TypeError(f"{name} must be a Format: got {fmt!r:.80}")


def check_formats(formats: Any) -> list[Format]:
    """As a list."""
    if isinstance(formats, Format) or not isinstance(formats, Sequence):
        raise TypeError(f"formats must be a sequence of Formats: got {formats!r:.80}")
    for fmt in formats:
        check_format("each of formats", fmt)
    return list(formats)


def device_of(packed: Packed) -> torch.device:
    """That of a packed weight's codes, if it is one."""
    if not isinstance(packed, Packed):
        raise TypeError(f"a packed weight must be a Packed: got {type(packed).__name__}")
    check_tensor("weight_packed", packed.weight_packed)
    return packed.weight_packed.device


def check_packed(packed: Packed, fmt: Format, in_features: int, device: torch.device) -> None:
    """That the tensors are those of a weight [N, in_features] in `fmt`, on `device`."""
    check_format("format", fmt)
    check_size("in_features", in_features)
    device_of(packed)
    if packed.weight_packed.dim() != 2:
        shape = tuple(packed.weight_packed.shape)
        raise ValueError(f"weight_packed must have 2 dimensions: got shape {shape}")
    spec = packed_spec(fmt, packed.weight_packed.shape[0], in_features)
    for name, value in zip(Packed._fields, packed, strict=True):
        if (value is None) != (name not in spec):
            state = "missing" if value is None else "not part of the format"
            raise ValueError(f"{name} is {state}: {fmt}")
        if value is None:
            continue
        dtype, shape = spec[name]
        check_tensor(name, value)
        check_device(name, value, device)
        check_shape(f"{name} of in_features={in_features}, {fmt.element}", value, shape)
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}: got {value.dtype}")


def packed_in_memory(packed: Packed) -> Packed:
    """`in_memory` of all tensors."""
    return packed.map(in_memory)


def _checked_part(part: Any, columns: int, device: torch.device) -> Part:
    """A part of an operand, its tensors in memory as kernels want them."""
    if not isinstance(part, Part):
        raise TypeError(f"parts of an Operand must be Parts: got {type(part).__name__}")
    check_packed(part.packed, part.format, columns, device)
    if part.activation is not None:
        check_format("activation", part.activation)
        if part.activation.tensor_scale == "tensor":
            raise ValueError(f"rows of x share no scale of the tensor: got {part.activation}")
    if torch.compiler.is_compiling():  # then operators of torch.library look at the tensors
        return part
    return part._replace(packed=packed_in_memory(part.packed))


def _check_columns(operand: Operand, in_features: int) -> None:
    """That the parts share `in_features` columns; a weight without columns is one part."""
    parts, columns, _, rotated = operand
    for name, value in (("parts", parts), ("columns", columns)):
        if not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a sequence: got {value!r:.80}")
    least = 0 if len(columns) == 1 else 1
    whole = all(isinstance(n, int | torch.SymInt) and n >= least for n in columns)
    right = 0 < len(parts) <= MAX_SEGMENTS and len(parts) == len(columns)
    if not (whole and right and sum(columns) == in_features):
        raise ValueError(
            f"1 to {MAX_SEGMENTS} parts, of at least a column each, must share {in_features} "
            f"columns: got {tuple(columns)} for {len(parts)} parts"
        )
    if not isinstance(rotated, bool):
        raise TypeError(f"rotated must be True or False: got {rotated!r:.80}")


def checked_operand(operand: Any, in_features: int, device: torch.device) -> Operand:
    """What x [M, in_features] on `device` can be multiplied with, as kernels want it.

    Its parts must also fit each other.
    """
    if not isinstance(operand, Operand):
        raise TypeError(f"operands must be Operands: got {type(operand).__name__}")
    _check_columns(operand, in_features)
    parts, columns, order, rotated = operand
    pairs = zip(parts, columns, strict=True)
    checked = tuple(_checked_part(part, width, device) for part, width in pairs)
    rows = [part.out_features for part in checked]
    if len(set(rows)) > 1:
        raise ValueError(f"parts of an Operand must have the same number of rows: got {rows}")
    return Operand(checked, tuple(columns), _checked_order(order, in_features, device), rotated)


def _checked_order(order: Any, in_features: int, device: torch.device) -> Tensor | None:
    if order is None:
        return None
    check_tensor("order", order)
    check_device("order", order, device)
    if torch.compiler.is_compiling():  # torch looks at an index itself
        return order
    order = in_memory("order", order)
    check_order(order, in_features)
    return order.to(order_dtype(in_features))
