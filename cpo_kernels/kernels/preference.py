"""Sequence sums, and the preference loss with its gradient, in Triton.

`sequence_sum` and `preference` have the signatures, results and semantics of the functions of those names in
`reference`. All arithmetic is in float64 and sums have a fixed order. There is no host-device synchronisation and no
launch depends on the data, so both can be captured in a CUDA graph.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels.kernels import tuning
from cpo_kernels.kernels.loss_formulas import Options, Pairs, pair_loss, score, smoothed
from cpo_kernels.reference.loss_types import LOSS_TYPES
from cpo_kernels.reference.terms import OPTIONS

# ------------------------------------------------------------------------------------------------------- sequence sums

TOKEN_BLOCK = 1024
SUM = tuning.Launch(warps=4, vectors=0)


@triton.jit(do_not_specialize=["N"])
def sequence_sum_kernel(
    token_logps, cu_seqlens, token_weights, out, N: "i64", AVERAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sequence: L_s = sum of m_t logp_t over tokens [cu[s], cu[s + 1]); NaN if they leave [0, N)."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1)
    inside = (begin >= 0) & (end <= N) & (begin <= end)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(tl.where(inside, begin, 0), tl.where(inside, end, 0), BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = token < end
        x = tl.load(token_logps + token, mask=mask, other=0.0).to(tl.float64)
        if token_weights is not None:
            x *= tl.load(token_weights + token, mask=mask, other=0.0).to(tl.float64)
        total += x
    result = tl.sum(total)
    if AVERAGE:
        result /= tl.maximum(end - begin, 1).to(tl.float64)
    tl.store(out + sequence, tl.where(inside, result, float("nan")))


def sequence_sum(token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor, average: bool) -> Tensor:
    """L_s `[S]` in the dtype of token_logps `[N]`; cu_seqlens `[S + 1]`, token_weights `[N]` or `[0]`."""
    sequences = cu_seqlens.shape[0] - 1
    out = token_logps.new_empty(sequences)
    if sequences:
        tensors = (token_logps.contiguous(), cu_seqlens.contiguous(), _given(token_weights), out)
        with _device_of(token_logps):
            sequence_sum_kernel[(sequences,)](
                *tensors, token_logps.shape[0], AVERAGE=average, BLOCK=TOKEN_BLOCK, **tuning.options(SUM)
            )
    return out


def _given(tensor: Tensor) -> Tensor | None:
    """None for an absent tensor; Triton compiles a separate kernel for it."""
    return tensor.contiguous() if tensor.numel() else None


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------- which of a pair is chosen

OBJECTIVES = tl.constexpr(4)  # objectives whose loads are in flight together


class Orientation(NamedTuple):
    gap: Any  # Delta R of the first minus the second
    live: Any  # no tie
    chosen: Any
    rejected: Any


@triton.jit
def value_gap(scores, conditions, objectives, pair, first, second, valid, K):
    """Delta R [BLOCK]: NaN where no objective of positive weight is rated on both sides, inf without scores."""
    if scores is None:
        return tl.full(pair.shape, float("inf"), tl.float64)
    else:
        gain = tl.zeros(pair.shape, tl.float64)
        total = tl.zeros(pair.shape, tl.float64)
        for start in range(0, K, OBJECTIVES):
            for i in tl.static_range(OBJECTIVES):
                k = tl.minimum(tl.full([], start + i, tl.int64), K - 1)
                weight = tl.load(objectives + k).to(tl.float64)
                # 0 past the last objective; [BLOCK], as the interpreter cannot broadcast a comparison of scalars
                weight = tl.zeros(pair.shape, tl.float64) + tl.where(k == start + i, weight, 0.0)
                strength = tl.load(objectives + K + k).to(tl.float64)
                a = tl.load(scores + first * K + k, mask=valid, other=0.0).to(tl.float64)
                b = tl.load(scores + second * K + k, mask=valid, other=0.0).to(tl.float64)
                difference = a - b
                if conditions is not None:
                    c = tl.load(conditions + pair * K + k, mask=valid, other=0.0).to(tl.float64)
                    nearer = strength * (tl.abs(b - c) - tl.abs(a - c))
                    difference = tl.where(c == c, nearer, difference)
                rated = (a == a) & (b == b) & (weight > 0.0)
                # + 0.0 rounds the product, which an fma would not do: gains that cancel must give exactly 0.
                gain += tl.where(rated, weight * difference + 0.0, 0.0)
                total += tl.where(rated, weight, 0.0)
        return tl.where(total > 0.0, gain / tl.where(total > 0.0, total, 1.0), float("nan"))


@triton.jit
def load_pairs(pairs, pair, P):
    first = tl.load(pairs + 2 * pair, mask=pair < P, other=-1)
    second = tl.load(pairs + 2 * pair + 1, mask=pair < P, other=-1)
    return first, second


@triton.jit
def orient(scores, conditions, objectives, pair, first, second, P, S, K, tie_margin):
    """A pair with a sequence outside [0, S) is not a tie; its log-probs make it NaN (`load_sequence`)."""
    valid = (first >= 0) & (first < S) & (second >= 0) & (second < S)
    gap = value_gap(scores, conditions, objectives, pair, first, second, valid, K)
    gap = tl.where(valid, gap, float("inf"))
    live = (pair < P) & (tl.abs(gap) > tie_margin)
    swap = live & (gap < 0.0)
    return Orientation(gap, live, tl.where(swap, second, first), tl.where(swap, first, second))


@triton.jit
def load_sequence(values, sequence, S):
    """Values of sequences in float64; 0 for an absent tensor."""
    if values is None:
        return tl.zeros(sequence.shape, tl.float64)
    else:
        mask = (sequence >= 0) & (sequence < S)
        return tl.load(values + sequence, mask=mask, other=float("nan")).to(tl.float64)


@triton.jit
def load_length(lengths, sequence, S):
    """Tokens of sequences, at least 1."""
    if lengths is None:
        return tl.full(sequence.shape, 1.0, tl.float64)
    else:
        mask = (sequence >= 0) & (sequence < S)
        return tl.maximum(tl.load(lengths + sequence, mask=mask, other=1), 1).to(tl.float64)


@triton.jit
def load_pair_value(values, pair, P, otherwise):
    if values is None:
        return tl.zeros(pair.shape, tl.float64) + otherwise
    else:
        return tl.load(values + pair, mask=pair < P, other=0.0).to(tl.float64)


# --------------------------------------------------------------------------------------------------------- preference

PAIR_BLOCK = 128  # one pair per thread: the float64 functions are chains of dependent instructions
PAIR = tuning.Launch(warps=4, vectors=0, registers=168)
SEQUENCE_BLOCK = 8  # a thread holds a float64 term of its pair for each of them: 16 spill with a list of 8 losses
MANY_SEQUENCES = 1024  # 128 programs, one for nearly every multiprocessor; beyond, a program takes 256 sequences
MAX_LOSSES = 8  # weights are run-time arguments, so their number is fixed
_NLL_TYPES = {"sft", "orpo", "contrastive_cpo"}


@triton.jit(do_not_specialize=["P", "S", "K"])
def preference_kernel(
    # inputs; all but seq_logps and pairs may be None
    seq_logps,
    ref_logps,
    lengths,
    pairs,
    scores,
    conditions,
    objectives,
    pair_weights,
    pair_betas,
    margins,
    extra,  # [3, P]: loss and gradient of every pair from aot
    # outputs
    loss,
    losses,
    grad,
    chosen_rewards,
    rejected_rewards,
    gaps,
    order,
    counts,
    # sizes
    P: "i64",
    S: "i64",
    K: "i64",
    # numbers
    num_pairs: "fp64",
    chosen_tokens: "fp64",
    beta: "fp64",
    label_smoothing: "fp64",
    tau: "fp64",
    margin: "fp64",
    tie_margin: "fp64",
    f_alpha: "fp64",
    discopop_tau: "fp64",
    simpo_gamma: "fp64",
    alphapo_alpha: "fp64",
    nll_alpha: "fp64",
    modpo_weight: "fp64",
    weight_0: "fp64",
    weight_1: "fp64",
    weight_2: "fp64",
    weight_3: "fp64",
    weight_4: "fp64",
    weight_5: "fp64",
    weight_6: "fp64",
    weight_7: "fp64",
    # compile-time choices
    TYPES: tl.constexpr,  # names of the losses, without aot's
    F_DIVERGENCE: tl.constexpr,
    REWARD: tl.constexpr,  # "ratio": beta (L - ref), "sum": beta L, "mean": beta L / n
    PAIR_BLOCK: tl.constexpr,
    SEQUENCE_BLOCK: tl.constexpr,
    SEQUENCE_BLOCKS: tl.constexpr,
):
    """A single launch. Program `pid` writes the losses and metrics of its own block of pairs, and the gradient of
    SEQUENCE_BLOCKS blocks of sequences.

    Each program reads all pairs. It computes the terms of a block of pairs if that is its own or contains a pair of its
    sequences; program 0, which sums the loss, computes all blocks. So programs do not communicate.
    """
    pid = tl.program_id(0)
    o = Options(
        tl.full([], beta, tl.float64),
        tl.full([], label_smoothing, tl.float64),
        tl.full([], tau, tl.float64),
        tl.full([], margin, tl.float64),
        tl.full([], tie_margin, tl.float64),
        tl.full([], f_alpha, tl.float64),
        tl.full([], discopop_tau, tl.float64),
        tl.full([], simpo_gamma, tl.float64),
        tl.full([], alphapo_alpha, tl.float64),
        tl.full([], nll_alpha, tl.float64),
        tl.full([], modpo_weight, tl.float64),
    )
    weights = (weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, weight_7)
    lanes = tl.arange(0, PAIR_BLOCK).to(tl.int64)
    pair_blocks = (P + PAIR_BLOCK - 1) // PAIR_BLOCK

    # The divisors: non-tied pairs and tokens of the chosen responses, unless given.
    live_count = tl.zeros([PAIR_BLOCK], tl.int64)
    token_count = tl.zeros([PAIR_BLOCK], tl.int64)
    if (num_pairs < 0.0) | (chosen_tokens < 0.0):
        for block in range(pair_blocks):
            pair = block * PAIR_BLOCK + lanes
            first, second = load_pairs(pairs, pair, P)
            who = orient(scores, conditions, objectives, pair, first, second, P, S, K, o.tie_margin)
            live_count += who.live.to(tl.int64)
            if lengths is not None:
                mask = who.live & (who.chosen >= 0) & (who.chosen < S)
                token_count += tl.load(lengths + who.chosen, mask=mask, other=0)
    own_pairs = tl.sum(live_count).to(tl.float64)
    own_tokens = tl.sum(token_count).to(tl.float64)
    divisor = tl.full([], num_pairs, tl.float64)
    divisor = tl.where(divisor < 0.0, own_pairs, divisor)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    tokens = tl.full([], chosen_tokens, tl.float64)
    tokens = tl.where(tokens < 0.0, own_tokens, tokens)
    nll_scale = divisor / tl.where(tokens < 1.0, 1.0, tokens)

    base = pid.to(tl.int64) * (SEQUENCE_BLOCK * SEQUENCE_BLOCKS)
    rows = tl.arange(0, SEQUENCE_BLOCK)
    groups = tl.arange(0, SEQUENCE_BLOCKS)
    sums = tl.zeros([SEQUENCE_BLOCKS, SEQUENCE_BLOCK], tl.float64)
    loss_sum = tl.zeros([PAIR_BLOCK], tl.float64)
    live_count = tl.zeros([PAIR_BLOCK], tl.int64)
    unrated_count = tl.zeros([PAIR_BLOCK], tl.int64)
    for block in range(pair_blocks):
        pair = block * PAIR_BLOCK + lanes
        first, second = load_pairs(pairs, pair, P)
        at_first = first - base
        at_second = second - base
        width = SEQUENCE_BLOCK * SEQUENCE_BLOCKS
        touches = ((at_first >= 0) & (at_first < width)) | ((at_second >= 0) & (at_second < width))
        if (pid == 0) | (pid == block) | (tl.max(touches.to(tl.int32)) > 0):
            who = orient(scores, conditions, objectives, pair, first, second, P, S, K, o.tie_margin)
            chosen = load_sequence(seq_logps, who.chosen, S)
            rejected = load_sequence(seq_logps, who.rejected, S)
            chosen_ref = load_sequence(ref_logps, who.chosen, S)
            rejected_ref = load_sequence(ref_logps, who.rejected, S)
            pair_beta = load_pair_value(pair_betas, pair, P, o.beta)
            p = Pairs(
                chosen,
                rejected,
                chosen - chosen_ref,
                rejected - rejected_ref,
                score(chosen - chosen_ref, o.f_alpha, F_DIVERGENCE),
                score(rejected - rejected_ref, o.f_alpha, F_DIVERGENCE),
                load_length(lengths, who.chosen, S),
                load_length(lengths, who.rejected, S),
                load_sequence(margins, who.chosen, S),
                load_sequence(margins, who.rejected, S),
                pair_beta,
                tl.abs(who.gap),
                nll_scale,
            )
            value = tl.zeros([PAIR_BLOCK], tl.float64)
            to_chosen = tl.zeros([PAIR_BLOCK], tl.float64)
            to_rejected = tl.zeros([PAIR_BLOCK], tl.float64)
            for j in tl.static_range(len(TYPES)):
                term = pair_loss(TYPES, j, p, o)
                value += weights[j] * term.loss
                to_chosen += weights[j] * term.chosen
                to_rejected += weights[j] * term.rejected
            if pair_weights is not None:
                pair_weight = load_pair_value(pair_weights, pair, P, 1.0)
                value *= pair_weight
                to_chosen *= pair_weight
                to_rejected *= pair_weight
            if extra is not None:
                value += load_pair_value(extra, pair, P, 0.0)
                to_chosen += load_pair_value(extra + P, pair, P, 0.0)
                to_rejected += load_pair_value(extra + 2 * P, pair, P, 0.0)
            # Terms of a tie are discarded: they may be NaN.
            value = tl.where(who.live, value, 0.0)
            to_chosen = tl.where(who.live, to_chosen, 0.0)
            to_rejected = tl.where(who.live, to_rejected, 0.0)
            inside = pair < P
            sign = tl.where(who.live, tl.where(who.gap < 0.0, -1, 1), 0)
            to_first = tl.where(sign < 0, to_rejected, to_chosen)
            to_second = tl.where(sign < 0, to_chosen, to_rejected)

            loss_sum += value
            live_count += who.live.to(tl.int64)
            unrated_count += (inside & (who.gap != who.gap)).to(tl.int64)
            for group in range(SEQUENCE_BLOCKS):
                row = (group * SEQUENCE_BLOCK + rows).to(tl.int64)[:, None]  # [SEQUENCE_BLOCK, 1]
                part = tl.where(at_first[None, :] == row, to_first[None, :], 0.0)
                part += tl.where(at_second[None, :] == row, to_second[None, :], 0.0)
                sums += tl.where(groups[:, None] == group, tl.sum(part, axis=1)[None, :], 0.0)

            if pid == block:
                chosen_reward = chosen
                rejected_reward = rejected
                if REWARD == "ratio":
                    chosen_reward = p.chosen_ratio
                    rejected_reward = p.rejected_ratio
                if REWARD == "mean":
                    chosen_reward = chosen / p.chosen_length
                    rejected_reward = rejected / p.rejected_length
                tl.store(losses + pair, value, mask=inside)
                tl.store(chosen_rewards + pair, pair_beta * chosen_reward, mask=inside)
                tl.store(rejected_rewards + pair, pair_beta * rejected_reward, mask=inside)
                tl.store(gaps + pair, who.gap, mask=inside)
                tl.store(order + pair, sign, mask=inside)

    sequence = base + groups[:, None] * SEQUENCE_BLOCK + rows[None, :]
    tl.store(grad + sequence, sums / divisor, mask=sequence < S)
    if pid == 0:
        live = tl.sum(live_count)
        tl.store(loss, tl.sum(loss_sum) / divisor)
        tl.store(counts, live)
        tl.store(counts + 1, P - live)
        tl.store(counts + 2, tl.sum(unrated_count))


# ---------------------------------------------------------------------------------------------------------------- aot


@triton.jit(do_not_specialize=["P", "S", "K"])
def aot_values_kernel(
    seq_logps,
    ref_logps,
    pairs,
    scores,
    conditions,
    objectives,
    values,  # [2, P] out: the two sides that are sorted against each other, NaN for ties
    ties,  # [P] int8 out
    P: "i64",
    S: "i64",
    K: "i64",
    tie_margin: "fp64",
    UNPAIRED: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """aot: L_w - L_l and ref_w - ref_l. aot_unpaired: r_w and r_l."""
    pair = tl.program_id(0).to(tl.int64) * PAIR_BLOCK + tl.arange(0, PAIR_BLOCK)
    first, second = load_pairs(pairs, pair, P)
    who = orient(scores, conditions, objectives, pair, first, second, P, S, K, tie_margin)
    chosen = load_sequence(seq_logps, who.chosen, S)
    rejected = load_sequence(seq_logps, who.rejected, S)
    chosen_ref = load_sequence(ref_logps, who.chosen, S)
    rejected_ref = load_sequence(ref_logps, who.rejected, S)
    high = chosen - chosen_ref if UNPAIRED else chosen - rejected
    low = rejected - rejected_ref if UNPAIRED else chosen_ref - rejected_ref
    # Canonical NaN and zero: a radix sort would distinguish their other encodings.
    high = tl.where(who.live & (high == high), high + 0.0, float("nan"))
    low = tl.where(who.live & (low == low), low + 0.0, float("nan"))
    tl.store(values + pair, high, mask=pair < P)
    tl.store(values + P + pair, low, mask=pair < P)
    tl.store(ties + pair, tl.where(who.live, 0, 1), mask=pair < P)


@triton.jit(do_not_specialize=["P"])
def aot_terms_kernel(
    values,
    ties,
    live_first,  # [P]: the pairs, the non-tied first
    ranks,  # [2, P]: the pairs in ascending order of either side, ties last
    pair_weights,
    pair_betas,
    extra,  # [3, P] out
    P: "i64",
    beta: "fp64",
    label_smoothing: "fp64",
    loss_weight: "fp64",
    UNPAIRED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """The k-th loss belongs to the pair of the k-th upper value; its gradient goes to the pairs of both sorted values.

    Every rank is a permutation of the pairs: each element of `extra` is written by exactly one k.
    """
    k = tl.program_id(0).to(tl.int64) * PAIR_BLOCK + tl.arange(0, PAIR_BLOCK)
    inside = k < P
    pair = tl.load(live_first + k, mask=inside, other=0)
    live = tl.load(ties + pair, mask=inside, other=1) == 0
    at_high = tl.load(ranks + k, mask=inside, other=0)
    at_low = tl.load(ranks + P + k, mask=inside, other=0)
    high = tl.load(values + at_high, mask=inside, other=0.0)
    low = tl.load(values + P + at_low, mask=inside, other=0.0)
    pair_beta = load_pair_value(pair_betas, pair, P, beta)
    q = 1.0 - tl.full([], label_smoothing, tl.float64)
    term = smoothed(pair_beta * (high - low), q)
    scale = load_pair_value(pair_weights, at_high, P, 1.0) * loss_weight
    value = tl.where(live, scale * term.value, 0.0)
    slope = tl.where(live, scale * term.slope * pair_beta, 0.0)
    at_value = extra + at_high
    at_chosen = extra + P + at_high
    at_rejected = extra + 2 * P + (at_low if UNPAIRED else at_high)
    to_rejected = -slope
    if ACCUMULATE:
        value += tl.load(at_value, mask=inside, other=0.0)
        to_rejected += tl.load(at_rejected, mask=inside, other=0.0)
        slope += tl.load(at_chosen, mask=inside, other=0.0)
    tl.store(at_value, value, mask=inside)
    tl.store(at_chosen, slope, mask=inside)
    tl.store(at_rejected, to_rejected, mask=inside)


# ---------------------------------------------------------------------------------------------------------- launchers


class _Batch(NamedTuple):
    """The tensors of `preference`; None where absent."""

    seq_logps: Tensor
    ref_logps: Tensor | None
    lengths: Tensor | None
    pairs: Tensor
    scores: Tensor | None
    conditions: Tensor | None
    objectives: Tensor | None
    pair_weights: Tensor | None
    pair_betas: Tensor | None
    margins: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """P, S, K"""
        return self.pairs.shape[0], self.seq_logps.shape[0], 0 if self.scores is None else self.scores.shape[1]


def _aot_terms(b: _Batch, weights: dict[str, float], option: dict[str, float]) -> Tensor | None:
    """[3, P]: loss and gradient of every pair from aot and aot_unpaired, before the divisor; None without them."""
    count = b.sizes[0]
    if not weights or not count:
        return None
    grid = (triton.cdiv(count, PAIR_BLOCK),)
    extra = b.seq_logps.new_empty(3, count, dtype=torch.float64)
    for i, (name, weight) in enumerate(weights.items()):
        unpaired = name == "aot_unpaired"
        values, ties = torch.empty_like(extra[:2]), extra.new_empty(count, dtype=torch.int8)
        ratings = (b.pairs, b.scores, b.conditions, b.objectives)
        sides = (b.seq_logps, b.ref_logps, *ratings, values, ties)
        aot_values_kernel[grid](*sides, *b.sizes, option["tie_margin"], unpaired, PAIR_BLOCK, **tuning.options(SUM))
        live_first = torch.sort(ties, stable=True).indices
        ranks = live_first[torch.sort(values[:, live_first], stable=True).indices]  # [2, P]
        numbers = (count, option["beta"], option["label_smoothing"], weight)
        aot_terms_kernel[grid](
            values,
            ties,
            live_first,
            ranks,
            b.pair_weights,
            b.pair_betas,
            extra,
            *numbers,
            unpaired,
            i > 0,
            PAIR_BLOCK,
            **tuning.options(SUM),
        )
    return extra


def preference(
    seq_logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    scores: Tensor,
    conditions: Tensor,
    objectives: Tensor,
    pair_weights: Tensor,
    pair_betas: Tensor,
    margins: Tensor,
    loss_types: Sequence[int],
    loss_weights: Sequence[float],
    options: Sequence[float],
    num_pairs: float,
    chosen_tokens: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.preference`. One launch; each of aot and aot_unpaired adds two small ones and two sorts.

    Raises ValueError for more than MAX_LOSSES different loss types.
    """
    names = [list(LOSS_TYPES)[index] for index in loss_types]
    weights = {name: 0.0 for name in names}  # a type that is listed twice counts with both weights
    for name, weight in zip(names, loss_weights, strict=True):
        weights[name] += weight
    coupled = {name: weights.pop(name) for name in tuple(weights) if LOSS_TYPES[name].couples_batch}
    if len(weights) > MAX_LOSSES:
        raise ValueError(
            f"the Triton kernel combines at most {MAX_LOSSES} loss types, got {len(weights)} ({', '.join(weights)}): "
            "use another impl, or sum two losses"
        )
    option = dict(zip(OPTIONS, options, strict=True))
    batch = _Batch(
        seq_logps.contiguous(),
        _given(ref_logps),
        _given(lengths),
        pairs.contiguous(),
        _given(scores),
        _given(conditions),
        _given(objectives),
        _given(pair_weights),
        _given(pair_betas),
        _given(margins),
    )
    count, num_sequences, _ = batch.sizes
    if batch.scores is None and num_pairs < 0:
        num_pairs = float(count)  # nothing to count: no pair is a tie
    if not _NLL_TYPES & weights.keys():
        chosen_tokens = 1.0  # not used, so not counted

    groups = 1 if num_sequences <= MANY_SEQUENCES else 32
    programs = max(1, triton.cdiv(count, PAIR_BLOCK), triton.cdiv(num_sequences, SEQUENCE_BLOCK * groups))
    per_pair = [seq_logps.new_empty(count) for _ in range(4)]
    losses, chosen_rewards, rejected_rewards, gaps = per_pair
    loss, grad = seq_logps.new_empty(()), seq_logps.new_empty(num_sequences)
    order, counts = pairs.new_empty(count, dtype=torch.int8), pairs.new_empty(3)
    numbers = [float(option[name]) for name in OPTIONS if name != "f_divergence"]
    padded = [*weights.values(), *[0.0] * (MAX_LOSSES - len(weights))]
    with _device_of(seq_logps):
        preference_kernel[(programs,)](
            *batch,
            _aot_terms(batch, coupled, option),
            *(loss, losses, grad, chosen_rewards, rejected_rewards, gaps, order, counts),
            *batch.sizes,
            *(float(num_pairs), float(chosen_tokens), *numbers, *padded),
            TYPES=tuple(weights),
            F_DIVERGENCE=int(option["f_divergence"]),
            REWARD=_reward(names),
            PAIR_BLOCK=PAIR_BLOCK,
            SEQUENCE_BLOCK=SEQUENCE_BLOCK,
            SEQUENCE_BLOCKS=groups,
            **tuning.options(PAIR),
        )
    return loss, losses, grad, chosen_rewards, rejected_rewards, gaps, order, counts


def _reward(names: Sequence[str]) -> str:
    """The factor of beta in the reported rewards: L - ref, or, if no loss needs a reference, L or L / n."""
    if any(LOSS_TYPES[name].needs_reference for name in names):
        return "ratio"
    return "mean" if any(LOSS_TYPES[name].averaged for name in names) else "sum"
