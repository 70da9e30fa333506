"""Cases of `cpo-kernels check`: wrong arguments of the compiled ops raise, and the error names argument and value.

Triton's launchers leave that to the public functions.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.check.compare import GPU_BACKENDS, Backend, Case, Findings, Skip
from cpo_kernels.check.preference import TYPES, make_batch
from cpo_kernels.check.tokens import IGNORE
from cpo_kernels.reference.terms import OPTIONS

Wrong = tuple[dict[str, Any], str]
NONE, DOUBLE = torch.empty(0), torch.zeros(3, dtype=torch.float64)
INT64 = torch.int64

TOKENS: dict[str, Any] = dict(
    logits=torch.zeros(3, 50),
    labels=torch.zeros(3, dtype=INT64),
    scale=1.0,
    softcap=0.0,
    vocab_size=50,
    anchors=None,
)
WRONG_TOKENS: tuple[Wrong, ...] = (
    (dict(labels=torch.tensor([1, 2])), r"labels must have shape \[3\], got \[2\]"),
    (dict(labels=torch.zeros(3, dtype=torch.int32)), "labels must be int64, got int32"),
    (dict(logits=torch.zeros(3, 50, dtype=INT64)), "logits must be float32, .* got int64"),
    (dict(logits=torch.zeros(50, 3).t()), "unit stride over the vocabulary, got stride 3"),
    (dict(logits=torch.zeros(50)), r"logits must have shape \[N, V\], got \[50\]"),
    (dict(vocab_size=51), r"vocab_size must be in \[1, 50\].*got 51"),
    (dict(scale=0.0), "scale must be a positive number, got 0"),
    (dict(anchors=torch.zeros(2, 4)), r"anchors must have shape \[2, 3\], got \[2, 4\]"),
    (dict(anchors=torch.zeros(3)), r"anchors must have shape \[2, 3\], got \[3\]"),
    (dict(anchors=torch.zeros(2, 3).double()), "anchors must be float32, got float64"),
    (dict(softcap=-3.0), "softcap must be positive.*got -3"),
)
# What only a look at the data shows: an error on the CPU, NaN on a GPU.
WRONG_LABELS: tuple[Wrong, ...] = (
    (dict(labels=torch.tensor([1, 50, 2])), "label 50 at row 1 is out of range"),
    (dict(labels=torch.tensor([1, 2, -1])), "label -1 at row 2 is out of range"),
    (dict(labels=torch.tensor([1, 2, 45]), vocab_size=45), r"label 45 at row 2 .* \[0, 45\)"),
)

SUM: dict[str, Any] = dict(token_logps=torch.zeros(5), cu_seqlens=torch.tensor([0, 5]), token_weights=NONE)
WRONG_SUMS: tuple[Wrong, ...] = (
    (dict(token_logps=torch.zeros(5).bfloat16()), "token_logps must be float32 or float64, got bfloat16"),
    (dict(token_logps=torch.zeros(5, 1)), r"token_logps must have shape \[N\], got \[5, 1\]"),
    (dict(cu_seqlens=torch.tensor([0, 5]).int()), "cu_seqlens must be int64, got int32"),
    (dict(cu_seqlens=torch.tensor(5)), r"cu_seqlens must have shape \[S \+ 1\], got \[\]"),
    (dict(token_weights=torch.zeros(4)), r"token_weights must have shape \[5\], got \[4\]"),
)
WRONG_OFFSETS: tuple[Wrong, ...] = (
    (dict(cu_seqlens=torch.tensor([0, 6])), r"\[0, 5\].*0 to 6"),
    (dict(cu_seqlens=torch.tensor([-1, 5])), "-1 to 5"),
    (dict(cu_seqlens=torch.tensor([0, 3, 2])), "not decrease, got 3 before 2"),
)

WRONG_PREFERENCES: tuple[Wrong, ...] = (
    (dict(pairs=torch.tensor([0, 1])), r"pairs must have shape \[P, 2\], got \[2\]"),
    (dict(pairs=torch.tensor([[0, 1]]).int()), "pairs must be int64, got int32"),
    (dict(ref_logps=torch.zeros(6)), r"ref_logps must have shape \[7\], got \[6\]"),
    (dict(lengths=torch.ones(8, dtype=INT64)), r"lengths must have shape \[7\]"),
    (dict(scores=torch.zeros(6, 3)), r"scores must have shape \[7, 3\], got \[6, 3\]"),
    (dict(conditions=torch.zeros(7, 3)), r"conditions must have shape \[11, 3\], got \[7, 3\]"),
    (dict(objectives=torch.zeros(2, 4)), r"objectives must have shape \[2, 3\], got \[2, 4\]"),
    (dict(pair_weights=torch.zeros(10)), r"pair_weights must have shape \[11\]"),
    (dict(seq_logps=torch.zeros(7, dtype=torch.bfloat16)), "seq_logps must be float64 or float32, got bfloat16"),
    (dict(loss_types=[len(TYPES)]), rf"loss_types must be in \[0, {len(TYPES)}\), got {len(TYPES)}"),
    (dict(loss_weights=[1.0, 2.0]), "loss_types and loss_weights .* got 1 and 2"),
    (dict(options=[0.1]), f"options must have {len(OPTIONS)} values, got 1"),
    (dict(lengths=torch.empty(0, dtype=INT64), loss_types=[TYPES.index("simpo")]), "lengths must be given"),
)
WRONG_PAIRS: tuple[Wrong, ...] = (
    (dict(pairs=torch.tensor([[0, 7]])), r"pairs\[0\] holds sequence 7, but there are 7 sequences"),
    (dict(pairs=torch.tensor([[0, 1], [-1, 2]])), r"pairs\[1\] holds sequence -1"),
    (dict(pairs=torch.tensor([[3, 3]])), r"pairs\[0\] pairs sequence 3 with itself"),
)


def refuses_each(
    backend: Backend,
    findings: Findings,
    right: dict[str, Any],
    wrong: tuple[Wrong, ...],
    call: Callable[[dict[str, Any]], Any],
) -> None:
    if backend.name == "triton":
        raise Skip("the public functions check what Triton's launchers take")
    for change, pattern in wrong:
        given = {**right, **change}
        given = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in given.items()}
        findings.refuses(", ".join(change), partial(call, given), pattern)


def error_cases() -> Iterator[Case]:
    def of(backend: Backend, wrong: tuple[Wrong, ...], of_data: tuple[Wrong, ...]) -> tuple[Wrong, ...]:
        return wrong if backend.name in GPU_BACKENDS else wrong + of_data

    def token_logps(backend: Backend, findings: Findings) -> None:
        for op in (backend.kernels.token_logps_fwd, backend.kernels.token_logps_fused_):

            def call(a: dict[str, Any], op: Any = op) -> Any:
                head = (IGNORE, a["scale"], a["softcap"], a["vocab_size"])
                return op(a["logits"], a["labels"], *head, False, a["anchors"])

            refuses_each(backend, findings, TOKENS, of(backend, WRONG_TOKENS, WRONG_LABELS), call)

    def token_logps_writes(backend: Backend, findings: Findings) -> None:
        """Rows that share memory are never written."""
        right = {**TOKENS, "lse": torch.zeros(3), "grad": torch.zeros(3), "entropies": None}
        shared = torch.zeros(1, 50).expand(3, 50)
        kernels = backend.kernels

        def fused(a: dict[str, Any]) -> Any:
            return kernels.token_logps_fused_(a["logits"], a["labels"], IGNORE, 1.0, 0.0, 50, False)

        def bwd(a: dict[str, Any]) -> Any:
            rows = (a["logits"], a["labels"], a["lse"], a["grad"])
            return kernels.token_logps_bwd_(*rows, IGNORE, 1.0, 0.0, 50, a["anchors"], a["entropies"])

        refuses_each(backend, findings, right, ((dict(logits=shared), "rows must not overlap"),), fused)
        wrong = (
            (dict(logits=shared), "rows must not overlap"),
            (dict(lse=DOUBLE), "lse must be float32, got float64"),
            (dict(anchors=torch.zeros(2, 4)), r"anchors must have shape \[2, 3\], got \[2, 4\]"),
            (dict(entropies=torch.zeros(2, 3).double()), "entropies must be float32, got float64"),
            (dict(entropies=torch.zeros(3)), r"entropies must have shape \[2, 3\], got \[3\]"),
        )
        refuses_each(backend, findings, right, wrong, bwd)

    def sequence_sum(backend: Backend, findings: Findings) -> None:
        wrong = of(backend, WRONG_SUMS, WRONG_OFFSETS)
        refuses_each(backend, findings, SUM, wrong, lambda a: backend.kernels.sequence_sum(*a.values(), False))

    def preference(backend: Backend, findings: Findings) -> None:
        wrong = of(backend, WRONG_PREFERENCES, WRONG_PAIRS)
        refuses_each(backend, findings, make_batch(40), wrong, lambda a: backend.kernels.preference(*a.values()))

    for function in (token_logps, token_logps_writes, sequence_sum, preference):
        yield Case(f"errors/{function.__name__}", function)
