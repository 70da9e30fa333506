"""The planner: which strategy a head of a given shape runs, in how many chunks, with how many products and bytes.

In products of N*H*V multiply-adds, N labelled rows:

    forward    1  no gradient wanted
    frozen     2  weight and bias need no gradient: dX unscaled is made while the chunk is there
    pairs      3  loss known, chunks are whole groups of linked pairs: dX and dW are made in the forward pass
    nll        3  loss known and separable by token (linear_nll), any chunks
    kto        3  loss known and separable by sequence (FusedLinearKTOLoss): chunks are whole sequences; 4 on the rows
                  of one that does not fit the budget
    deferred   3  one pair that does not fit the budget, its two coefficients opposite: dW is scaled when they are known
    two_pass   4  loss known, but a group does not fit the budget or the loss couples all pairs
    recompute  4  trainable head under a loss that is not known yet

With filter_eps the product of dX is made on the live columns, a share L of the vocabulary: 1 - L less of each that
makes dX. With filter_head_grad too:

    live  1 + 2 L  any loss: dX is made while the chunk is there, and dW in backward from the live gradients
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from cpo_kernels.checks import check_types
from cpo_kernels.head.matmul import tile_bytes
from cpo_kernels.head.relative import anchor_bytes

# Default bytes of one chunk of logits. CPU: 512 float32 rows of a 151,936-word vocabulary (297 MiB) make one chunk,
# which needs no accumulator of dW. GPU: 1 GiB, and no more than 8192 rows, derived and not measured. A chunk of n rows
# pays, beside its share of the products (6 n H V operations), for adding H V float32 numbers to dW (8 H V bytes): on an
# H200 (790 TFLOP/s, 4.3 TB/s) 245 / n of the products, whatever H and V are. In 16 bit:
#
#     V          49,152   65,536   128,256   151,936   256,000
#     rows        8,192    8,192     4,176     3,520     2,096
#     dW's sum       3%       3%        6%        7%       12%
#
# Twice the rows would save half of that for another GiB. Our kernels between the products (4 bytes a logit) cost
# 122 / H of them, 3% at H = 4096, whatever the chunk is.
DEFAULT_BUDGET = {"cpu": 320 << 20, "cuda": 1 << 30}
MAX_ROWS = {"cuda": 8192}
SET_ROWS = 128  # rows that share live columns: 6.8% of them at eps = 2^-12, 64 rows 4.4%, whose terms q weigh twice
PRODUCTS = {
    "forward": 1, "frozen": 2, "pairs": 3, "nll": 3, "kto": 3, "deferred": 3, "two_pass": 4, "recompute": 4, "live": 3,
}  # fmt: skip
LOSSES = ("preference", "kto", "nll", "unknown")  # of `explain`


# Beside relative logits the error of dX on real rows grows to 1.07 times that of exact gradients in bfloat16
# (benchmarks/results/filtered_gradients.json). float16 rounds 8 times less, and half of the vocabulary would be live
# before the tail's error is below that: exact.
AUTO_EPS = {torch.bfloat16: 2.0**-15}


def check_filter(filter_eps: float | str | None, filter_head_grad: bool) -> None:
    if not isinstance(filter_head_grad, bool):
        raise TypeError(f"filter_head_grad must be True or False, got {filter_head_grad!r}")
    if filter_head_grad and filter_eps is None:
        raise ValueError("filter_head_grad=True requires filter_eps: set it to a number or 'auto'")
    if filter_eps is None or filter_eps == "auto":
        return
    if isinstance(filter_eps, str):
        raise ValueError(f"filter_eps must be None, 'auto' or a number in (0, 1), got {filter_eps!r}")
    check_types("a number", filter_eps=filter_eps)
    if not 0.0 < filter_eps < 1.0:
        raise ValueError(f"filter_eps must be None, 'auto' or a number in (0, 1), got {filter_eps}")


def resolve_filter(filter_eps: float | str | None, filter_head_grad: bool, dtype: torch.dtype) -> float:
    """The eps of this dtype's products; 0 for exact gradients."""
    check_filter(filter_eps, filter_head_grad)
    return AUTO_EPS.get(dtype, 0.0) if filter_eps == "auto" else float(filter_eps or 0.0)


