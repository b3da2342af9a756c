"""Load a packed checkpoint: `mixbits.load`.

What from_pretrained does of it, with every check, is in
`mixbits.checkpoint.transformers_quantizer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..errors import plain_errors
from ..model.layout import model_class
from ..runtime.linear import PackedLinear, allow_fp8_activations
from ..source.source import find_folder
from .transformers_quantizer import read_config


def load(
    folder: str | Path,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    int8_activations: bool = False,
    fp8_activations: bool = False,
    cuda_graphs: bool = True,
    revision: str | None = None,
) -> Any:
    """A transformers model of the source's own class with packed linears, ready for `generate`.

    folder            what `mixbits.quantize` has written, or the name of such a model on the
                      Hugging Face hub, which is fetched unless the hub's cache has it.
    backend           forces one of `mixbits.ops.backends()`; otherwise the best for the device.
    dtype             of activations and unquantized weights; the checkpoint's own by default.
    int8_activations  lets ...A16 schemes round activations to 8 bits on a CPU: faster prefill,
                      results that are no longer those of the float computation.
    fp8_activations   the like for MXFP4A16 on a GPU of compute capability 9.0: activations may
                      become 8-bit floats where many tokens are multiplied
                      (mixbits.formats.fp8_weights).
    cuda_graphs       on a GPU, `generate` uses a static cache and replays its one-token steps
                      (mixbits.runtime.graphs), where the model allows it.
    revision          branch, tag or commit of a name on the hub.

    Raises UsageError if it is neither a folder nor such a name, or is no mixbits checkpoint; if any
    tensor is missing, unexpected or of another shape or dtype, or values or schemes are not those
    that were written; or if fp8_activations could have no effect.
    """
    folder = find_folder(str(folder), revision=revision)
    read_config(folder)
    if backend is not None:
        ops.choose_backend(torch.device(device).type, backend)
    if fp8_activations:
        ops.require_fp8(device, backend)
    with plain_errors(f"cannot load the checkpoint in {folder}"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model: Any = model_class(config).from_pretrained(
            folder,
            dtype=dtype or "auto",
            # Not "cpu", which comes to the same, but makes save_pretrained warn.
            device_map=None if torch.device(device).type == "cpu" else device,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.backend, module.int8_activations = backend, int8_activations
    if fp8_activations:
        allow_fp8_activations(model)
    if not cuda_graphs:
        from ..runtime.graphs import drop_graphs

        drop_graphs(model)
    return model.requires_grad_(False)
