"""The output projection of a transformers causal LM: its weight, and what the model does to x W^T + b.

What a model does between its last hidden state and its logits is known only for the classes in `HEADS`. Every other
model raises an error, unless the caller specifies it with `softcap=` and `scale=`.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpo_kernels.extras import explained

try:
    from transformers import PreTrainedModel
except ModuleNotFoundError as error:
    raise explained(error, __name__) from error

# ------------------------------------------------------------------------------------------- what each model does


class LogitMap(NamedTuple):
    """logits = softcap * tanh(scale * (x W^T + b) / softcap)."""

    softcap: float | None = None
    scale: float = 1.0

    def over(self, temperature: float) -> "LogitMap":
        """The map that gives logits / temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return LogitMap(softcap, self.scale / temperature)


def _plain(model: Any) -> LogitMap:
    return LogitMap()


def _gemma(model: Any) -> LogitMap:
    return LogitMap(softcap=model.config.final_logit_softcapping)


def _recurrent_gemma(model: Any) -> LogitMap:
    return LogitMap(softcap=model.config.logits_soft_cap)


def _cohere(model: Any) -> LogitMap:
    return LogitMap(scale=model.logit_scale)


def _divided(model: Any) -> LogitMap:  # MiniCPM3 divides the hidden state: equivalent, as its head has no bias
    return LogitMap(scale=1 / model.config.logits_scaling)


def _hyperclovax(model: Any) -> LogitMap:
    return LogitMap(scale=model.config.logits_scaling)


def _falcon_h1(model: Any) -> LogitMap:
    return LogitMap(scale=model.model.lm_head_multiplier)


_CLASSES: dict[Callable[[Any], LogitMap], str] = {
    _plain: "Afmoe Apertus Arcee Bloom Cwm DeepseekV2 DeepseekV3 Dots1 Ernie4_5 Ernie4_5_Moe Exaone4 ExaoneMoe Falcon "
    "FlexOlmo GPTBigCode GPTJ GPTNeo GPTNeoX Gemma Glm Glm4 Glm4Moe Glm4MoeLite GptOss Helium HunYuanDenseV1 Jais2 "
    "Lfm2 Llama Llama4 MiniMaxM2 Ministral Ministral3 Mistral Mixtral Mpt Nemotron OPT Olmo Olmo2 Olmo3 OlmoHybrid "
    "Olmoe Persimmon Phi Phi3 Phimoe Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next Qwen3_5 Qwen3_5Moe SeedOss SmolLM3 "
    "StableLm Starcoder2",
    _gemma: "Gemma2 Gemma3 Gemma4 NanoChat VaultGemma",
    _recurrent_gemma: "RecurrentGemma",
    _cohere: "Cohere Cohere2 Cohere2Moe",
    _divided: "Granite GraniteMoe GraniteMoeShared MiniCPM3",
    _hyperclovax: "HyperCLOVAX",
    _falcon_h1: "FalconH1",
}
# Class name -> what its forward does. tests/integrations/test_causal_lm.py tests each row against the model's logits.
HEADS: dict[str, Callable[[Any], LogitMap]] = {
    "GPT2LMHeadModel": _plain,
    **{f"{name}ForCausalLM": rule for rule, names in _CLASSES.items() for name in names.split()},
}


def logit_map(model: PreTrainedModel, softcap: float | None = None, scale: float | None = None) -> LogitMap:
    """What `model` does to x W^T + b: `softcap` and `scale` if either is given, else according to `HEADS`."""
    if softcap is not None or scale is not None:
        return LogitMap(softcap, 1.0 if scale is None else scale)
    mro: tuple[Any, ...] = type(model).__mro__
    for cls in mro:  # FSDP2 puts a class of its own before the model's
        if cls.__name__ in HEADS and cls.__module__.startswith("transformers.models."):
            forward = inspect.unwrap(type(model).forward)
            if forward is inspect.unwrap(cls.forward) and forward.__module__ == cls.__module__:
                return HEADS[cls.__name__](model)
            raise ValueError(
                f"{type(model).__name__} replaces the forward of {cls.__name__}: what it does to its logits is not "
                "known. Specify it with softcap= and scale= (scale=1.0 for a plain head)"
            )
    raise ValueError(
        f"{type(model).__module__}.{type(model).__name__} (model_type {model.config.model_type!r}) is not in the "
        "table of models whose logits are softcap * tanh(scale * (x W^T + b) / softcap). If its logits have that form, "
        "give softcap= and scale= (scale=1.0 for a plain head); if not, pass its logits to cpo_kernels.token_logps"
    )


# ------------------------------------------------------------------------------------------- the head


class HeadParts(NamedTuple):
    """The output projection of a model: logits = softcap * tanh(scale * (x W^T + b) / softcap)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float
    vocab_size: int | None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `FusedLinearCPOLoss` and `linear_token_logps` for this head."""
        return {"softcap": self.softcap, "scale": self.scale, "vocab_size": self.vocab_size}


def lm_head(
    model: nn.Module, softcap: float | None = None, scale: float | None = None, vocab_size: int | None = None
) -> HeadParts:
    """The head of a causal LM (or of a PEFT model around one).

    softcap, scale: what the model does to x W^T + b, if its class is not in `HEADS`. vocab_size: columns from this
    index on are padding; None counts every column, as the model's own logits do.

    Raises ValueError or TypeError for a model that is not supported.
    """
    base = causal_lm(model)
    layer = head_layer(base)
    return HeadParts(layer.weight, layer.bias, *logit_map(base, softcap, scale), vocab_size)


