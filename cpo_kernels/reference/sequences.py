"""Sequence log-probs, and weights that depend on tokens."""

import torch
from torch import Tensor


def sequence_logps(
    token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None = None, average: bool = False
) -> Tensor:
    """L_s = sum_{t in s} m_t logp_t, summed in float64, in the dtype of `token_logps`; differentiable.

    token_logps `[N]`, cu_seqlens `[S + 1]` (sequence s is `[cu[s], cu[s + 1])`), token_weights m `[N]` ->
    `[S]`. `average` divides by the number of tokens; a sequence without tokens gives 0.
    """
    weighted = token_logps.double() if token_weights is None else token_logps.double() * token_weights.double()
    lengths = cu_seqlens.diff().to(weighted.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=weighted.device), lengths)  # [N]
    total = weighted.new_zeros(len(lengths)).index_add(0, sequence, weighted)
    if average:
        total = total / lengths.clamp(min=1)
    return total.to(token_logps.dtype)


def sequence_sum(token_logps: Tensor, cu_seqlens: Tensor, token_weights: Tensor, average: bool) -> Tensor:
    """`sequence_logps` with the kernel's signature."""
    weights = token_weights if token_weights.numel() else None
    return sequence_logps(token_logps.detach(), cu_seqlens, weights, average)


def ld_token_weights(cu_seqlens: Tensor, pairs: Tensor, ld_alpha: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """LD-DPO's token weights `[N]`: 1 up to the length of the pair's shorter response, `ld_alpha` after it.

    Liu et al. 2024 (arXiv 2409.06411), as TRL's `ld_alpha`. The weights belong to a pair. A response in several
    pairs with different shared lengths would need several weights: this raises ValueError. A response in no pair
    has weight 1.
    """
    lengths = cu_seqlens.diff()
    shared = lengths.clone()
    shortest = lengths[pairs].amin(1, keepdim=True).expand(-1, 2)  # [P, 2]
    shared[pairs] = shortest
    if bool((shared[pairs] != shortest).any()):
        pair = int((shared[pairs] != shortest).any(1).nonzero()[0])
        raise ValueError(
            f"ld_alpha: pair {pair} {pairs[pair].tolist()} shares a response with a pair whose shorter response has "
            "another length; ld_alpha needs every response to be in pairs of one shared length"
        )
    position = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    position = position - torch.repeat_interleave(cu_seqlens[:-1], lengths)
    one = torch.ones((), dtype=dtype, device=cu_seqlens.device)
    return torch.where(position < torch.repeat_interleave(shared, lengths), one, ld_alpha)


def wpo_pair_weights(token_logps: Tensor, log_sum_sq: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    """WPO's weight of each pair, float64 `[P]`, without gradient:

        w(y) = exp( mean_t (logp_t - log sum_v p_{t,v}^2) ),   pair weight = w(a) * w(b)

    Zhou et al. 2024 (arXiv 2406.11827) eq. 2 with sampled alignment, as TRL's `use_weighting`.
    """
    aligned = token_logps.detach().double() - log_sum_sq.detach().double()
    return sequence_logps(aligned, cu_seqlens, average=True).exp()[pairs].prod(1)
