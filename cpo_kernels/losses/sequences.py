"""The sequences of a fused loss: where they are among a batch's rows, and what a reference model gives for them."""

from typing import NamedTuple

import torch
from torch import Tensor

from cpo_kernels.backends.vocab_parallel import VocabShards
from cpo_kernels.head.inputs import HeadConfig, HeadInputs, head_inputs
from cpo_kernels.head.token_logps import token_logps_of
from cpo_kernels.ops.sequence_logps import check_cu_seqlens


class PolicyHead(NamedTuple):
    """The policy's head as the caller gave it."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    vocab_shards: VocabShards | None


class ReferenceModel(NamedTuple):
    """The reference model as the caller gave it."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logps: Tensor | None


class ReferenceRows(NamedTuple):
    """Of a reference model's hidden states: rows for the policy's head where that is its head too, or log-probs."""

    hidden: Tensor | None = None  # [M, H]
    token_logps: Tensor | None = None  # [M]


def reference_rows(
    inputs: HeadInputs,
    policy: PolicyHead,
    given: ReferenceModel,
    config: HeadConfig,
    impl: str,
    index: Tensor | None = None,
) -> ReferenceRows:
    """Neither where `given` has no hidden states. index: see `linear_token_logps`."""
    if given.hidden is None:
        if given.weight is not None or given.bias is not None:
            raise ValueError("ref_weight and ref_bias only apply with ref_hidden")
        return ReferenceRows()
    if given.logps is not None:
        raise ValueError("give ref_logps or ref_hidden, not both")
    if given.hidden.shape[:-1] != policy.hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden must have shape {list(policy.hidden.shape[:-1])} + [H], got {list(given.hidden.shape)}"
        )
    bias = policy.bias if given.weight is None and given.bias is None else given.bias
    weight = policy.weight if given.weight is None else given.weight
    with torch.no_grad():
        if weight is policy.weight and bias is policy.bias:
            own = inputs.tensors  # already in the dtype of the products
            bias = own.bias if own.bias.numel() else None
            ref = head_inputs(given.hidden, own.weight, policy.labels, bias, config, inputs.shards)
            return ReferenceRows(hidden=ref.tensors.hidden)
        ref = head_inputs(given.hidden, weight, policy.labels, bias, config, policy.vocab_shards)
        return ReferenceRows(token_logps=token_logps_of(ref, False, impl, index)[0])


def sequence_offsets(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[S + 1] offsets of the sequences in the flattened rows: given for packed input, multiples of T for padded."""
    if labels.dim() == 2 and cu_seqlens is None:
        num_sequences, length = labels.shape
        return torch.arange(num_sequences + 1, device=hidden.device) * length
    if labels.dim() == 1 and cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, labels.shape[0])
        return cu_seqlens.to(hidden.device)
    raise ValueError(
        "give padded hidden [S, T, H] with labels [S, T], or packed hidden [N, H] with labels [N] and cu_seqlens "
        f"[S + 1]; got labels {list(labels.shape)} {'without' if cu_seqlens is None else 'with'} cu_seqlens"
    )


def label_counts(labels: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """[S] labelled rows of each sequence."""
    labelled = (labels != ignore_index).long()
    before = torch.cat([labelled.new_zeros(1), labelled.cumsum(0)])
    return before[cu_seqlens].diff()
