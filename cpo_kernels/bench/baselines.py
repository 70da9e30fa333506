"""The head by the baselines, each used as its project documents it; imported where it runs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_kernels.bench.head import Batch, TokenLogps, from_token_logps
from cpo_kernels.bench.implementation import BETA, Implementation, Outcome, Step, gpu_only
from cpo_kernels.bench.workload import Head

TRL_CHUNK = 8192  # vocabulary columns of a tile, as TRL's DPOTrainer runs it


def cut_cross_entropy(impl: str, **options: float | None) -> Callable[[Batch], Step]:
    """Cut Cross Entropy drops unlabelled rows itself; filter_eps None computes every tile.

    By default its kernels skip tiles without a probability of 2^-12 or more: nearly all tiles of these random logits.
    """

    @from_token_logps
    def make(b: Batch) -> TokenLogps:
        from cut_cross_entropy import linear_cross_entropy

        given = dict(softcap=b.workload.softcap, reduction="none", impl=impl, **options)
        return lambda x, weight: -linear_cross_entropy(x, weight, b.labels, **given)

    return make


def trl_head(labelled_only: bool) -> Callable[[Batch], Step]:
    """TRL's chunked head on every position, as its DPOTrainer runs it, or on the labelled rows."""

    @from_token_logps
    def make(b: Batch) -> TokenLogps:
        from trl.kernels import ChunkedLogProbFunction

        keep, labels, softcap = b.labels != -100, b.labels, b.workload.softcap

        def logps(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
            logp: Tensor = ChunkedLogProbFunction.apply(x, weight, None, targets, 1.0, TRL_CHUNK, softcap, 1.0, ())[0]
            return logp

        def every_position(x: Tensor, weight: Tensor) -> Tensor:
            return logps(x.flatten(0, 1), labels.clamp(min=0).flatten(), weight).view(labels.shape) * keep

        def labelled(x: Tensor, weight: Tensor) -> Tensor:
            return b.padded(logps(x[keep], labels[keep], weight))

        return labelled if labelled_only else every_position

    return make


@from_token_logps
def torch_chunked(b: Batch) -> TokenLogps:
    """F.linear_cross_entropy in chunks, on the labelled rows: given every position it would project all of them."""
    keep = b.labels != -100
    labels, options = b.labels[keep], torch.nn.LinearCrossEntropyOptions()

    def logps(x: Tensor, weight: Tensor) -> Tensor:
        nll = F.linear_cross_entropy(x[keep], weight, labels, reduction="none", options=options)
        return b.padded(-nll)

    return logps


def liger(b: Batch) -> Step:
    """Liger's fused linear DPO, compiled as by default. It takes pairs: a response in several pairs is projected once
    for each."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=b.ref_hidden is not None)
    rows = None if b.workload.responses == 2 else b.pairs.t().flatten()  # chosen of every pair, then rejected

    def paired(x: Tensor) -> Tensor:
        return x if rows is None else x[rows]

    def run() -> Outcome:
        ref = {}
        if b.ref_hidden is not None:
            ref = {"ref_input": paired(b.ref_hidden), "ref_weight": b.ref_weight.detach()}
        with torch.set_grad_enabled(b.workload.mode != "forward"):
            return b.outcome(loss_fn(b.weight, paired(b.hidden), paired(b.labels), **ref)[0])

    return Step(run)


def no_softcap(baseline: str) -> Callable[[Head, torch.device], str]:
    return lambda workload, device: f"{baseline} has no softcap" if workload.softcap else ""


def liger_refuses(workload: Head, device: torch.device) -> str:
    if workload.rows != "random" and workload.reference == "given":
        return "Liger's DPO does not take reference log-probs"
    return no_softcap("Liger's DPO")(workload, device)


def torch_without_it(workload: Head, device: torch.device) -> str:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    return no_softcap("F.linear_cross_entropy")(workload, device)


CCE = "cut-cross-entropy"
IMPLEMENTATIONS = {
    "torch_chunked": Implementation(
        "F.linear_cross_entropy, chunked, labelled rows", torch_chunked, refuses=torch_without_it
    ),
    "cce": Implementation("Cut Cross Entropy, torch_compile form", cut_cross_entropy("torch_compile"), CCE),
    "cce_exact": Implementation(
        "Cut Cross Entropy, its kernels, exact", cut_cross_entropy("cce", filter_eps=None), CCE, gpu_only
    ),
    "cce_filtered": Implementation("Cut Cross Entropy, its kernels, filtered", cut_cross_entropy("cce"), CCE, gpu_only),
    "liger": Implementation("Liger fused linear DPO, compiled", liger, "liger-kernel", liger_refuses),
    "trl": Implementation("TRL chunked head", trl_head(False), "trl"),
    "trl_unmasked": Implementation("TRL chunked head, labelled rows", trl_head(True), "trl"),
}
