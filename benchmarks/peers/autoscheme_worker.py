"""The process in which auto-round's own AutoScheme runs: `benchmarks.peers.autoscheme` starts it.

Reads a job (JSON) from standard input and writes one JSON object per result to standard output;
what the libraries print goes to standard error. The environment must give it a private HOME and
AR_AUTO_SCHEME_CACHE: scores are cached there between the jobs of one worker, and only there.

AutoScheme takes the name of a dataset, not token ids. So the two functions that make its data
loader, `get_dataloader` of auto_round.calib_dataset and the copy of the name that
auto_round.auto_scheme.delta_loss holds, are replaced by one that hands out the job's ids, in
order, in batches of the size that the caller asks for. Nothing else of the package is touched;
its scoring function is only timed.

The result is judged by our evaluator: the rounded weights are taken out of the model that
auto-round returns, put into the original model, and inputs are rounded as the scheme says (with
`mixbits.ops.fake_quantize`, which equals auto-round's functions; tests/export/test_auto_round.py).
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.autoscheme import Job, Peer
from benchmarks.tools.meter import Meter
from mixbits.command import quiet
from mixbits.formats.schemes import BF16, Recipe, Scheme
from mixbits.measuring.evaluate import compare, run_tasks
from mixbits.model.layout import LinearInfo, find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.planning.plan import average_bits
from mixbits.runtime.fake import FakeLinear
from mixbits.runtime.swap import swap_linears
from mixbits.source.source import open_source


def give_ids(ids: Tensor) -> None:
    """Let auto-round calibrate with ids [sequences, length], whatever dataset it is told."""
    from auto_round import calib_dataset
    from auto_round.auto_scheme import delta_loss

    def loader(
        tokenizer: Any,
        seqlen: int,
        dataset_name: str = "",
        seed: int = 0,
        bs: int = 8,
        nsamples: int = 512,
    ) -> list[dict[str, Tensor]]:
        if (nsamples, seqlen) != tuple(ids.shape):
            raise ValueError(f"asked for {nsamples} x {seqlen} tokens: the job has {ids.shape}")
        return [
            {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
            for batch in ids.split(bs)
        ]

    calib_dataset.get_dataloader = delta_loss.get_dataloader = loader


def watch_scoring(meter: Meter) -> None:
    """Let `meter` run while AutoScheme scores and solves for the first time.

    Afterwards it reads its scores from its cache: that is not what measuring costs.
    """
    from auto_round.auto_scheme import AUTO_SCHEME_METHODS

    original = AUTO_SCHEME_METHODS["default"]

    def run(*args: Any, **kwargs: Any) -> Any:
        if meter.seconds:
            return original(*args, **kwargs)
        with meter:
            return original(*args, **kwargs)

    AUTO_SCHEME_METHODS["default"] = run


def their_option(scheme: Scheme) -> Any:
    """AutoScheme's preset for one of our schemes, its scale modes set to ours."""
    from auto_round.schemes import preset_name_to_scheme

    def data_type(mode: str) -> str:
        return {"floor": "mx_fp", "rceil": "mx_fp_rceil"}[mode]

    option = preset_name_to_scheme(scheme.name)
    if scheme.weight is not None and scheme.weight.is_float:
        option = replace(option, data_type=data_type(scheme.weight.scale_mode))
    if scheme.activation is not None:
        option = replace(option, act_data_type=data_type(scheme.activation.scale_mode))
    return option


def our_schemes(
    layer_config: dict[str, dict[str, Any]], schemes: list[Scheme]
) -> dict[str, Scheme]:
    """The layers that auto-round quantized, name -> which of `schemes`."""
    by_option = {
        tuple(asdict(their_option(s)).get(k) for k in ("bits", "group_size", "data_type")): s
        for s in schemes
    }
    chosen = {}
    for name, config in layer_config.items():
        if config["bits"] < 16:
            chosen[name] = by_option[config["bits"], config["group_size"], config["data_type"]]
    return chosen


