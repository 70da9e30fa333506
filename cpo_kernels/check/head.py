"""Cases of `cpo-kernels check`: the public functions from hidden states, and gradients, against the float64 oracle.

Truth is `reference.linear_token_logps` in float64 under autograd and, for the preference loss, the reference backend on
its sequence log-probs. Upstream gradients are random.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_kernels import reference
from cpo_kernels.backends import dispatch
from cpo_kernels.check import limits
from cpo_kernels.check.compare import Backend, Case, Findings, relative_error, short
from cpo_kernels.check.tokens import DTYPES, IGNORE
from cpo_kernels.head.nll import linear_nll
from cpo_kernels.head.token_logps import linear_token_logps
from cpo_kernels.losses.fused import FusedLinearCPOLoss
from cpo_kernels.losses.kto import FusedLinearKTOLoss
from cpo_kernels.losses.preference import preference_loss
from cpo_kernels.objectives import Objective

VOCAB, WIDTH = 509, 48
SEQUENCES, LENGTH = 6, 21
BATCHES = 8  # of a comparison with naive PyTorch in 16 bit
OBJECTIVES = (Objective("helpfulness", 1, 5), Objective("honesty", 1, 5, weight=2.0))
HEADS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("softcap", {"scale": 0.25, "softcap": 5.0}),
    ("padded-vocab", {"vocab_size": 500}),
)
BUDGETS = (("one-chunk", None), ("chunks", 40), ("tiny", 7))  # rows of logits
TRAIN = {"all": (True, True), "frozen": (True, False), "head-only": (False, True)}


@dataclass
class Batch:
    """Random values that 16 bit represents; prompts of different lengths are masked, one sequence is all prompt."""

    hidden: Tensor  # [S, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    labels: Tensor  # [S, T]
    ref_logps: Tensor  # [S]
    scores: Tensor  # [S, K]
    conditions: Tensor  # [P, K]

    def leaves(self, train: tuple[bool, bool]) -> list[Tensor]:
        head = [self.weight] if self.bias is None else [self.weight, self.bias]
        return [self.hidden] * train[0] + head * train[1]

    def to(self, backend: Backend, dtype: torch.dtype, train: tuple[bool, bool]) -> "Batch":
        def move(t: Tensor, trains: bool) -> Tensor:
            return t.to(backend.device, dtype, copy=True).requires_grad_(trains)

        bias = None if self.bias is None else move(self.bias, train[1])
        rest = (t.to(backend.device) for t in (self.labels, self.ref_logps, self.scores, self.conditions))
        return Batch(move(self.hidden, train[0]), move(self.weight, train[1]), bias, *rest)


def make_batch(bias: bool, seed: int, sequences: int = SEQUENCES, length: int = LENGTH, limit: int = 500) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * spread).bfloat16().half().double()

    labels = torch.randint(limit, (sequences, length), generator=g)
    labels[torch.arange(length) < torch.randint(0, length // 2, (sequences, 1), generator=g)] = IGNORE
    labels[-1] = IGNORE
    scores = torch.randint(1, 6, (sequences, 2), generator=g).double()
    return Batch(
        rand(sequences, length, WIDTH),
        rand(VOCAB, WIDTH, spread=0.3),
        rand(VOCAB) if bias else None,
        labels,
        # Near the log-probs of such a head (mean -8.3): no loss is saturated, so no gradient is all rounding.
        -8.3 * (labels != IGNORE).sum(1) + 4 * torch.randn(sequences, generator=g, dtype=torch.float64),
        scores,
        torch.randint(1, 6, (sequences // 2, 2), generator=g).double(),
    )


def naive_token_logps(batch: Batch, scale: float = 1.0, softcap: float = 0.0, vocab_size: int = VOCAB) -> Tensor:
    """What a user writes: logits of every position in the dtype, log_softmax in float32, gather."""
    z = F.linear(batch.hidden, batch.weight, batch.bias)[..., :vocab_size] * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    picked = z.float().log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1)
    return picked * (batch.labels != IGNORE)


def true_token_logps(batch: Batch, **head: Any) -> Tensor:
    return reference.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias, **head)


Function = Callable[[Batch], Tensor]


def check_function(
    backend: Backend,
    findings: Findings,
    bias: bool,
    seed: int,
    dtype: torch.dtype,
    train: str,
    ours: Function,
    truth: Function,
    naive: Function,
) -> None:
    """Values and gradients of `ours` against `truth` in float64; 16 bit: no further from it than `naive`.

    In 16 bit both share the rounding of the logits, which moves the loss's coefficients by a percent, and naive's own
    rounding of a coefficient, the same for all rows of a pair, may undo that or double it: errors are 2-norms, and root
    mean squares over several batches and upstream gradients.
    """
    names = ["value", *(["dX"] * TRAIN[train][0]), *(["dW", "db"][: 1 + bias] * TRAIN[train][1])]
    exact_dtype = dtype in limits.HEAD
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for k in range(1 if exact_dtype else BATCHES):
        batch = make_batch(bias, seed + 100 * k)
        exact = batch.to(backend, torch.float64, TRAIN[train])
        want = truth(exact)
        upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(2 + k), dtype=torch.float64)

        def results(function: Function, b: Batch, upstream: Tensor = upstream) -> list[Tensor]:
            value = function(b)
            up = upstream.to(value.device, value.dtype)
            return [value, *torch.autograd.grad(value, b.leaves(TRAIN[train]), up)]

        wanted = results(truth, exact)
        got = results(ours, batch.to(backend, dtype, TRAIN[train]))
        again = results(ours, batch.to(backend, dtype, TRAIN[train]))
        plain = wanted if exact_dtype else results(naive, batch.to(backend, dtype, TRAIN[train]))
        for name, g, a, w, n in zip(names, got, again, wanted, plain, strict=True):
            findings.require(f"{name} has shape {list(g.shape)}", g.shape == w.shape)
            findings.same(f"{name} of a second run", a, g)
            if exact_dtype:
                findings.measured(name, relative_error(g, w), limits.HEAD[dtype])
            else:
                errors[name].append((relative_error(g, w, 2), relative_error(n, w, 2)))
    for name, pairs in errors.items():
        if pairs:
            mine, theirs = (
                torch.tensor(column).double().square().mean().sqrt().item() for column in zip(*pairs, strict=True)
            )
            findings.measured(name, mine, theirs + limits.NAIVE_SLACK)


def budget_bytes(rows: int | None, dtype: torch.dtype) -> int | None:
    return None if rows is None else rows * VOCAB * dtype.itemsize


def token_cases() -> Iterator[Case]:
    """linear_token_logps and linear_nll."""
    for (head_name, head), (budget_name, rows), train, dtype in itertools.product(HEADS, BUDGETS, TRAIN, DTYPES):
        if head_name != "plain" and (budget_name == "tiny" or train == "head-only"):
            continue

        def logps(
            backend: Backend, findings: Findings, head: dict[str, Any] = head, rows: int | None = rows,
            train: str = train, dtype: torch.dtype = dtype,
        ) -> None:  # fmt: skip
            options = {**head, "memory_budget": budget_bytes(rows, dtype), "impl": backend.name}

            def ours(b: Batch) -> Tensor:
                logp: Tensor = linear_token_logps(b.hidden, b.weight, b.labels, b.bias, **options)
                return logp

            bias = train != "frozen"
            naive = lambda b: naive_token_logps(b, **head)  # noqa: E731
            check_function(backend, findings, bias, 3, dtype, train, ours, lambda b: true_token_logps(b, **head), naive)
            if train == "all":
                with torch.no_grad():
                    low = make_batch(bias, 3).to(backend, dtype, (False, False))
                    extra = linear_token_logps(low.hidden, low.weight, low.labels, low.bias, extras=True, **options)
                    plain = ours(low)
                if dispatch.unstored_logps(backend.kernels, low.weight, head.get("softcap") or 0.0) is None:
                    findings.same("value without gradients", extra[0], plain)
                else:  # the sums of logits that are not stored have another order
                    findings.close("value without gradients", extra[0], plain, 1e-6)

        def nll(
            backend: Backend, findings: Findings, head: dict[str, Any] = head, rows: int | None = rows,
            train: str = train, dtype: torch.dtype = dtype,
        ) -> None:  # fmt: skip
            budget = budget_bytes(rows, dtype)
            weights = torch.rand(SEQUENCES, LENGTH, generator=torch.Generator().manual_seed(5)).to(backend.device)

            def ours(b: Batch) -> Tensor:
                options = {**head, "token_weights": weights, "num_tokens": 37.0, "memory_budget": budget}
                return linear_nll(b.hidden, b.weight, b.labels, b.bias, impl=backend.name, **options)

            truth = lambda b: -(true_token_logps(b, **head) * weights).sum() / 37.0  # noqa: E731
            naive = lambda b: -(naive_token_logps(b, **head) * weights).sum() / 37.0  # noqa: E731
            check_function(backend, findings, True, 4, dtype, train, ours, truth, naive)

        quick = head_name == "softcap" and budget_name == "chunks" and dtype in (torch.float32, torch.bfloat16)
        name = f"{short(dtype)}/{train},{head_name},{budget_name}"
        yield Case(f"linear_token_logps/{name}", logps, quick)
        yield Case(f"linear_nll/{name}", nll, quick)


def preference_cases() -> Iterator[Case]:
    """FusedLinearCPOLoss: every loss type, padded and packed, one chunk, several, and two passes."""
    types = [*reference.LOSS_TYPES]
    plans: list[tuple[str, Sequence[torch.dtype]]] = [(t, (torch.float32, torch.float64)) for t in types]
    plans += [("sigmoid", (torch.bfloat16, torch.float16))]
    for loss_type, dtypes in plans:
        for dtype, (budget_name, rows), train in itertools.product(dtypes, BUDGETS, ("all", "frozen")):

            def run(
                backend: Backend, findings: Findings, loss_type: str = loss_type, dtype: torch.dtype = dtype,
                rows: int | None = rows, train: str = train,
            ) -> None:  # fmt: skip
                kind = reference.LOSS_TYPES[loss_type]
                options: dict[str, Any] = {"objectives": OBJECTIVES, "beta": 0.3, "loss_type": loss_type}
                if loss_type in ("exo_pair", "robust"):
                    options["label_smoothing"] = 0.1
                budget = budget_bytes(rows, dtype)
                ours = FusedLinearCPOLoss(memory_budget=budget, impl=backend.name, **options)

                def tensors(b: Batch) -> dict[str, Any]:
                    given: dict[str, Any] = {"scores": b.scores, "conditions": b.conditions}
                    if kind.needs_reference:
                        given["ref_logps"] = b.ref_logps
                    if "margins" in kind.honours:
                        given["margins"] = torch.linspace(-1, 1, len(b.labels), dtype=torch.float64).to(backend.device)
                    return given

                def padded(b: Batch) -> Tensor:
                    loss: Tensor = ours(b.hidden, b.weight, b.labels, b.bias, **tensors(b)).loss
                    return loss

                def packed(b: Batch) -> Tensor:
                    cu = torch.arange(len(b.labels) + 1, device=backend.device) * b.labels.shape[1]
                    hidden = b.hidden.flatten(0, 1)
                    loss: Tensor = ours(hidden, b.weight, b.labels.flatten(), b.bias, cu_seqlens=cu, **tensors(b)).loss
                    return loss

                def after(token_logps: Callable[[Batch], Tensor]) -> Function:
                    def value(b: Batch) -> Tensor:
                        lengths = (b.labels != IGNORE).sum(1)
                        sums = token_logps(b).sum(1)
                        return preference_loss(sums, lengths=lengths, impl="reference", **options, **tensors(b)).loss

                    return value

                truth, naive = after(true_token_logps), after(naive_token_logps)
                for function in (padded, packed):
                    check_function(backend, findings, train == "all", 6, dtype, train, function, truth, naive)

            quick = loss_type == "sigmoid" and dtype in (torch.float32, torch.bfloat16) and train == "all"
            yield Case(f"FusedLinearCPOLoss/{short(dtype)}/{loss_type},{train},{budget_name}", run, quick)


def unpaired_cases() -> Iterator[Case]:
    """FusedLinearKTOLoss: one chunk, several, and sequences longer than a chunk."""
    for dtype, (budget_name, rows), train in itertools.product(DTYPES, BUDGETS, ("all", "frozen")):

        def run(
            backend: Backend, findings: Findings, dtype: torch.dtype = dtype, rows: int | None = rows,
            train: str = train,
        ) -> None:  # fmt: skip
            weights: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6}
            ours = FusedLinearKTOLoss(**weights, memory_budget=budget_bytes(rows, dtype), impl=backend.name)
            desirable = (torch.arange(SEQUENCES) % 2 == 0).to(backend.device)

            def fused(b: Batch) -> Tensor:
                given = {"desirable": desirable, "kl": 0.7, "ref_logps": b.ref_logps}
                loss: Tensor = ours(b.hidden, b.weight, b.labels, b.bias, **given).loss
                return loss

            def after(token_logps: Function) -> Function:
                def value(b: Batch) -> Tensor:
                    sums = token_logps(b).sum(1)
                    return reference.kto_loss(sums, b.ref_logps.to(sums.dtype), desirable, 0.7, **weights).mean()

                return value

            truth, naive = after(true_token_logps), after(naive_token_logps)
            check_function(backend, findings, train == "all", 7, dtype, train, fused, truth, naive)

        quick = dtype in (torch.float32, torch.bfloat16) and train == "all"
        yield Case(f"FusedLinearKTOLoss/{short(dtype)}/{train},{budget_name}", run, quick)


def head_cases() -> Iterator[Case]:
    yield from token_cases()
    yield from preference_cases()
    yield from unpaired_cases()
