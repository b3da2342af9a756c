"""`python -m mixbits.info`: versions, backends, instruction set, threads, and why each is off."""

from __future__ import annotations

import importlib.metadata
import os
import platform

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "lm-eval", "auto-round", "datasets")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    import torch

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


if __name__ == "__main__":
    main()
