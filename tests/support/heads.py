"""Batches of hidden states and the float64 truth of the head, shared by the tests of ops, linear and loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import reference
from cpo_kernels.head.strategy import Limits, SumLimit

BACKENDS = ("reference", "cpu")
EVERY_BACKEND = (*BACKENDS, "triton")  # seconds a test in the interpreter
LOW_PRECISION = (torch.bfloat16, torch.float16)


def limits_of(rows: int, chunk: int | None = None) -> Limits:
    """So many rows at a time, or in a chunk whose dW is not summed."""
    few = rows if chunk is None else chunk
    return Limits(rows, few, few, SumLimit(rows, 0))


@dataclass
class Batch:
    hidden: Tensor  # [S, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [S, T]
    ref_logps: Tensor  # [S]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> "Batch":
        hidden, weight, *bias = (t.detach().to(dtype).requires_grad_() for t in self.leaves)
        acc = torch.promote_types(dtype, torch.float32)
        return Batch(hidden, weight, bias[0] if bias else None, self.labels, self.ref_logps.to(acc))

    def lengths(self) -> Tensor:
        return (self.labels != -100).sum(1)


def make_batch(
    sequences: int = 4,
    length: int = 9,
    hidden: int = 24,
    vocab: int = 101,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    seed: int = 0,
) -> Batch:
    """Random values that every dtype represents exactly; prompts of different lengths are masked."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * spread).bfloat16().half().double()

    labels = torch.randint(vocab, (sequences, length), generator=g)
    prompt = torch.randint(0, max(length // 2, 1), (sequences, 1), generator=g)
    labels[torch.arange(length) < prompt] = -100
    batch = Batch(
        rand(sequences, length, hidden),
        rand(vocab, hidden, spread=0.3),
        rand(vocab) if bias else None,
        labels,
        -3 * length * torch.rand(sequences, generator=g, dtype=torch.float64),
    )
    return batch.to(dtype)


def true_seq_logps(batch: Batch, token_weights: Tensor | None = None, **head: float) -> Tensor:
    """Differentiable sequence log-probs [S] of the oracle."""
    logps = reference.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias, **head)
    return (logps if token_weights is None else logps * token_weights).sum(1)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth| over max |truth|, in float64."""
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double(), truth.detach().double()
    return float((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-300))


def count_products(monkeypatch: Any) -> list[int]:
    """[multiply-adds of torch.mm and torch.addmm from here on]."""
    count = [0]

    def counted(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(*tensors: Tensor, **kwargs: Any) -> Tensor:
            a, b = tensors[-2:]
            count[0] += a.shape[0] * a.shape[1] * b.shape[1]
            return product(*tensors, **kwargs)

        return counting

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    return count
