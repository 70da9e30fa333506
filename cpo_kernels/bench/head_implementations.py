"""The head by this library and by naive PyTorch, and the floor: the bare products on the labelled rows, without a
loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cpo_kernels as cpo
from cpo_kernels.backends import dispatch
from cpo_kernels.bench.head import Batch, TokenLogps, from_token_logps, gathered
from cpo_kernels.bench.implementation import BETA, Implementation, Outcome, Step, gpu_only
from cpo_kernels.bench.workload import Head

FILTERED: dict[str, Any] = {"filter_eps": "auto", "filter_head_grad": True}
FLOOR_ROWS = 4096  # rows of a chunk of `products`: there the products of these heads run at their full rate


# ------------------------------------------------------------------------------------------------------------ the floor


def products(b: Batch, large: Callable[[Tensor], Tensor] = lambda result: result) -> Step:
    """Z = X W^T, dX = G W and dW = G^T X on the labelled rows, through one buffer of at most FLOOR_ROWS rows.

    dW of several chunks adds up in float32 where a product can (GPU), else in the dtype of the weight. large: applied
    to what is written for the first time.
    """
    x, weight = b.hidden.detach()[b.labels != -100], b.weight.detach()
    ref = None if b.ref_hidden is None else (b.ref_hidden[b.labels != -100], b.ref_weight.detach())
    several = x.shape[0] > FLOOR_ROWS
    wide = several and b.device.type == "cuda" and b.dtype != torch.float32
    mode = b.workload.mode

    def run() -> Outcome:
        z = large(x.new_empty(min(x.shape[0], FLOOR_ROWS), weight.shape[0]))
        dx = large(torch.empty_like(x)) if mode != "forward" else None
        dw = None
        if mode == "trainable":
            dw = large(weight.new_empty(weight.shape, dtype=torch.float32 if wide else b.dtype))
        for low in range(0, x.shape[0], FLOOR_ROWS):
            rows = x[low : low + FLOOR_ROWS]
            g = z[: rows.shape[0]]
            torch.mm(rows, weight.t(), out=g)
            if dx is not None:
                torch.mm(g, weight, out=dx[low : low + FLOOR_ROWS])
            if dw is not None:
                kind: Any = {"out_dtype": torch.float32} if wide else {}
                if low == 0:
                    torch.mm(g.t(), rows, out=dw, **kind)
                else:
                    torch.addmm(dw, g.t(), rows, out=dw, **kind)
            if ref is not None:
                torch.mm(ref[0][low : low + FLOOR_ROWS], ref[1].t(), out=g)
        return {}

    return Step(run)


# ----------------------------------------------------------------------------------------------------------------- ours


def fused_loss(impl: str = "auto", two_pass: bool = False, **filtered: Any) -> Callable[[Batch], Step]:
    """`FusedLinearCPOLoss` with a plan as a collator makes it; two_pass: a budget one row smaller than a group."""

    def build(b: Batch) -> Step:
        w = b.workload
        budget = (w.labelled // w.groups - 1) * w.vocab * b.dtype.itemsize if two_pass else None
        loss_fn = cpo.FusedLinearCPOLoss(beta=BETA, softcap=w.softcap, impl=impl, memory_budget=budget, **filtered)
        given: dict[str, Any] = {"ref_logps": b.ref_logps} if b.ref_hidden is None else {"ref_hidden": b.ref_hidden}
        if b.ref_weight is not b.weight:
            given["ref_weight"] = b.ref_weight
        pairs = None if w.responses == 2 else b.pairs.cpu()
        plan = loss_fn.plan(b.labels.cpu(), w.vocab, b.dtype, pairs, device=b.device, hidden_size=w.hidden).to(b.device)

        def run() -> Outcome:
            with torch.set_grad_enabled(w.mode != "forward"):
                out = loss_fn(b.hidden, b.weight, b.labels, plan=plan, **given)
                return b.outcome(out.loss, out.seq_logps)

        return Step(run)

    return build


def our_token_logps(**filtered: Any) -> Callable[[Batch], Step]:
    """`linear_token_logps` under an unknown loss: strategies kept or recompute, frozen, forward and live."""

    @from_token_logps
    def make(b: Batch) -> TokenLogps:
        return lambda x, weight: cpo.linear_token_logps(x, weight, b.labels, softcap=b.workload.softcap, **filtered)

    return make


def needs_backend(impl: str) -> Callable[[Head, torch.device], str]:
    return lambda workload, device: gpu_only(workload, device) or dispatch.missing(impl)


def trainable_only(workload: Head, device: torch.device) -> str:
    return "" if workload.mode == "trainable" else "two_pass is for a trainable head"


# ---------------------------------------------------------------------------------------------------------------- naive


def naive(labelled_only: bool, compiled: bool) -> Callable[[Batch], Step]:
    """Naive PyTorch: logits of every position, or only of the labelled rows."""

    @from_token_logps
    def make(b: Batch) -> TokenLogps:
        function = torch.compile(gathered) if compiled else gathered
        keep, softcap = b.labels != -100, b.workload.softcap
        labels = b.labels[keep]

        def every_position(x: Tensor, weight: Tensor) -> Tensor:
            return function(x, weight, b.labels, softcap) * keep

        def labelled(x: Tensor, weight: Tensor) -> Tensor:
            return b.padded(function(x[keep], weight, labels, softcap))

        return labelled if labelled_only else every_position

    return make


IMPLEMENTATIONS = {
    "products": Implementation("bare matrix products (the floor)", products, bare=True),
    "products_huge_pages": Implementation(
        "bare matrix products, results in pages of 2 MB",
        partial(products, large=dispatch.prefer_huge_pages),
        bare=True,
    ),
    "ours": Implementation("**cpo-kernels**", fused_loss()),
    "ours_triton": Implementation("cpo-kernels, Triton", fused_loss("triton"), refuses=needs_backend("triton")),
    "ours_cuda": Implementation("cpo-kernels, CUDA C++", fused_loss("cuda"), refuses=needs_backend("cuda")),
    "ours_two_pass": Implementation(
        "cpo-kernels, two_pass: a group exceeds the budget", fused_loss(two_pass=True), refuses=trainable_only
    ),
    "ours_token_logps": Implementation("cpo-kernels, `linear_token_logps` and a loss in torch", our_token_logps()),
    "ours_filtered": Implementation("cpo-kernels, `filter_eps`", fused_loss(filter_eps="auto")),
    "ours_filtered_head": Implementation("cpo-kernels, `filter_eps` and `filter_head_grad`", fused_loss(**FILTERED)),
    "ours_token_logps_filtered": Implementation(
        "cpo-kernels, `linear_token_logps`, both filters", our_token_logps(**FILTERED)
    ),
    "naive": Implementation("naive PyTorch, every position", naive(False, False)),
    "naive_unmasked": Implementation("naive PyTorch, labelled rows only", naive(True, False)),
    "naive_compiled": Implementation("naive PyTorch, every position, torch.compile", naive(False, True)),
    "naive_unmasked_compiled": Implementation("naive PyTorch, labelled rows only, torch.compile", naive(True, True)),
}
