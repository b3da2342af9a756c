"""Load a packed checkpoint: `mixbits.load`.

What from_pretrained does of it, with every check, is in `mixbits.transformers_quantizer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import ops
from .formats import UsageError, first_line
from .linear import PackedLinear
from .transformers_quantizer import read_config


def _from_pretrained(folder: Path, device: torch.device | str, **options: Any) -> Any:
    """transformers' own loading, with errors of ours."""
    from transformers import AutoModelForCausalLM

    try:
        # None and "cpu" come to the same; the former asks for no device map that saving warns of.
        device_map = None if torch.device(device).type == "cpu" else device
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map=device_map, use_safetensors=True, **options
        )
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot load the checkpoint in {folder}: {first_line(error)}") from None


def load(
    folder: str | Path,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    int8_activations: bool = False,
    cuda_graphs: bool = True,
) -> Any:
    """A transformers model with packed linears, ready for `generate`.

    backend           forces one of `mixbits.ops.backends()`; otherwise the best for the device.
    dtype             of activations and unquantized weights; the checkpoint's own by default.
    int8_activations  lets ...A16 schemes round activations to 8 bits on a CPU: faster prefill,
                      results that are no longer those of the float computation.
    cuda_graphs       on a GPU, `generate` uses a static cache and replays its one-token steps
                      (mixbits.graphs), where the model allows it.

    Raises UsageError if the folder is no mixbits checkpoint, any tensor is missing, unexpected or
    of another shape or dtype, or values or schemes are not those that were written.
    """
    folder = Path(folder)
    read_config(folder)
    if backend is not None:
        ops.choose_backend(torch.device(device).type, backend)
    model = _from_pretrained(
        folder, device, dtype=dtype or "auto", trust_remote_code=trust_remote_code
    )
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.backend, module.int8_activations = backend, int8_activations
    if not cuda_graphs:
        from .graphs import drop_graphs

        drop_graphs(model)
    return model.requires_grad_(False)
