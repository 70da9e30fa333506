"""The kernels over logits [N, V]: token log-probs forward, backward and fused, against the device's copy rate."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import cpo_kernels as cpo
from cpo_kernels.backends import dispatch
from cpo_kernels.bench.head import capped
from cpo_kernels.bench.implementation import Family, Implementation, Outcome, Step
from cpo_kernels.ops.token_logps import head_options

BACKENDS = ("cpu", "triton", "cuda")
SIDE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


@dataclass(frozen=True)
class Tokens:
    rows: int
    vocab: int
    softcap: float | None = None
    dtype: str = "bfloat16"

    @property
    def bytes(self) -> int:
        """Bytes of the logits."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.rows * self.vocab * dtype.itemsize


class Batch:
    """`logits` stay unchanged; in-place kernels run on `work`, which is refilled before every run."""

    def __init__(self, workload: Tokens, device: torch.device) -> None:
        w, self.workload = workload, workload
        g = torch.Generator(device).manual_seed(0)
        self.logits = torch.randn(w.rows, w.vocab, generator=g, device=device).mul_(2).to(getattr(torch, w.dtype))
        self.work = torch.empty_like(self.logits)
        self.labels = torch.randint(w.vocab, (w.rows,), generator=g, device=device)
        self.grad = torch.randn(w.rows, generator=g, device=device)  # upstream
        self.ones = torch.ones_like(self.grad)
        self.head = head_options(w.vocab, -100, w.softcap, 1.0, None)

    def refill(self) -> None:
        self.work.copy_(self.logits)


def copy(b: Batch) -> Step:
    def run() -> Outcome:
        b.work.copy_(b.logits)
        return {}

    return Step(run)


def forward(impl: str) -> Callable[[Batch], Step]:
    def build(b: Batch) -> Step:
        op = dispatch.kernels(impl, b.logits).token_logps_fwd
        return Step(lambda: {"logp": op(b.logits, b.labels, *b.head, False)[0]})

    return build


def backward(impl: str) -> Callable[[Batch], Step]:
    def build(b: Batch) -> Step:
        kernels = dispatch.kernels(impl, b.logits)
        lse = kernels.token_logps_fwd(b.logits, b.labels, *b.head, False)[1]

        def run() -> Outcome:
            kernels.token_logps_bwd_(b.work, b.labels, lse, b.grad, *b.head)
            return {"dlogits": b.work}

        return Step(run, b.refill)

    return build


def fused(impl: str) -> Callable[[Batch], Step]:
    def build(b: Batch) -> Step:
        op = dispatch.kernels(impl, b.logits).token_logps_fused_

        def run() -> Outcome:
            return {"logp": op(b.work, b.labels, *b.head, False)[0], "unit_dlogits": b.work}

        return Step(run, b.refill)

    return build


def plain(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """What users write for exact results: everything in float32."""
    return capped(logits.float(), softcap).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def with_autograd(make: Callable[[Batch], Callable[[Tensor], Tensor]], train: bool) -> Callable[[Batch], Step]:
    """Forward, or forward and backward under a random upstream gradient, of logits -> logp."""

    def build(b: Batch) -> Step:
        logps, leaf = make(b), b.logits.detach().requires_grad_(train)

        def run() -> Outcome:
            logp = logps(leaf)
            if not train:
                return {"logp": logp}
            (dlogits,) = torch.autograd.grad(logp, leaf, b.grad)
            return {"logp": logp.detach(), "dlogits": dlogits}

        return Step(run)

    return build


def naive(b: Batch) -> Callable[[Tensor], Tensor]:
    return lambda z: plain(z, b.labels, b.workload.softcap)


def compiled(b: Batch) -> Callable[[Tensor], Tensor]:
    function = torch.compile(plain)
    return lambda z: function(z, b.labels, b.workload.softcap)


def ours(b: Batch) -> Callable[[Tensor], Tensor]:
    return lambda z: cpo.token_logps(z, b.labels, softcap=b.workload.softcap)


def truth(b: Batch) -> Outcome:
    z = b.logits.float().requires_grad_()
    logp = plain(z, b.labels, b.workload.softcap)
    (unit,) = torch.autograd.grad(logp, z, b.ones)
    return {"logp": logp.detach(), "dlogits": unit * b.grad[:, None], "unit_dlogits": unit}


def limits(workload: Tokens) -> dict[str, float]:
    """Log-probs are float32 in every dtype; a gradient is rounded once to its dtype (bfloat16: 2^-9)."""
    grad = 1e-4 if workload.dtype == "float32" else 4e-3
    return {"logp": 1e-5, "dlogits": grad, "unit_dlogits": grad}


def runs_on(impl: str) -> Callable[[Tokens, torch.device], str]:
    def refuses(workload: Tokens, device: torch.device) -> str:
        if device.type != SIDE[impl] and not (impl == "triton" and dispatch.triton_interpreted()):
            return f"the {impl} backend does not run on {device.type}"
        return dispatch.missing(impl)

    return refuses


IMPLEMENTATIONS = {
    "copy": Implementation("device copy (the floor)", copy, traffic=2, bare=True),
    **{
        f"forward_{i}": Implementation(f"token_logps_fwd, {i}", forward(i), refuses=runs_on(i), traffic=1)
        for i in BACKENDS
    },
    **{
        f"backward_{i}": Implementation(f"token_logps_bwd_, {i}", backward(i), refuses=runs_on(i), traffic=2)
        for i in BACKENDS
    },
    **{
        f"fused_{i}": Implementation(f"token_logps_fused_, {i}", fused(i), refuses=runs_on(i), traffic=2)
        for i in BACKENDS
    },
    "ours": Implementation("cpo.token_logps, forward and gradient", with_autograd(ours, True)),
    "naive_forward": Implementation("naive float32 log_softmax, forward", with_autograd(naive, False)),
    "naive": Implementation("naive float32 log_softmax, forward and gradient", with_autograd(naive, True)),
    "compiled_forward": Implementation("the same under torch.compile, forward", with_autograd(compiled, False)),
    "compiled": Implementation("the same under torch.compile, forward and gradient", with_autograd(compiled, True)),
}
FAMILY = Family(Tokens, Batch, IMPLEMENTATIONS, "copy", truth, limits)
