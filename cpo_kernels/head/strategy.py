"""The planner: which strategy a head of a given shape runs, in how many chunks, with how many products and bytes.

Costs in matrix products of N*H*V multiply-adds, for N labelled rows:

    forward    1  no gradient needed; with AMX no logits are stored
    frozen     2  weight and bias need no gradient: unscaled dX is computed while the chunk is in memory
    pairs      3  loss known, chunks are whole groups of linked pairs: dX and dW are computed in the forward pass, from
                   logits that wait for the loss of their chunk
    nll        3  loss known and separable by token (linear_nll), any chunks
    kto        3  loss known and separable by sequence (FusedLinearKTOLoss): chunks are whole sequences; 4 on the rows
                   of a sequence that exceeds the budget
    deferred   3  one pair that exceeds the budget, with opposite coefficients: dW is scaled once they are known
    two_pass   4  loss known, but a group exceeds the budget or the loss couples all pairs
    kept       3  loss not known yet, and all logits fit the budget: they are kept for backward
    recompute  4  loss not known yet, and the logits exceed the budget: they are computed again in backward

With filter_eps dX is computed on the live columns only, a share L of the vocabulary: its product costs L instead of 1.
With filter_head_grad too:

    live  1 + 2 L  any loss: dX and dW are computed in backward from the live gradients
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from cpo_kernels.backends import dispatch
from cpo_kernels.checks import check_types
from cpo_kernels.head.matmul import own_sums, tile_bytes
from cpo_kernels.head.relative import anchor_bytes

# Default bytes of one chunk of logits. CPU: 512 float32 rows of a 151,936-word vocabulary (297 MiB) fit in one chunk,
# which needs no accumulator of dW. GPU: 1 GiB, and at most 8192 rows; derived, not measured. Besides its share of the
# products (6 n H V operations), a chunk of n rows adds H V float32 numbers to dW (8 H V bytes). On an H200 (790
# TFLOP/s, 4.3 TB/s) that takes 245 / n of the time of the products, for any H and V. In 16 bit:
#
#     V          49,152   65,536   128,256   151,936   256,000
#     rows        8,192    8,192     4,176     3,520     2,096
#     dW's sum       3%       3%        6%        7%       12%
#
# Twice the rows would save half of that for another GiB. Our kernels between the products (6 bytes per logit: one read
# for the log-probs, one read and one write for the gradient) take 184 / H of their time, 4% at H = 4096, for any chunk.
DEFAULT_BUDGET = {"cpu": 320 << 20, "cuda": 1 << 30}
MAX_ROWS = {"cuda": 8192}
SET_ROWS = 128  # rows that share live columns: 6.8% of them at eps = 2^-12; with 64, 4.4%, but twice the terms q
# Elements of 16 bit that wait for `LiveDx.write`: live gradients; where the CPU's own matmul has multiplied them, sums.
# All 3,202 rows of 576 x 49,152 in one turn took 0.93 to 1.00 of the time of two to four turns, and 3 MiB more.
HELD = 2**23
HELD_SUMS = 5 * 2**19
PRODUCTS = {
    "forward": 1, "frozen": 2, "pairs": 3, "nll": 3, "kto": 3, "deferred": 3, "two_pass": 4, "kept": 3, "recompute": 4,
    "live": 3,
}  # fmt: skip
LOSSES = ("preference", "kto", "nll", "unknown")  # of `explain`
# Default bytes, and least rows, of a chunk if no dW is summed over chunks (forward, frozen, live). On a CPU a small one
# is faster too: glibc reuses its memory, and maps blocks of 32 MiB and more anew for each step. 1383 rows of
# 576 x 49,152 in bfloat16, frozen, in two bare products: 1.18 as one chunk, 1.12 in chunks of 512 rows, 1.07 of 256,
# 1.18 of 128 (one core, AVX-512).
SMALL = {"cpu": (24 << 20, 256)}
# The same where the CPU's own matmuls multiply by tiles: a block of its weight, brought into their form, serves as many
# rows as a chunk has. 1,383 and 3,202 rows of 576 x 49,152, frozen, took 0.85 to 0.91 of the time of 24 MiB (medians of
# nine and of five turns, two cores; chunks of 32 MiB and more are in pages of 2 MB now). Both are halved if only dX is
# filtered, where what waits for `LiveDx.write` takes the rest: with AMX 24 MiB took 1.00 to 1.02 of the time of 36,
# without it 12 MiB 1.01 to 1.04 of the time of 24.
SMALL_TILES = (48 << 20, 256)
# Rows of a chunk whose dW the CPU's own matmul adds to halves of float32, which it keeps in the cache for all rows of a
# chunk, and of a piece of its logits. 3,202 rows of 576 x 49,152 (benchmarks/results/filtered.json) took half the
# memory of one chunk in pieces of 256, in no more time.
OWN_ROWS = 1024
# Hidden size up to which the CPU's own matmul need not store live gradients, if there is a set for each thread
# (kMadeColumns of csrc/cpu/live_matmul.cpp).
MADE_COLUMNS = 1024
# Rows at a time of which only log-probs are computed, without storing logits (`dispatch.unstored_logps`), and the
# columns of a task there (kTaskColumns of csrc/cpu/logits.cpp).
UNSTORED_ROWS, UNSTORED_COLUMNS = 1024, 512


# The error of dX on real rows grows to at most 1.1 times that of exact gradients in bfloat16
# (benchmarks/results/filtered_gradients.json). float16 rounds 8 times less: half of the vocabulary would have to be
# live before the tail's error fell below its rounding (extrapolated), so it is exact.
AUTO_EPS = {torch.bfloat16: 2.0**-15.25}


def check_filter(filter_eps: float | str | None, filter_head_grad: bool) -> None:
    if not isinstance(filter_head_grad, bool):
        raise TypeError(f"filter_head_grad must be True or False, got {filter_head_grad!r}")
    if filter_head_grad and filter_eps is None:
        raise ValueError("filter_head_grad=True requires filter_eps: set it to a number or 'auto'")
    if filter_eps is None or filter_eps == "auto":
        return
    message = f"filter_eps must be None, 'auto' or a number in (0, 1), got {filter_eps!r}"
    if isinstance(filter_eps, bool) or not isinstance(filter_eps, (int, float, str)):
        raise TypeError(message)
    if isinstance(filter_eps, str) or not 0.0 < filter_eps < 1.0:
        raise ValueError(message)


def resolve_filter(filter_eps: float | str | None, filter_head_grad: bool, dtype: torch.dtype) -> float:
    """The eps for products in this dtype; 0 for exact gradients."""
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
    logits_bytes: int  # one chunk; 0 if they are not stored
    # Beyond inputs and gradients: chunk, dX, the sum of dW over chunks (or of dX by columns), float32 tiles on CPUs
    # without 16-bit matmuls, the columns from which relative logits are computed, and live gradients.
    extra_bytes: int

    def __str__(self) -> str:
        products = "1 product" if self.products == 1 else f"{self.products:g} products"
        chunks = "1 chunk" if self.num_chunks == 1 else f"{self.num_chunks} chunks of at most {self.chunk_rows} rows"
        logits, extra = (f"{size / 2**20:.0f} MiB" for size in (self.logits_bytes, self.extra_bytes))
        return (
            f"{self.strategy}: {products} of {self.num_tokens} labelled rows in {chunks}; logits {logits}, in all "
            f"{extra} beyond inputs and gradients"
        )


# cuBLAS multiplies 16-byte aligned rows at its full rate, and others several times more slowly.
ALIGN = 64  # columns


def row_stride(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from one row of logits [n, width] to the next. On a GPU, rows of an odd width (GPT-2's 50,257) are
    padded to begin on 16-byte boundaries (not measured there). On a CPU padding changes nothing: three bfloat16
    products of 1024 x 768 x 50,257 took 1.00 times as long with it (0.82 to 1.31 beside other work)."""
    if device.type == "cpu" or width < ALIGN or width * dtype.itemsize % 16 == 0:
        return width
    return -(-width // ALIGN) * ALIGN


def budget_rows(width: int, dtype: torch.dtype, device: torch.device, memory_budget: int | None) -> int:
    """Rows of logits that fit the budget: at least 1, and a multiple of 16 if 16 or more fit."""
    check_types("an integer", optional=True, memory_budget=memory_budget)
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    kind = device.type if device.type in DEFAULT_BUDGET else "cuda"
    row_bytes = row_stride(width, dtype, device) * dtype.itemsize
    rows = max(1, (memory_budget or DEFAULT_BUDGET[kind]) // row_bytes)
    if memory_budget is None:
        rows = min(rows, MAX_ROWS.get(kind, rows))
    return rows if rows < 16 else rows // 16 * 16


def chunk_limit(
    width: int, dtype: torch.dtype, device: torch.device, memory_budget: int | None, own: bool, filtered: bool
) -> int:
    """Rows of a chunk if no dW is summed over chunks: `budget_rows`, by default fewer. own, filtered: see `limits`."""
    limit = budget_rows(width, dtype, device, memory_budget)
    if memory_budget is not None or device.type not in SMALL:
        return limit
    size, least = SMALL_TILES if own and dispatch.cpu_has_tiles() else SMALL[device.type]
    if own and filtered:
        size, least = size // 2, least // 2
    return min(limit, max(least, budget_rows(width, dtype, device, size)))


class SumLimit(NamedTuple):
    """Rows of a chunk if dW is summed over chunks."""

    rows: int
    # Rows of logits that are as large as what the sum of dW [V, H] holds besides dW. Several chunks in 16 bit sum it in
    # float32, so one chunk may have that many rows more and need no more memory. 0 if the user gives a budget, which
    # limits the logits.
    more: int

    def of(self, num_tokens: int, group: int = 0) -> int:
        """Rows of a chunk: all of them if that needs no more memory. group: at least so many."""
        rows = max(self.rows, group)
        return max(rows, num_tokens) if num_tokens <= max(even_rows(num_tokens, self.rows), group) + self.more else rows


class Limits(NamedTuple):
    """Rows of logits at a time."""

    budget: int  # that fit the memory budget
    chunk: int  # of a chunk if no dW is summed over chunks
    piece: int  # of a piece of a chunk that waits for its loss
    sum: SumLimit


def limits(
    width: int, hidden_size: int, dtype: torch.dtype, device: torch.device, memory_budget: int | None, own: bool,
    filtered: bool,
) -> Limits:  # fmt: skip
    """width: columns of the logits. own: whether the CPU's own matmul computes them and dW (`own_sums`). filtered:
    whether dX is, and dW is exact or not needed."""
    rows = budget_rows(width, dtype, device, memory_budget)
    few = chunk_limit(width, dtype, device, memory_budget, own, filtered)
    if memory_budget is not None:
        return Limits(rows, few, few, SumLimit(rows, 0))
    more = rows_of_sum(hidden_size, dtype, own)
    return Limits(rows, few, max(few, OWN_ROWS) if own else few, SumLimit(min(rows, OWN_ROWS) if own else rows, more))


def rows_of_sum(hidden_size: int, dtype: torch.dtype, own: bool) -> int:
    """`SumLimit.more`, if the user gives no budget."""
    return hidden_size * sum_itemsize(dtype, own) // dtype.itemsize


def sum_itemsize(dtype: torch.dtype, own: bool) -> int:
    """Bytes per number that a sum of dW over several chunks holds besides dW: float32, or half of it (own)."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return wide - dtype.itemsize if own or wide == dtype.itemsize else wide


def even_rows(num_tokens: int, limit: int) -> int:
    """Chunk size of at most `limit` rows, such that the last chunk is not much smaller than the others."""
    chunks = max(1, -(-num_tokens // limit))
    return max(1, -(-num_tokens // chunks))


def whole_sets(num_tokens: int, limit: int, set_rows: int) -> int:
    """`even_rows`; if gradients are filtered, a multiple of the rows that share live columns. set_rows: 0 if not."""
    step = even_rows(num_tokens, limit)
    if not set_rows or step == num_tokens:
        return step
    return min(-(-step // set_rows), limit // set_rows) * set_rows


def sets_at_a_time() -> int:
    """Sets whose gradients the CPU's own matmul takes at a time: one for each thread, but two at least, as each has a
    product of its own. The fewer, the less memory."""
    return max(2, torch.get_num_threads())


def stores_live_grads(hidden_size: int, sets: int) -> bool:
    """Whether the CPU's own matmul stores the live gradients that it makes of a chunk's logits."""
    return hidden_size > MADE_COLUMNS or sets < torch.get_num_threads()


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
    live_share: float = 0.19,
) -> Plan:
    """The plan for a head of this shape, without softcap and extras and not sharded: strategy, chunks, products, bytes.

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
        live_share: assumed share of live columns, which determines products and bytes: on real rows of SmolLM2-135M it
            is 0.19 at 2^-15.25 and 0.07 at 2^-12. The outputs of the losses and the trainer report the actual one.

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
    place = torch.device(device)
    own = own_sums(place, dtype)
    filtered = eps > 0 and train_hidden and not (filter_head_grad and train_head)
    limit, few, piece, summed = limits(vocab_size, hidden_size, dtype, place, memory_budget, own, filtered)
    set_rows = min(SET_ROWS, limit) if eps else 0
    group = num_tokens if couples_pairs or group_tokens is None else group_tokens
    if not (train_hidden or train_head):
        strategy = "forward"
    elif not train_head:
        strategy = "frozen"
    elif eps and filter_head_grad:
        strategy = "live"
    elif loss == "unknown":
        strategy = "kept" if num_tokens <= limit else "recompute"
    elif loss in ("nll", "kto"):
        strategy = loss
    else:
        strategy = preference_strategy(num_tokens, group, couples_pairs, one_pair, limit, summed.more)
    if strategy in ("forward", "frozen", "live"):
        limit = few
    elif strategy in ("pairs", "nll", "kto"):
        whole = {"nll": 0, "kto": min(group, limit), "pairs": group}[strategy]
        limit = summed.of(num_tokens, whole)
        if 0 < whole < limit < num_tokens:  # a chunk ends with a group
            limit = limit // whole * whole
    row_bytes = row_stride(vocab_size, dtype, place) * dtype.itemsize
    steps = limit, set_rows
    sizes = row_bytes, sum_itemsize(dtype, own)
    plan = _plan(strategy, num_tokens, hidden_size, vocab_size, dtype, *steps, *sizes, train_hidden, train_head)
    if strategy == "forward" and own and dispatch.cpu_has_tiles() and hidden_size % 2 == 0:
        rows = whole_sets(num_tokens, UNSTORED_ROWS, set_rows)  # in tiles, and what is found in UNSTORED_COLUMNS each
        found = rows * (hidden_size * dtype.itemsize + 16 * -(-vocab_size // UNSTORED_COLUMNS))
        plan = replace(
            plan, chunk_rows=rows, num_chunks=max(1, -(-num_tokens // rows)), logits_bytes=0, extra_bytes=found
        )
    elif eps and (strategy == "live" or train_hidden):
        live, q = vocab_size * live_share, vocab_size / set_rows  # elements of live gradients, and of q, for a row
        products, held = plan.products - 1 + live_share, num_tokens * (live + q)
        if strategy == "live":
            products = 1 + live_share * (1 + train_hidden)
            held += own * train_hidden * num_tokens * 2 * hidden_size  # dX in float32
        else:  # dX of several pieces is computed together
            waits = strategy in ("pairs", "nll", "kto", "deferred")  # see `Chunk`
            waiting = plan.chunk_rows if waits else num_tokens
            turn = whole_sets(plan.chunk_rows, piece if waits else few, set_rows)
            stored = stores_live_grads(hidden_size, -(-turn // set_rows))
            in_place = strategy in ("kept", "recompute", "two_pass")  # sums of dX: see `Execution.dx_dtype`
            at_once = own and turn == waiting  # see `LiveDx.add_logits`
            apart = 0 if in_place or at_once else 2 * hidden_size
            wait = q + (apart if own else live)  # see `DxPart`
            held = min(waiting * wait, min(plan.chunk_rows * vocab_size, HELD_SUMS if own else HELD) + turn * wait)
            if own:
                held += stored * min(turn, set_rows * sets_at_a_time()) * live + num_tokens * hidden_size * in_place
        plan = replace(plan, products=products, extra_bytes=plan.extra_bytes + round(held * dtype.itemsize))
    if strategy == "kto" and group > limit:
        plan = replace(plan, products=plan.products + 1)
    tiles = tile_bytes(plan.chunk_rows, hidden_size, dtype, place)
    looks = anchor_bytes(num_tokens, plan.chunk_rows, hidden_size, vocab_size, dtype, place)
    return replace(plan, extra_bytes=plan.extra_bytes + tiles + looks)


def preference_strategy(
    num_tokens: int, group_tokens: int, couples_pairs: bool, one_pair: bool, limit: int, more: int
) -> str:
    """`pairs` if whole groups fit the budget; a loss that couples all pairs makes them one group. more: `SumLimit`."""
    if (num_tokens if couples_pairs else group_tokens) <= limit:
        return "pairs"
    if not one_pair:
        return "two_pass"
    return "pairs" if num_tokens <= SumLimit(limit, more).of(num_tokens) else "deferred"


def _plan(
    strategy: str, num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, limit: int, set_rows: int,
    row_bytes: int, sum_size: int, train_hidden: bool, train_head: bool,
) -> Plan:  # fmt: skip
    in_sets = strategy in ("forward", "frozen", "live", "nll")  # see `Execution.step`
    rows = whole_sets(num_tokens, limit, set_rows if in_sets else 0)
    rows = min(num_tokens, limit) if strategy in ("pairs", "kto") else rows
    chunks = max(1, -(-num_tokens // max(rows, 1)))
    logits = rows * row_bytes
    accumulator = 0
    if train_head and chunks > 1 and strategy != "live":
        by_columns = strategy in ("two_pass", "recompute")  # dW is written once and dX accumulated
        accumulator = vocab_size * hidden_size * sum_size
        if by_columns:
            accumulator = num_tokens * train_hidden * hidden_size * torch.promote_types(dtype, torch.float32).itemsize
    dx = num_tokens * hidden_size * dtype.itemsize if train_hidden else 0
    extra = logits + dx + accumulator
    return Plan(strategy, num_tokens, rows, chunks, PRODUCTS[strategy], logits, extra)
