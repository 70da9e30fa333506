"""A causal LM whose forward returns token log-probs: TRL's protocol (`add_fused_lm_head`), our head.

    model(..., labels=labels, fused_lm_head=True) -> FusedCausalLMOutput(log_probs [S, T - 1], entropy, ...)

The head runs inside the model's own forward, so whatever acts there (DDP, FSDP, ZeRO, PEFT, accelerate's autocast) acts
on it too. A sharded weight is gathered: under ZeRO-3 by TRL's `maybe_gather_lm_head_ctx`, in backward a second time; a
DTensor once, its gradient averaged over the mesh as FSDP2 does (see `linear_token_logps`). A tensor-parallel head stays
sharded.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.extras import explained

try:
    from transformers import PreTrainedModel
    from trl.trainer import utils as trl_utils
    from trl.trainer.utils import FusedCausalLMOutput
except ModuleNotFoundError as error:
    raise explained(error, __name__) from error

from cpo_kernels.head.inputs import HeadConfig, head_inputs
from cpo_kernels.head.strategy import check_filter
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
from cpo_kernels.ops.token_logps import token_extras

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def add_fused_head(
    model: PreTrainedModel,
    outputs: Sequence[str] = ("log_probs",),
    softcap: float | None = None,
    scale: float | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
    filter_eps: float | Literal["auto"] | None = None,
    filter_head_grad: bool = False,
) -> None:
    """Give `model.forward` the keyword `fused_lm_head`. Without it the forward stays what it was.

    outputs: the fields of `FusedCausalLMOutput` that are wanted, among `FIELDS`; each is [S, T - 1] and 0 where the
    label is -100 ([S, T] with `shift_labels`). A router's load-balancing loss comes as `aux_loss` where
    `output_router_logits` asks for it. softcap, scale: see `lm_head`; memory_budget, impl, filter_eps,
    filter_head_grad: see `linear_token_logps`.
    """
    if unknown := set(outputs) - set(FIELDS):
        raise ValueError(f"outputs must be among {', '.join(FIELDS)}, got {', '.join(sorted(unknown))}")
    dispatch.check_impl(impl)
    check_filter(filter_eps, filter_head_grad)
    settings = {
        "memory_budget": memory_budget, "filter_eps": filter_eps, "filter_head_grad": filter_head_grad,
    }  # fmt: skip
    head_layer(model)
    numbers = logit_map(model, softcap, scale)
    original = model.forward

    # `generate` reads the signature, inspect.unwrap the original.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None,
        shift_labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        given = {name: value for name, value in given.items() if value is not None}
        if not fused_lm_head:
            return original(*args, **given, **kwargs)
        return _forward(self, args, kwargs, labels, shift_labels, outputs, numbers, settings, impl)

    model.forward = types.MethodType(forward, model)


def _forward(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: Tensor | None,
    shifted: Tensor | None,
    outputs: Sequence[str],
    numbers: LogitMap,
    settings: dict[str, Any],
    impl: str,
) -> FusedCausalLMOutput:
    config = model.config.get_text_config()
    kwargs["use_cache"] = False
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    states = backbone(model)(*args, **kwargs)
    end = None
    if shifted is None:
        if labels is None:
            raise ValueError("fused_lm_head=True needs labels (or shift_labels)")
        shifted, end = shift_labels(labels), -1
    layer: Any = head_layer(model)
    weight, bias = layer.weight, layer.bias
    hidden = states.last_hidden_state.to(weight.device)
    shifted = shifted.to(weight.device)
    if is_tensor_parallel(layer):
        hidden = parallel_input(layer, hidden)
    with trl_utils.maybe_gather_lm_head_ctx(weight, bias):
        # As TRL, a weight of another dtype than the hidden states (a head saved in float32) is cast to theirs.
        w, b = (t if t is None or t.dtype == hidden.dtype else t.to(hidden.dtype) for t in (weight, bias))
        head = HeadConfig(-100, numbers.softcap, numbers.scale, None, **settings)
        inputs = head_inputs(hidden, w, shifted, b, head)
        extras = set(outputs) != {"log_probs"}
        function = _GatheredTokenLogps if hasattr(weight, "ds_id") else LinearTokenLogps
        logps, extra, *_ = token_logps_of(inputs, extras, impl, function=function)
    fields = {"log_probs": logps.view(shifted.shape)}
    if extras:
        e = token_extras(extra, shifted.shape)
        fields |= {"entropy": e.entropy, "log_sum_sq_probs": e.log_sum_sq_probs}
        fields |= {"mean_logits": e.mean_logit, "is_top1": e.is_top1}
    fields = {name: fields[name][:, :end] for name in outputs}
    aux_loss = _aux_loss(states, config, kwargs) if kwargs.get("output_router_logits") else None
    return FusedCausalLMOutput(**fields, label_mask=(shifted != -100)[:, :end], aux_loss=aux_loss)


class _GatheredTokenLogps(LinearTokenLogps):
    """ZeRO-3 takes the weight away after forward; recomputed logits need it once more."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors[2:4]  # none where the head is frozen
        with trl_utils.maybe_gather_lm_head_ctx(*(w for w in weights if hasattr(w, "ds_id"))):
            return LinearTokenLogps.backward(ctx, grad, *_)


def _aux_loss(states: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(
        states.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
