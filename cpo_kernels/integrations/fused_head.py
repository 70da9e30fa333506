"""A causal LM whose forward returns token log-probs: the protocol of TRL's `add_fused_lm_head`, our head.

    model(..., labels=labels, fused_lm_head=True) -> FusedCausalLMOutput(loss, log_probs [S, T - 1], entropy, ...)

The head runs inside the model's own forward, so wrappers that act there (DDP, FSDP, ZeRO, PEFT, accelerate's autocast)
act on it too. A sharded weight is gathered: under ZeRO-3 in forward and again in backward; a DTensor once, and
its gradient is averaged over the mesh as FSDP2 does (see `linear_token_logps`). A tensor-parallel head stays sharded.
"""

import functools
import math
import types
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.extras import explained

try:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput
except ModuleNotFoundError as error:
    raise explained(error, __name__) from error

from cpo_kernels.head.inputs import HeadConfig, HeadInputs, head_inputs
from cpo_kernels.head.strategy import budget_rows, check_filter
from cpo_kernels.head.token_logps import LinearTokenLogps, token_logps_of
from cpo_kernels.integrations.heads import (
    LogitMap,
    backbone,
    head_layer,
    is_tensor_parallel,
    logit_map,
    parallel_input,
)
from cpo_kernels.integrations.transformers import shift_labels
from cpo_kernels.ops.token_logps import head_options, token_extras

EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FIELDS = ("log_probs", *EXTRAS, "sequence_mean_logits")


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """TRL's output of the same name, and `sequence_mean_logits`. See `add_fused_head`."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None  # [S, T - 1]
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None  # whether the label is not -100
    aux_loss: Tensor | None = None
    sequence_mean_logits: Tensor | None = None  # [S]


def check_options(
    softcap: float | None = None,
    scale: float | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
    filter_eps: float | Literal["auto"] | None = None,
    filter_head_grad: bool = False,
) -> None:
    """Raise for invalid options, before a trainer is built with them."""
    dispatch.check_impl(impl)
    head_options(1, -100, softcap, 1.0 if scale is None else scale, None)
    budget_rows(1, torch.float32, torch.device("cpu"), memory_budget)
    check_filter(filter_eps, filter_head_grad)


def add_fused_head(
    model: PreTrainedModel,
    outputs: Sequence[str] = ("log_probs",),
    softcap: float | None = None,
    scale: float | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
    filter_eps: float | Literal["auto"] | None = None,
    filter_head_grad: bool = False,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
) -> None:
    """Give `model.forward` the keyword `fused_lm_head`. Calls without it behave as before.

    outputs: the requested fields of `FusedCausalLMOutput`, a subset of `FIELDS`; each is [S, T - 1] ([S, T] with
        `shift_labels`) and 0 where the label is -100. `log_probs` is always included; it and `entropy` have gradients.
        `sequence_mean_logits` [S] is the mean logit of all positions, labelled or not; a softcap makes it cost one
        more matrix product, on every position.
    softcap, scale: see `lm_head`; memory_budget, impl, filter_eps, filter_head_grad: see `linear_token_logps`.
    temperature: every field is computed from the model's logits / temperature.
    cast_lm_head_to_fp32: project in float32, regardless of autocast.

    The output has `loss` too: the sum of -log_probs over the labels, divided by `num_items_in_batch` or, without it, by
    the number of labels. If `output_router_logits` is set, `router_aux_loss_coef` times a router's load-balancing loss,
    `aux_loss`, is added.
    """
    if unknown := set(outputs) - set(FIELDS):
        raise ValueError(f"outputs must be among {', '.join(FIELDS)}, got {', '.join(sorted(unknown))}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    check_options(softcap, scale, memory_budget, impl, filter_eps, filter_head_grad)
    settings = {
        "memory_budget": memory_budget, "filter_eps": filter_eps, "filter_head_grad": filter_head_grad,
    }  # fmt: skip
    head_layer(model, cast_lm_head_to_fp32)
    numbers = logit_map(model, softcap, scale).over(temperature)
    fused = FusedHead(("log_probs", *outputs), cast_lm_head_to_fp32, numbers, settings, impl)
    original = model.forward
    method = getattr(original, "__func__", None) if getattr(original, "__self__", None) is model else None

    # `generate` reads the signature; inspect.unwrap finds the original.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None,
        shift_labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            # `self` may be a deep copy of `model`, as reference models are made
            own = original if method is None else types.MethodType(method, self)
            return own(*args, **given, **kwargs)
        return fused(self, args, kwargs, labels, shift_labels, num_items_in_batch)

    model.forward = types.MethodType(forward, model)


@dataclass(frozen=True)
class FusedHead:
    """What `forward` runs with `fused_lm_head=True`; the head itself is looked up in each call."""

    outputs: tuple[str, ...]
    in_float32: bool
    numbers: LogitMap
    settings: dict[str, Any]
    impl: str

    def __call__(
        self,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        labels: Tensor | None,
        shifted: Tensor | None,
        num_items: Any,
    ) -> FusedCausalLMOutput:
        config = model.config.get_text_config()
        kwargs["use_cache"] = False
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        end = None
        if shifted is None:
            if labels is None:
                raise ValueError("fused_lm_head=True needs labels (or shift_labels)")
            shifted, end = shift_labels(labels), -1
        states = backbone(model)(*args, **kwargs)
        layer: Any = head_layer(model, self.in_float32)
        shifted = shifted.to(layer.weight.device)
        fields = self.fields(layer, states.last_hidden_state, shifted)
        fields = {name: field if field.dim() == 1 else field[:, :end] for name, field in fields.items()}
        mask = (shifted != -100)[:, :end]
        loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = _aux_loss(states, config, kwargs)
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, **fields, label_mask=mask, aux_loss=aux_loss)

    def fields(self, layer: Any, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The requested fields [S, T] from hidden [S, T, H] and shifted labels [S, T]."""
        weight, bias = layer.weight, layer.bias
        hidden = hidden.to(weight.device)
        if is_tensor_parallel(layer):
            hidden = parallel_input(layer, hidden)
        hidden = hidden.float() if self.in_float32 else hidden
        no_autocast = torch.autocast(hidden.device.type, enabled=False) if self.in_float32 else nullcontext()
        with no_autocast, gathered(weight, bias):
            # As in TRL, a weight whose dtype differs (a head saved in float32) is cast to that of the hidden states.
            w, b = (t if t is None or t.dtype == hidden.dtype else t.to(hidden.dtype) for t in (weight, bias))
            head = HeadConfig(-100, self.numbers.softcap, self.numbers.scale, None, **self.settings)
            inputs = head_inputs(hidden, w, labels, b, head)
            extras = not set(EXTRAS).isdisjoint(self.outputs)
            function = _GatheredTokenLogps if hasattr(weight, "ds_id") else LinearTokenLogps
            logps, extra, *_ = token_logps_of(inputs, extras, self.impl, function=function)
            fields = {"log_probs": logps.view(labels.shape)}
            if "sequence_mean_logits" in self.outputs:
                fields["sequence_mean_logits"] = self.sequence_mean_logits(inputs, labels)
        if extras:
            e = token_extras(extra, labels.shape)
            fields |= {"entropy": e.entropy, "log_sum_sq_probs": e.log_sum_sq_probs}
            fields |= {"mean_logits": e.mean_logit, "is_top1": e.is_top1}
        return {name: fields[name] for name in self.outputs}

    @torch.no_grad()
    def sequence_mean_logits(self, inputs: HeadInputs, labels: Tensor) -> Tensor:
        """[S], from labels [S, T]. Without a softcap the mean over the vocabulary is that of the weight's rows."""
        hidden, weight, bias, _ = inputs.tensors
        if inputs.options.softcap or inputs.shards is not None:
            tensors = inputs.tensors._replace(labels=torch.zeros_like(inputs.tensors.labels))
            _, extra, *_ = token_logps_of(replace(inputs, tensors=tensors), True, self.impl)
            return token_extras(extra, labels.shape).mean_logit.mean(1)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        means = (hidden.view(*labels.shape, -1).mean(1, dtype=dtype) * weight.mean(0, dtype=dtype)).sum(1)
        return inputs.options.scale * (means + bias.mean(dtype=dtype) if bias.numel() else means)


def gathered(*params: Any) -> AbstractContextManager[Any]:
    """The whole parameters, where ZeRO-3 has them partitioned; one that is tied to an embedding in use is not."""
    apart = {id(p): p for p in params if hasattr(p, "ds_status") and p.ds_status.name != "AVAILABLE"}
    if not apart:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(apart.values()))
    return context


class _GatheredTokenLogps(LinearTokenLogps):
    """ZeRO-3 releases the weight after forward; recomputing the logits needs it again."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        again = of_entropy is not None or not ctx.made_dx or any(ctx.needs_input_grad[1:3])  # not for a frozen head
        weights = ctx.saved_tensors[3:5] if again else ()
        with gathered(*weights):
            return LinearTokenLogps.backward(ctx, grad, of_entropy, *_)


def _aux_loss(states: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        states.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