def head_layer(model: PreTrainedModel, in_float32: bool = False) -> nn.Linear:
    """The linear layer that `model` currently projects with: under PEFT the saved copy of the active adapter.

    in_float32: the caller projects in float32, as TRL's `cast_lm_head_to_fp32` makes a head do.
    """
    layer: Any = model.get_output_embeddings()
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
        from peft.utils.other import TrainableTokensWrapper

        if isinstance(layer, ModulesToSaveWrapper):
            names = [] if layer.disable_adapters else layer.active_adapters
            saved = names and all(name in layer.modules_to_save for name in names)
            layer = layer.modules_to_save[names[0]] if saved else layer.original_module
        if isinstance(layer, TrainableTokensWrapper):
            raise ValueError(
                "trainable_token_indices replaces rows of the head (for a tied head, of the embeddings) by its own, "
                "which are not part of the weight that the fused head uses. Omit trainable_token_indices; "
                "modules_to_save=['lm_head'] trains the head"
            )
        if isinstance(layer, BaseTunerLayer):
            raise ValueError(
                f"the head is a {type(layer).__name__}: its adapter is not part of the weight that the fused head "
                "uses. Remove 'lm_head' from target_modules; modules_to_save=['lm_head'] trains the head"
            )
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    replaced = plain and "forward" in vars(layer)
    if replaced:
        replaced = not (is_tensor_parallel(layer) or is_dispatched(layer) or (in_float32 and is_cast_by_trl(layer)))
    if not plain or replaced:
        raise TypeError(
            f"the head of {type(model).__name__} is {type(layer).__name__}{' with another forward' * replaced}, but a "
            "plain nn.Linear is needed: exclude it from quantization and offloading"
        )
    linear: nn.Linear = layer
    return linear


def is_dispatched(layer: nn.Linear) -> bool:
    """Whether accelerate replaced the forward only to move inputs to the layer's device (`device_map`)."""
    if "accelerate" not in sys.modules:
        return False
    from accelerate.hooks import AlignDevicesHook

    hook = vars(layer).get("_hf_hook")
    return isinstance(hook, AlignDevicesHook) and not hook.offload


def is_cast_by_trl(layer: nn.Linear) -> bool:
    """Whether TRL replaced the forward only by the same matmul in float32 (`cast_lm_head_to_fp32`)."""
    forward = vars(layer).get("forward")
    return getattr(forward, "__name__", "") == "cast_forward_to_fp32" and forward.__module__.startswith("trl.trainer.")


def is_tensor_parallel(layer: nn.Linear) -> bool:
    """Whether only torch's `parallelize_module` or a `tp_plan` of transformers has hooks around the layer."""
    acting = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    acting += [function for name, function in vars(layer).items() if name == "forward"]
    modules = ("torch.distributed.tensor.", "transformers.distributed.tensor_parallel")
    sharded = hasattr(layer.weight, "full_tensor")
    return sharded and bool(acting) and all(getattr(f, "__module__", "").startswith(modules) for f in acting)


def parallel_input(layer: Any, hidden: Tensor) -> Tensor:
    """The input of a tensor-parallel head: a DTensor, hidden [S, T, H] complete on every rank.

    torch prepares the layer's input in a hook; the plans of transformers all take a replicated input.
    """
    from torch.distributed.tensor import DTensor, Replicate

    for hook in layer._forward_pre_hooks.values():
        hidden = hook(layer, (hidden,))
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, layer.weight.device_mesh, [Replicate()], run_check=False)
    return hidden


def backbone(model: Any) -> nn.Module:
    """The module that computes the head's hidden states. Llama 4's class names a prefix that does not exist."""
    body: nn.Module = model.model if model.base_model is model else model.base_model
    return body


# ------------------------------------------------------------------------------------------- wrappers


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM in `model`; raises for a wrapper whose own forward does something."""
    kinds = {cls.__name__ for cls in type(model).__mro__}
    if "DistributedDataParallel" in kinds and not torch.is_grad_enabled():
        model = model.module  # type: ignore[assignment]
    elif "DistributedDataParallel" in kinds:
        raise ValueError(
            "DistributedDataParallel reduces gradients only of what runs in its own forward: wrap the log-probs "
            "instead, DistributedDataParallel(CausalLMLogps(model)), and call that"
        )
    elif kinds & {"DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}:
        raise ValueError(
            f"{type(model).__name__} gathers the weights in its own forward: use "
            "cpo_kernels.integrations.trl.FusedDPOTrainer, or wrap CausalLMLogps(model) in it"
        )
    elif "OptimizedModule" in kinds:
        raise ValueError(
            "torch.compile(model) compiles a forward that computes logits: pass the model itself, and compile its "
            "backbone in place with model.base_model.compile()"
        )
    if "peft" in sys.modules:
        model = _without_peft(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers causal LM, or a PEFT model around one, got {type(model).__name__}")
    return model


def _without_peft(model: Any) -> Any:
    """The base model; its layers keep the active adapters."""
    import peft
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model, peft.PeftModel):
        return model
    config = model.active_peft_config
    reason = ""
    if config.is_prompt_learning:
        reason = "adds virtual tokens"
    elif type(model.base_model).forward is not BaseTuner.forward:
        reason = "has a forward of its own"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "is applied from its invocation tokens on"
    if reason:
        raise ValueError(
            f"a {config.peft_type.value} adapter {reason}, which running the base model would drop: use "
            "cpo_kernels.integrations.trl.FusedDPOTrainer, or a LoRA"
        )
    return model.get_base_model()
