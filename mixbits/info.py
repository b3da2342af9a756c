"""`python -m mixbits.info`: versions, backends, instruction set, threads, and why each is off.

With `--matmul 14336x4096`: which way a product with a packed weight of that shape would take, for
every scheme and several numbers of tokens. With `--schemes`: the schemes and the menus of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

_SCHEMES = ("MXFP4", "MXFP8", "W2A16", "W4A16", "W8A16")
# Listed by --schemes, beside those of menus.
_USUAL = (
    *("MXFP4", "MXFP4A16", "MXFP4xMXFP8", "MXFP6", "MXFP6A16", "MXFP6xMXFP8", "MXFP8", "MXFP8A16"),
    *("MXINT8", "NVFP4", "NVFP4A16", "NVFP4xMXFP8", "FP8", "W2A16", "W3A16", "W4A16", "W5A16"),
    *("W6A16", "W8A16", "W4xFP8", "W4xINT8"),
)
_TOKENS = (1, 16, 64, 256, 1024)
_PACKAGES = ("torch", "triton", "transformers", "safetensors", "lm-eval", "auto-round", "datasets")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise argparse.ArgumentTypeError(f"must be NxK, such as 14336x4096: got {text!r}")
    return int(rows), int(columns)


def print_choices(device_type: str, rows: int, columns: int) -> None:
    """How x [M, columns] on that kind of device would meet a packed [rows, columns]."""
    from .formats.schemes import parse_scheme
    from .ops import explain_matmul

    print(f"products with a packed [{rows}, {columns}] on {device_type}")
    for name in _SCHEMES:
        fmt = parse_scheme(name).format
        for tokens in _TOKENS:
            way = explain_matmul(device_type, fmt, tokens, rows, columns)
            print(f"  {name:<6} M={tokens:<5} {way}")


def print_schemes(device_type: str) -> None:
    """What can be chosen from: stored bits, which backend runs it here, what can be exported."""
    from .backends.choice import holder
    from .export.targets import TARGETS
    from .formats.menus import MENUS
    from .formats.schemes import SCHEME_NAMES, parse_scheme

    known = dict.fromkeys((*_USUAL, *(name for menu in MENUS.values() for name in menu)))
    print(f"schemes        bits stored of [4096, 4096], what runs it on {device_type}, exports")
    for name in known:
        scheme = parse_scheme(name)
        bits = scheme.storage_bits(4096, 4096) / 4096**2
        inputs = [fmt for fmt in (scheme.activation,) if fmt is not None]
        runs = holder(device_type, None, inputs, [scheme.format])
        holding = [
            target.name
            for target in TARGETS.values()
            if target.obstacle_of(
                parse_scheme(name, act_scale_mode=target.act_scale_mode or "even"), 4096, 4096
            )
            is None
        ]
        print(f"  {name:<14} {bits:7.4f}  {runs:<9}  {', '.join(holding) or '-'}")
    print("menus")
    for menu, names in MENUS.items():
        print(f"  {menu:<13} {', '.join(names)}")
    print(f"any other by its name: {SCHEME_NAMES}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixbits.info")
    parser.add_argument("--matmul", type=_shape, metavar="NxK", help="explain products with it")
    parser.add_argument("--schemes", action="store_true", help="list what can be chosen from")
    args = parser.parse_args(argv)
    import torch

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if args.schemes:
        return print_schemes(device_type)
    from . import __version__, ops
    from .backends import cpu

    print(f"mixbits {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in _PACKAGES:
        print(f"  {package:<13} {_version(package)}")
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set: threads spin between kernels")
    print(f"threads   {torch.get_num_threads()} (OMP_WAIT_POLICY {waiting})")
    print(f"gpu       {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print("backends")
    for name, why in ops.backends().items():
        print(f"  {name:<13} {'on' if why is None else 'off: ' + why}")
    if cpu.why_unavailable() is None:
        print(f"cpu kernels use {cpu.isa()}; this machine runs {', '.join(cpu.available_isas())}")
    if args.matmul is not None:
        print_choices(device_type, *args.matmul)


if __name__ == "__main__":
    main()
