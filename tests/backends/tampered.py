"""What can be done to a tensor, and where it is no reason to refuse it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def flat(result: Any) -> list[Any]:
    parts = list(result) if isinstance(result, list | tuple) else [result]
    return [None if p is None else p.detach().as_subclass(Tensor) for p in parts]


class Subclass(Tensor):
    """A class of somebody's own, whose operations give its own again."""


class Wrapper(Tensor):
    """A tensor that has no memory."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Wrapper:
        out: Any = Tensor._make_wrapper_subclass(
            cls, x.shape, dtype=x.dtype, device=x.device, strides=x.stride()
        )
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def at_an_offset(x: Tensor) -> Tensor:
    memory = torch.zeros(x.numel() + 7, dtype=x.dtype)
    memory[5 : 5 + x.numel()] = x.flatten()
    return memory[5 : 5 + x.numel()].view(x.shape)


def misaligned(x: Tensor) -> Tensor:
    data = bytearray(b"\0" + x.contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(data, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)


def every_second(x: Tensor) -> Tensor:
    wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def negative(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def freed_beyond_an_offset(x: Tensor) -> Tensor:
    x = at_an_offset(x)
    x.untyped_storage().resize_(0)
    return x


def shrunk(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - x.element_size())
    return x


def shrunk_and_strided(x: Tensor) -> Tensor:
    x = every_second(x)
    x.untyped_storage().resize_(x.nbytes)
    return x


def fake(x: Tensor) -> Tensor:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


SAME = {
    "strided": lambda x: x.T.contiguous().T,
    "every second": every_second,
    "at an offset": at_an_offset,
    "misaligned": misaligned,
    "negative bit": negative,
    "negative bit, strided": lambda x: negative(x.T.contiguous()).T,
    "of inference mode": inference,
    "a subclass": lambda x: x.clone().as_subclass(Subclass),
    "a parameter": lambda x: nn.Parameter(x.clone(), requires_grad=False),
}
TAMPERED = {
    "freed": freed,
    "freed, at an offset": freed_beyond_an_offset,
    "shrunk": shrunk,
    "shrunk, strided": shrunk_and_strided,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "fake": fake,
    "a wrapper": Wrapper,
    "float64": lambda x: x.double(),
    "int32": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.quint8),
    "one number less": lambda x: x[..., :-1],
    "one row less": lambda x: x[:-1],
    "a row more": lambda x: torch.cat([x, x[:1]]),
    "a scalar": lambda x: x.flatten()[0],
    "flat": lambda x: x[None].flatten() if x.dim() > 1 else x[None],
    "five dimensions": lambda x: x[None, None, None, None],
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[..., :0],
    "a list": lambda x: x.tolist(),
    "nothing": lambda x: None,
}
# Ordinary arguments of some operations, and no reason to refuse them.
ALLOWED = {
    ("fake_quantize", "x"): {"one number less", "flat", "five dimensions", "no rows", "no columns"},
    ("quantize_pack", "weight"): {"one number less", "no rows", "no columns"},
    ("square_sums", "x"): {"one number less", "no rows", "no columns"},
    ("fisher_statistics", "row"): {"float64", "float8"},
    ("fisher_statistics", "column"): {"float64", "float8"},
}
ALLOWED["torch.fake_quantize", "x"] = ALLOWED["fake_quantize", "x"]
for one in ("fake_quantize", "torch.fake_quantize", "quantize_pack", "square_sums"):
    key = one, "weight" if one == "quantize_pack" else "x"
    ALLOWED[key] = ALLOWED[key] | {"one row less", "a row more"}
for one, key in (("packed_matmul", "x"), ("torch.packed_matmul", "x"), ("mix", "x")):
    ALLOWED[one, key] = {"one row less", "a row more", "no rows"}
    if one != "mix":  # a column less takes as many bytes
        ALLOWED[one, key].add("one number less")
ALLOWED["mix", "order"] = {"int32", "nothing"}
ALLOWED["packed_matmul_backward", "gradient"] = {"one row less", "a row more", "no rows"}
# On the meta device results are as those without numbers, where all arguments are.
for one in ("fake_quantize", "torch.fake_quantize", "square_sums"):
    ALLOWED[one, "x"] = ALLOWED[one, "x"] | {"meta"}
ALLOWED["torch.fake_quantize", "x"] |= {"fake"}
ALLOWED["quantize_pack", "weight"] |= {"meta"}
ALLOWED["compensate_group", "group"] = {"one row less", "a row more", "no rows"}
