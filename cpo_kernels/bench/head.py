"""The head's workload, tensors and ground truth: a preference loss from hidden states, forward and backward.

Every implementation (`head_implementations`, `baselines`) computes -mean log sigmoid(beta * d) over the pairs.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cpo_kernels as cpo
from cpo_kernels.bench.implementation import BETA, Outcome, Step
from cpo_kernels.bench.rows import MAKERS
from cpo_kernels.bench.workload import Head


def plan(w: Head, device: torch.device) -> str:
    """The plan of `FusedLinearCPOLoss` for it."""
    dtype, wants_dx, trains = getattr(torch, w.dtype), w.mode != "forward", w.mode == "trainable"
    keys: dict[str, Any] = dict(train_hidden=wants_dx, train_head=trains, group_tokens=w.largest_group)
    return str(cpo.explain(w.labelled, w.hidden, w.vocab, dtype, device, **keys))


class Batch:
    """The tensors of a workload. Sequences lie response by response: with two responses chosen first, then rejected."""

    def __init__(self, workload: Head, device: torch.device) -> None:
        w, self.workload, self.device = workload, workload, device
        self.dtype = getattr(torch, w.dtype)
        made = MAKERS[w.rows](w, device)
        self.hidden = made.hidden.to(self.dtype).requires_grad_(w.mode != "forward")
        self.weight = made.weight.to(self.dtype).requires_grad_(w.mode == "trainable")  # [V, H]
        self.labels = made.labels  # [S, T]
        self.pairs = torch.tensor(
            [(a * w.groups + i, b * w.groups + i) for a, b in combinations(range(w.responses), 2)
             for i in range(w.groups)], device=device,
        )  # fmt: skip
        self.ref_hidden: Tensor | None = None
        self.ref_weight = self.weight
        # All the same: it cancels in d, so that Liger, which takes no log-probs, computes the same loss.
        self.ref_logps = torch.full((w.sequences,), -11.0 * (w.length - w.prompt), device=device)
        if w.rows != "random":  # the policy's own, as in the first step of a training: the sigmoid is in its middle
            keep = self.labels != -100
            logps = [
                gathered(x[k].float(), made.weight, y[k], w.softcap).sum()
                for x, y, k in zip(self.hidden.detach(), self.labels, keep, strict=True)
            ]
            self.ref_logps = torch.stack(logps)
        if w.reference == "computed":
            g = torch.Generator(device).manual_seed(1)
            noise = torch.randn(self.hidden.shape, generator=g, device=device)
            self.ref_hidden = (self.hidden.detach().float() + 0.3 * noise).to(self.dtype)
            if w.mode == "trainable":
                self.ref_weight = self.weight.detach().clone()

    def outcome(self, loss: Tensor, seq_logps: Tensor | None = None) -> Outcome:
        """Run backward and take the gradients off the leaves. seq_logps [S]: from those that give log-probs."""
        given = {"loss": loss.detach(), "seq_logps": None if seq_logps is None else seq_logps.detach()}
        if self.workload.mode == "forward":
            return {name: tensor for name, tensor in given.items() if tensor is not None}
        loss.backward()
        named = {**given, "dx": self.hidden.grad, "dw": self.weight.grad}
        self.hidden.grad = self.weight.grad = None
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def padded(self, values: Tensor) -> Tensor:
        """[n] of the labelled rows -> [S, T]"""
        return values.new_zeros(self.labels.shape).masked_scatter(self.labels != -100, values)

    def dpo(self, token_logps: Tensor, ref_token_logps: Tensor | None) -> tuple[Tensor, Tensor]:
        """-mean log sigmoid(beta d), and seq_logps [S], of token log-probs [S, T], zero where nothing is labelled."""
        ref = self.ref_logps if ref_token_logps is None else ref_token_logps.float().sum(1)
        seq_logps = token_logps.float().sum(1)
        d = seq_logps - ref
        chosen, rejected = d[self.pairs].unbind(1)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean(), seq_logps


TokenLogps = Callable[[Tensor, Tensor], Tensor]  # hidden [S, T, H], weight [V, H] -> [S, T]


def from_token_logps(make: Callable[[Batch], TokenLogps]) -> Callable[[Batch], Step]:
    """The step of an implementation that returns token log-probs: torch computes the loss, and the reference if none is
    given."""

    def build(b: Batch) -> Step:
        logps = make(b)

        def run() -> Outcome:
            with torch.set_grad_enabled(b.workload.mode != "forward"):
                ref = None
                if b.ref_hidden is not None:
                    with torch.no_grad():
                        ref = logps(b.ref_hidden, b.ref_weight)
                loss, seq_logps = b.dpo(logps(b.hidden, b.weight), ref)
            return b.outcome(loss, seq_logps)

        return Step(run)

    return build


def capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def gathered(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """log_softmax in the dtype of the logits, then gather: the lightest form that users write."""
    z = capped(x @ weight.t(), softcap)
    return z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------- truth


def truth(b: Batch) -> Outcome:
    """The plain formulas in float32 over chunks of rows: log-probs first, then their vector-Jacobian product."""
    keep, w, step = b.labels != -100, b.workload, 1024
    labels = b.labels[keep]

    def logps(x: Tensor, weight: Tensor) -> Tensor:
        """[n] without a graph."""
        parts = zip(x.split(step), labels.split(step), strict=True)
        with torch.no_grad():
            return torch.cat([gathered(rows, weight, y, w.softcap) for rows, y in parts])

    x, weight = b.hidden.detach()[keep].float(), b.weight.detach().float()
    ref = None
    if b.ref_hidden is not None:
        ref = b.padded(logps(b.ref_hidden[keep].float(), b.ref_weight.detach().float()))
    logp = logps(x, weight).requires_grad_(w.mode != "forward")
    loss, seq_logps = b.dpo(b.padded(logp), ref)
    if w.mode == "forward":
        return {"loss": loss, "seq_logps": seq_logps}
    (coef,) = torch.autograd.grad(loss, logp)
    weight.requires_grad_(w.mode == "trainable")
    dx = torch.zeros_like(b.hidden, dtype=torch.float32)
    grads = []
    for rows, y, c in zip(x.split(step), labels.split(step), coef.split(step), strict=True):
        rows = rows.detach().requires_grad_()
        gathered(rows, weight, y, w.softcap).backward(c)
        grads.append(rows.grad)
    dx[keep] = torch.cat([grad for grad in grads if grad is not None])
    named = {"loss": loss.detach(), "seq_logps": seq_logps.detach(), "dx": dx, "dw": weight.grad}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def limits(workload: Head) -> dict[str, float]:
    """16 bit: five standard deviations of what rounding log-probs does to a naive sum.

    Near -12 bfloat16 rounds by 0.018 (one deviation), so d of two responses of T tokens moves by 0.018 sqrt(2 T), and
    beta d, which scales every gradient, by a tenth of it: five of them are 0.1 at T = 64.
    """
    tokens = workload.length - workload.prompt
    limit = 1e-3 if workload.dtype == "float32" else 0.1 * max(1.0, (tokens / 64) ** 0.5)
    nats = 1e-2 if workload.dtype == "float32" else 0.2 * tokens**0.5
    return {"loss": limit, "seq_logps": nats, "dx": limit, "dw": limit}
