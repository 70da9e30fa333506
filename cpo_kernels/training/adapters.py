"""LoRA (peft) and 4-bit bases (bitsandbytes): what a run needs to train adapters instead of weights.

The reference of cdpo and dpo needs no second model: adapters start at zero, so log-probs taken before the first step
are those of the base, which is the model with its adapters off.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.training.keys import ModelConfig, TrainingConfig


def add_adapters(model: Any, training: TrainingConfig, seed: int) -> Any:
    """The PeftModel around `model`, whose layers get adapters in place; None where the run trains none."""
    quantized = getattr(model, "is_loaded_in_4bit", False)
    if training.train != "lora":
        if quantized:
            raise ValueError(f"a 4-bit model trains adapters only: set training.train: lora (now {training.train})")
        return None
    need("peft", "training.train: lora")
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model has adapters already, which new ones would take the place of: merge them first, "
            "peft.AutoPeftModelForCausalLM.from_pretrained(MODEL).merge_and_unload().save_pretrained(FOLDER), "
            "and give FOLDER as model.name"
        )
    lora = training.lora
    torch.manual_seed(seed)  # of the first factors; the second ones start at zero
    targets = "all-linear" if lora.targets == ["all-linear"] else lora.targets  # another text would be a pattern
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )


def merged_weights(weights: dict[str, Tensor], adapted: Any) -> dict[str, Tensor]:
    """The plain model's weights, W + alpha / r B A, from those of one with adapters. (peft's own merge writes to
    `.data`, which does not reach a sharded weight.)"""
    lora, plain = adapted.peft_config["default"], {}
    for name, tensor in weights.items():
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            a, b = (weights[f"{stem}.lora_{factor}.default.weight"] for factor in "AB")
            tensor = tensor + lora.lora_alpha / lora.r * (b @ a)
        if ".lora_" not in name:
            plain[name.replace(".base_layer.", ".")] = tensor
    return plain


def quantization(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `model.quantize`: NF4 with double quantization, as in QLoRA."""
    if config.quantize is None:
        return {}
    need("bitsandbytes", "model.quantize: 4bit")
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    }


def need(package: str, key: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{key} needs {package}, which is not installed: pip install {package}")
