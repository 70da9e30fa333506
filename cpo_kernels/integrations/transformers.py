"""Any transformers causal LM: hidden states, head, and token log-probs without logits.

    logps = causal_lm_logps(model, batch)                                    # [S, T - 1]

    loss_fn = FusedLinearCPOLoss(beta=0.1, **lm_head(model).options)         # head, loss and gradients in one pass
    out = loss_fn(*causal_lm_inputs(model, batch), ref_logps=causal_lm_logps(reference, batch).sum(1))

A model, wrapper or adapter that is not supported raises an error; nothing is guessed. See `heads`.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import torch.nn.functional as F
from torch import Tensor, nn

from cpo_kernels.head.token_logps import linear_token_logps
from cpo_kernels.integrations.heads import (
    HEADS,
    HeadParts,
    backbone,
    causal_lm,
    head_layer,
    is_tensor_parallel,
    lm_head,
    parallel_input,
)
from cpo_kernels.ops.token_logps import TokenExtras

__all__ = [
    "HEADS",
    "CausalLMLogps",
    "HeadParts",
    "LMInputs",
    "causal_lm_inputs",
    "causal_lm_logps",
    "lm_head",
    "shift_labels",
]

# Passed to the attention layers through **kwargs, so no signature names them.
_ATTENTION_KEYS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class LMInputs(NamedTuple):
    """The first arguments of `linear_token_logps`, `linear_nll` and the fused losses, in their order.

    For a tensor-parallel head, hidden, weight and bias are DTensors.
    """

    hidden: Tensor  # [S, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [S, T], labels[:, t] is the label of position t + 1; the last column is ignored
    bias: Tensor | None  # [V]


def causal_lm_inputs(model: nn.Module, batch: Mapping[str, Any], ignore_index: int = -100) -> LMInputs:
    """Run the backbone and shift the labels. Arguments as for `causal_lm_logps`; `lm_head` gives the other options."""
    base = causal_lm(model)
    layer = head_layer(base)
    if "forward" in vars(base):
        raise ValueError(
            f"the forward of this {type(base).__name__} was replaced (accelerate's autocast or offloading, a fused "
            "head): pass accelerator.unwrap_model(model, keep_fp32_wrapper=False) under autocast, or a fresh model"
        )
    parallel = is_tensor_parallel(layer)
    if (hasattr(layer.weight, "full_tensor") and not parallel) or hasattr(layer.weight, "ds_id"):
        raise ValueError(
            "the head's weight is sharded (FSDP2 or ZeRO-3): use "
            "cpo_kernels.integrations.trl.FusedDPOTrainer, or shard CausalLMLogps(model) and call that"
        )
    if (layer._forward_hooks or layer._forward_pre_hooks) and not parallel:
        raise ValueError("the head has forward hooks, which the fused head would not run: remove them")
    batch = dict(batch)
    labels = _labels(batch, ignore_index)
    body = backbone(base)
    accepted = inspect.signature(body.forward).parameters.keys() | _ATTENTION_KEYS
    if unknown := batch.keys() - accepted:
        raise ValueError(f"batch has {', '.join(sorted(unknown))}, which {type(body).__name__} does not take")
    hidden = body(**{**batch, "use_cache": False}).last_hidden_state
    if parallel:
        hidden = parallel_input(layer, hidden)
    return LMInputs(hidden, layer.weight, shift_labels(labels, ignore_index), layer.bias)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """[S, T] -> [S, T]: position t gets the label of t + 1, the last one none."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def _labels(batch: dict[str, Any], ignore_index: int) -> Tensor:
    """Take labels or completion_mask out of `batch`."""
    labels: Tensor | None = batch.pop("labels", None)
    mask: Tensor | None = batch.pop("completion_mask", None)
    if (labels is None) == (mask is None):
        given = "both" if mask is not None else "neither"
        raise ValueError(f"batch must have either labels or completion_mask, got {given}: give one of them")
    input_ids = batch.get("input_ids")
    if labels is None:
        if input_ids is None:
            raise ValueError("completion_mask marks tokens of input_ids, but batch has no input_ids: give labels")
        labels = input_ids
    shape = (batch["inputs_embeds"] if input_ids is None else input_ids).shape[:2]
    for name, tensor in (("labels", labels), ("completion_mask", mask)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have the shape of input_ids, {list(shape)}, got {list(tensor.shape)}")
    return labels if mask is None else labels.masked_fill(mask == 0, ignore_index)


@overload
def causal_lm_logps(
    model: nn.Module, batch: Mapping[str, Any], ignore_index: int = ..., softcap: float | None = ...,
    scale: float | None = ..., vocab_size: int | None = ..., extras: Literal[False] = ...,
    memory_budget: int | None = ..., impl: str = ..., filter_eps: float | Literal["auto"] | None = ...,
    filter_head_grad: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def causal_lm_logps(
    model: nn.Module, batch: Mapping[str, Any], ignore_index: int = ..., softcap: float | None = ...,
    scale: float | None = ..., vocab_size: int | None = ..., *, extras: Literal[True],
    memory_budget: int | None = ..., impl: str = ..., filter_eps: float | Literal["auto"] | None = ...,
    filter_head_grad: bool = ...,
) -> tuple[Tensor, TokenExtras]: ...  # fmt: skip
@overload
def causal_lm_logps(
    model: nn.Module, batch: Mapping[str, Any], ignore_index: int = ..., softcap: float | None = ...,
    scale: float | None = ..., vocab_size: int | None = ..., extras: bool = ..., memory_budget: int | None = ...,
    impl: str = ..., filter_eps: float | Literal["auto"] | None = ..., filter_head_grad: bool = ...,
) -> Tensor | tuple[Tensor, TokenExtras]: ...  # fmt: skip
def causal_lm_logps(
    model: nn.Module,
    batch: Mapping[str, Any],
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float | None = None,
    vocab_size: int | None = None,
    extras: bool = False,
    memory_budget: int | None = None,
    impl: str = "auto",
    filter_eps: float | Literal["auto"] | None = None,
    filter_head_grad: bool = False,
) -> Tensor | tuple[Tensor, TokenExtras]:
    """Token log-probs of a causal LM without storing logits: column t is log p(token t + 1 | tokens 0 .. t).

    They equal those of the model's own logits, with any padding; the model derives positions as usual. A router's
    load-balancing loss (Mixtral and other mixtures of experts) is not computed.

    Args:
        model: a causal LM in `HEADS`, or a PEFT model around one (its active adapters apply). A head sharded by a
            `tp_plan` or torch's ColwiseParallel is not gathered; every rank gets the same log-probs.
        batch: `input_ids` [S, T] (or `inputs_embeds`), `attention_mask`, and either `labels` [S, T] with `ignore_index`
            where a token does not count, or `completion_mask` [S, T] with 0 there. Other keys go to the backbone.
        softcap, scale, vocab_size: see `lm_head`.
        extras, memory_budget, impl, filter_eps, filter_head_grad: see `linear_token_logps`.

    Returns:
        [S, T - 1] float32, 0 where a token does not count; with `extras` a pair of it and `TokenExtras`.

    Raises:
        TypeError, ValueError: a model, wrapper, adapter or key of the batch that is not supported.
    """
    head = lm_head(model, softcap, scale, vocab_size).options
    inputs = causal_lm_inputs(model, batch, ignore_index)
    out = linear_token_logps(
        *inputs, ignore_index, **head, extras=extras, memory_budget=memory_budget, impl=impl, filter_eps=filter_eps,
        filter_head_grad=filter_head_grad,
    )  # fmt: skip
    if isinstance(out, Tensor):
        return out[:, :-1]
    logps, token_extras = out
    return logps[:, :-1], TokenExtras(*(t[:, :-1] for t in token_extras))


class CausalLMLogps(nn.Module):
    """`causal_lm_logps` as a module, for wrappers that act in forward: `DistributedDataParallel` around this."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, **batch: Any) -> Any:
        return causal_lm_logps(self.model, batch, **self.options)
