"""A vocabulary-sharded head in the public functions: this rank's plain tensors, and the gradient of hidden states."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.backends.vocab_parallel import VocabShards


class _SummedGrad(torch.autograd.Function):
    """The identity; its backward sums the ranks' parts of the gradient of the hidden states, in float32.

    A sum in bfloat16 over 4 ranks has twice the error: 0.7% against 0.3% of the largest gradient, on a head of
    24 x 101.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.to(library.acc_dtype(grad.dtype), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


def local_head(
    hidden: Any, weight: Any, bias: Any, shards: VocabShards | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShards | None]:
    """The plain tensors of this rank, and the shards if the head stays sharded. See `linear_token_logps`."""
    is_sharded, is_spread = hasattr(weight, "full_tensor"), hasattr(hidden, "full_tensor")
    if not (is_sharded or is_spread or shards):
        return hidden, weight, bias, None
    from torch.distributed.tensor import Partial, Replicate, Shard

    if is_sharded and shards:
        raise ValueError("a DTensor weight already defines its sharding: omit vocab_shards")
    if bias is not None and hasattr(bias, "full_tensor") != is_sharded:
        raise ValueError("weight and bias must both be DTensors or both be plain tensors")
    if is_sharded and not is_spread:  # this rank's own data, as under FSDP2
        weight, bias = (
            t if t is None else t.full_tensor(grad_placements=[Partial("avg")] * t.device_mesh.ndim)
            for t in (weight, bias)
        )
        return hidden, weight, bias, None
    if is_sharded:
        placements = [t.placements for t in (weight, bias) if t is not None]
        mesh = weight.device_mesh
        if mesh.ndim != 1 or any(p != (Shard(0),) for p in placements) or hidden.device_mesh != mesh:
            raise ValueError(
                "with DTensor hidden states, weight and bias must be Shard(0) on the same one-dimensional mesh, got "
                f"{placements} on {mesh} and hidden on {hidden.device_mesh}"
            )
        step = -(-weight.shape[0] // mesh.size())  # DTensor splits as torch.chunk does
        rows = [max(0, min(step, weight.shape[0] - r * step)) for r in range(mesh.size())]
        shards = VocabShards(mesh.get_group(), tuple(rows))
        weight, bias = (t if t is None else t.to_local(grad_placements=[Shard(0)]) for t in (weight, bias))
    elif is_spread and not shards:
        raise ValueError("hidden is a DTensor but weight is not: give a DTensor weight, or vocab_shards")
    assert shards is not None
    if is_spread:
        hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    else:
        hidden = _SummedGrad.apply(hidden, shards.group)
    here = shards.rows[shards.group.rank()]
    if weight.dim() == 2 and weight.shape[0] != here:
        raise ValueError(f"vocab_shards gives this rank {here} rows, but its weight has {weight.shape[0]}")
    return hidden, weight, bias, shards