def compressor(job: Job, peer: Peer) -> Any:
    """auto-round's object for one budget and one way of rounding; scores come with `post_init`."""
    from auto_round import AutoRound
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme

    count, length = np.load(job.calibration, mmap_mode="r").shape
    scheme = AutoScheme(
        avg_bits=peer.bits,
        options=[their_option(s) for s in job.parsed_schemes()],
        ignore_scale_zp_bits=job.ignore_scale_bits,
        nsamples=count,
        seqlen=length,
        batch_size=job.batch_size,
    )
    rounding: dict[str, Any] = {"iters": job.iters if peer.rounding == "tuned" else 0}
    if peer.rounding != "tuned":
        rounding["disable_opt_rtn"] = peer.rounding == "plain"
    sizes = {"nsamples": count, "seqlen": length, "batch_size": job.batch_size}
    # torch.compile costs more than it gives on a small model, and changes no scoring.
    # With integers and plain rounding, it would leave the model unopened, and AutoScheme unused.
    where = {"device_map": job.device, "enable_torch_compile": False, "disable_model_free": True}
    return AutoRound(job.model, scheme=scheme, **where, **sizes, **rounding)


def rounded_weights(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The weights [N, K] that auto-round left in its model, out of its wrappers."""
    weights = {}
    for name in names:
        module = model.get_submodule(name)
        weights[name] = getattr(module, "orig_layer", module).weight.detach()
    return weights


def fake_model(job: Job, weights: dict[str, Tensor], schemes: dict[str, Scheme]) -> nn.Module:
    """The original model with `weights`, which are rounded already, and rounded inputs."""

    def make(name: str, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        inputs_only = Recipe.plain(replace(schemes[name], weight=None))
        return FakeLinear(weights[name].to(weight), inputs_only, bias)

    model = open_source(job.model).load()
    swap_linears(model, list(schemes), make)
    return model


def plain_difference(job: Job, weights: dict[str, Tensor], schemes: dict[str, Scheme]) -> float:
    """The share of weights that differ from our plain rounding of the same plan."""
    from mixbits import ops

    model, differ, total = open_source(job.model).load(), 0, 0
    for name, theirs in weights.items():
        ours = ops.fake_quantize(model.get_submodule(name).weight, schemes[name].weight)
        differ += int((ours != theirs.to(ours)).sum())
        total += ours.numel()
    return differ / total


def judge(job: Job, fake: nn.Module) -> dict[str, Any]:
    """Held-out figures, and tasks."""
    source = open_source(job.model)
    held_out = torch.from_numpy(np.load(job.held_out))
    models = (StreamedModel(m, device=job.device) for m in (source.load(), fake))
    figures: dict[str, Any] = compare(*models, held_out, job.batch_size)
    if job.tasks:
        options = job.limit, job.add_bos_token, job.include_path, job.batch_size
        result = run_tasks(fake.to(job.device), source.tokenizer(), job.tasks, *options)
        figures |= {name: json.dumps(result[name]) for name in ("tasks", "documents")}
    return figures


def run(job: Job, peer: Peer, scoring: Meter, linears: list[LinearInfo]) -> dict[str, Any]:
    theirs, rounding = compressor(job, peer), Meter()
    theirs.post_init()
    result: dict[str, Any] = scoring.describe("measure")
    if peer.rounding == "none":
        plan = our_schemes(theirs.layer_config, job.parsed_schemes())
    else:
        with rounding:
            model, layer_config = theirs.quantize()
        result.update(rounding.describe("rounding"))
        plan = our_schemes(layer_config, job.parsed_schemes())
        weights = rounded_weights(model, list(plan))
        if peer.rounding == "plain":
            result["differs_from_ours"] = plain_difference(job, weights, plan)
        result.update(judge(job, fake_model(job, weights, plan)))
    result["plan"] = {info.name: plan.get(info.name, BF16).name for info in linears}
    recipes = {name: Recipe.plain(scheme) for name, scheme in plan.items()}
    result["bits"] = average_bits(linears, recipes)
    result["bits_without_scales"] = average_bits(linears, recipes, True)
    return result


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.load(sys.stdin))
    quiet()
    give_ids(torch.from_numpy(np.load(job.calibration)))
    scoring = Meter()
    watch_scoring(scoring)
    linears = find_linears(open_source(job.model).load())
    for peer in job.parsed_peers():
        print(json.dumps(run(job, peer, scoring, linears)), file=results, flush=True)


if __name__ == "__main__":
    main()