@dataclass(frozen=True)
class Plan:
    """How a head of this shape runs: what `explain` returns and the ops follow."""

    strategy: str
    num_tokens: int  # labelled rows
    chunk_rows: int
    num_chunks: int
    products: float
    logits_bytes: int  # one chunk
    # Beyond inputs and gradients: chunk, dX, a float32 accumulator (of dW, or of dX by columns), float32 tiles on CPUs
    # without 16-bit products, and what relative logits look at.
    extra_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.strategy}: {self.products:g} products of {self.num_tokens} labelled rows in {self.num_chunks} "
            f"chunk(s) of at most {self.chunk_rows} rows; logits {self.logits_bytes / 2**20:.0f} MiB, "
            f"in all {self.extra_bytes / 2**20:.0f} MiB beyond inputs and gradients"
        )


# cuBLAS multiplies 16-byte aligned rows at its full rate and others several times slower.
ALIGN = 64  # columns


def row_stride(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from one row of logits [n, width] to the next: on a GPU rows of an odd width (GPT-2's 50,257) are padded
    to begin on 16-byte boundaries. Not measured on a GPU; on a CPU padding changes nothing: three bfloat16 products of
    1024 x 768 x 50,257 took 1.00 times as long with it (0.82 to 1.31 beside other work)."""
    if device.type == "cpu" or width < ALIGN or width * dtype.itemsize % 16 == 0:
        return width
    return -(-width // ALIGN) * ALIGN


def budget_rows(width: int, dtype: torch.dtype, device: torch.device, memory_budget: int | None) -> int:
    """Rows of logits that fit the budget: at least 1, and a multiple of 16 where there are that many."""
    check_types("an integer", optional=True, memory_budget=memory_budget)
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    kind = device.type if device.type in DEFAULT_BUDGET else "cuda"
    row_bytes = row_stride(width, dtype, device) * dtype.itemsize
    rows = max(1, (memory_budget or DEFAULT_BUDGET[kind]) // row_bytes)
    if memory_budget is None:
        rows = min(rows, MAX_ROWS.get(kind, rows))
    return rows if rows < 16 else rows // 16 * 16


def even_rows(num_tokens: int, limit: int) -> int:
    """Chunk size of at most `limit` rows that leaves no small rest."""
    chunks = max(1, -(-num_tokens // limit))
    return max(1, -(-num_tokens // chunks))


def chunks(num_rows: int, step: int) -> list[tuple[int, int]]:
    return [(low, min(low + step, num_rows)) for low in range(0, num_rows, step)]


def explain(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    train_hidden: bool = True,
    train_head: bool = True,
    loss: str = "preference",
    group_tokens: int | None = None,
    couples_pairs: bool = False,
    one_pair: bool = False,
    memory_budget: int | None = None,
    filter_eps: float | Literal["auto"] | None = None,
    filter_head_grad: bool = False,
    live_share: float = 0.18,
) -> Plan:
    """The plan for a head of this shape: strategy, chunks, products and bytes.

    Args:
        num_tokens: labelled positions; prompts and padding do not count.
        train_hidden, train_head: whether the hidden states, and weight or bias, need a gradient.
        loss: "preference" (FusedLinearCPOLoss), "kto" (FusedLinearKTOLoss), "nll" (linear_nll) or "unknown"
            (linear_token_logps).
        group_tokens: labelled positions of the largest group of linked pairs, under "kto" of the longest sequence;
            num_tokens if None. A sequence beyond the budget is counted as if all were.
        couples_pairs: the loss couples all pairs (aot, aot_unpaired).
        one_pair: the batch is one pair, under a loss with opposite coefficients (sigmoid and others, reverse KL).
        memory_budget: bytes of logits held at a time; the default depends on the device.
        filter_eps, filter_head_grad: see `linear_token_logps`.
        live_share: share of the vocabulary that they leave live, of which products and bytes follow: 0.18 on real rows
            of SmolLM2-135M at 2^-15, 0.07 at 2^-12. `PreferenceOutput.live_share` says what it was.

    Raises:
        TypeError, ValueError: numbers below 0, a live_share outside [0, 1], or an unknown loss or dtype.

    Examples:
        >>> explain(512, 896, 151936).strategy
        'pairs'
    """
    check_types("an integer", num_tokens=num_tokens, hidden_size=hidden_size, vocab_size=vocab_size)
    check_types("an integer", optional=True, group_tokens=group_tokens)
    if min(num_tokens, hidden_size, vocab_size - 1, group_tokens or 0) < 0:
        raise ValueError(
            "num_tokens, hidden_size and group_tokens must be >= 0 and vocab_size >= 1, got "
            f"{num_tokens}, {hidden_size}, {group_tokens} and {vocab_size}"
        )
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    check_types("a number", live_share=live_share)
    if not 0.0 <= live_share <= 1.0:
        raise ValueError(f"live_share must lie in [0, 1], got {live_share}")
    eps = resolve_filter(filter_eps, filter_head_grad, dtype)
    limit = budget_rows(vocab_size, dtype, torch.device(device), memory_budget)
    group = num_tokens if group_tokens is None else group_tokens
    if not (train_hidden or train_head):
        strategy = "forward"
    elif not train_head:
        strategy = "frozen"
    elif eps and filter_head_grad:
        strategy = "live"
    elif loss == "unknown":
        strategy = "recompute"
    elif loss in ("nll", "kto"):
        strategy = loss
    else:
        strategy = preference_strategy(num_tokens, group, couples_pairs, one_pair, limit)
    row_bytes = row_stride(vocab_size, dtype, torch.device(device)) * dtype.itemsize
    plan = _plan(strategy, num_tokens, hidden_size, vocab_size, dtype, limit, row_bytes, train_hidden, train_head)
    if strategy == "live":
        kept = num_tokens * vocab_size * (live_share + 1 / SET_ROWS) * dtype.itemsize  # gradients, q of each set
        plan = replace(plan, products=1 + live_share * (1 + train_hidden), extra_bytes=plan.extra_bytes + round(kept))
    elif eps and train_hidden:
        plan = replace(plan, products=plan.products - 1 + live_share)
    if strategy == "kto" and group > limit:
        plan = replace(plan, products=plan.products + 1)
    tiles = tile_bytes(plan.chunk_rows, hidden_size, dtype, torch.device(device))
    looks = anchor_bytes(plan.chunk_rows, hidden_size, vocab_size, dtype)
    return replace(plan, extra_bytes=plan.extra_bytes + tiles + looks)


def preference_strategy(num_tokens: int, group_tokens: int, couples_pairs: bool, one_pair: bool, limit: int) -> str:
    """`pairs` where whole groups fit the budget; a loss that couples all pairs has one group."""
    if (num_tokens if couples_pairs else group_tokens) <= limit:
        return "pairs"
    return "deferred" if one_pair else "two_pass"


def _plan(
    strategy: str, num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, limit: int, row_bytes: int,
    train_hidden: bool, train_head: bool,
) -> Plan:  # fmt: skip
    rows = min(num_tokens, limit) if strategy in ("pairs", "kto") else even_rows(num_tokens, limit)
    chunks = max(1, -(-num_tokens // max(rows, 1)))
    logits = rows * row_bytes
    accumulator = 0
    if train_head and chunks > 1 and strategy != "live":
        by_columns = strategy in ("two_pass", "recompute")  # where dW is written once and dX adds up
        numbers = (num_tokens * train_hidden if by_columns else vocab_size) * hidden_size
        accumulator = numbers * torch.promote_types(dtype, torch.float32).itemsize
    dx = num_tokens * hidden_size * dtype.itemsize if train_hidden else 0
    extra = logits + dx + accumulator
    return Plan(strategy, num_tokens, rows, chunks, PRODUCTS[strategy], logits, extra)
