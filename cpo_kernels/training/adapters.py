"""LoRA (peft) and 4-bit base models (bitsandbytes): training adapters instead of weights.

cdpo and dpo need no second model as reference. Adapters start at zero, so log-probs computed before the first step are
those of the base model.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpo_kernels.extras import install_line
from cpo_kernels.recipe.keys import ModelConfig, TrainingConfig


def adapted_model(name: str) -> str | None:
    """The base model of the adapters in a folder (or hub name); None if it holds a full model."""
    from transformers.utils import cached_file

    quietly = {
        f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")
    }
    file = cached_file(name, "adapter_config.json", **quietly)
    return file and json.loads(Path(file).read_text())["base_model_name_or_path"]


def merge_adapters(model: Any, folder: str) -> Any:
    """`model` with the adapters of `folder` merged into its weights: a plain model that trains and is saved as any
    other.

    If the adapters change only the head or only the embeddings, tied weights are untied."""
    need("peft", f"model.name {folder} holds adapters, which")
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, load_peft_weights

    if has_adapters(model):  # transformers lays a folder's own adapters over its model as it loads it
        raise ValueError(f"model.name {folder}: its base model has adapters of its own; merge them into it first")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    _resize(model, load_peft_weights(folder, device="cpu"), folder, tied)
    adapted: Any = PeftModel.from_pretrained(model, folder)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type
        raise ValueError(
            f"model.name {folder}: adapters of type {kind.value} cannot be merged into the model's weights"
        )
    head: Any = model.get_output_embeddings()
    if tied and any(
        isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper)) for m in (head, model.get_input_embeddings())
    ):
        layer: Any = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return adapted.merge_and_unload(safe_merge=True)


def _resize(model: Any, saved: dict[str, Tensor], folder: str, tied: bool) -> None:
    """Resize embeddings and head to the rows in `saved`: new tokens may have come with the adapters."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    stems = [f"base_model.model.{name}." for name, module in model.named_modules() if module in ends]
    sizes = {
        stem: len(weight)
        for stem in stems
        for name, weight in saved.items()
        if name.startswith(stem) and name.endswith(".weight")
    }
    rows, had = set(sizes.values()), len(ends[0].weight)
    if not rows or rows == {had}:
        return
    if len(rows) > 1 or (len(sizes) < len(stems) and not tied):
        raise ValueError(
            f"model.name {folder}: the adapters were trained with {max(rows)} tokens on a model of {had}, but hold "
            f"only {', '.join(sizes)}weight: save embeddings and head with them (peft's modules_to_save)"
        )
    model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def add_adapters(model: Any, training: TrainingConfig, seed: int) -> Any:
    """The PeftModel around `model`, whose layers get adapters in place; None if the run trains none. Raises ValueError
    for a model that already has adapters: such a run would not save what it trained."""
    if has_adapters(model):
        raise ValueError(
            f"the model already has adapters, with which training.train: {training.train} cannot be saved: merge them "
            "first with peft.AutoPeftModelForCausalLM.from_pretrained(MODEL).merge_and_unload().save_pretrained("
            "FOLDER), and give FOLDER as model.name"
        )
    if training.train != "lora":
        if getattr(model, "is_loaded_in_4bit", False):
            raise ValueError(f"a 4-bit model can only train adapters: set training.train: lora (now {training.train})")
        return None
    need("peft", "training.train: lora")
    from peft import LoraConfig, get_peft_model

    lora = training.lora
    torch.manual_seed(seed)  # of the first factors; the second ones start at zero
    targets = (
        "all-linear" if lora.targets == ["all-linear"] else lora.targets
    )  # any other string would be a regular expression
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


def has_adapters(model: Any) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)
    return any(isinstance(module, kinds) for module in model.modules())


def merged_weights(weights: dict[str, Tensor], adapted: Any) -> dict[str, Tensor]:
    """The plain model's weights, W + alpha / r B A, from those of a model with adapters. (peft's merge writes to
    `.data`, which does not update a sharded weight.)"""
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
        raise ValueError(f"{key} needs {package}, which is not installed: {install_line(package)}")
