"""Triton kernels, imported as `mixbits.kernels`: one file per operation, kernel then launcher.

A launcher takes tensors that are checked, contiguous and on one device, chooses tile sizes in
plain Python, and returns new tensors. `numerics` holds the arithmetic that the files share, `tiles`
which part of a tensor a program owns.
"""

import triton

if not hasattr(triton, "constexpr_function"):
    raise ImportError(f"Triton {triton.__version__} is too old: it has no constexpr_function")

# With TRITON_INTERPRET=1 in the environment before this import, kernels run in numpy on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)
