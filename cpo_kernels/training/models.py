"""Models: loading, selecting what trains, saving."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from cpo_kernels.data.packing import Encoded
from cpo_kernels.data.tokenizer import load_tokenizer
from cpo_kernels.hub import check_model_path, model_source
from cpo_kernels.recipe.keys import ModelConfig, TrainingConfig
from cpo_kernels.training.adapters import adapted_model, merge_adapters, quantization
from cpo_kernels.training.attention import set_attention
from cpo_kernels.training.checkpoints import atomic_folder


def load_model(config: ModelConfig, model: Any = None, tokenizer: Any = None, seed: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer) with float32 parameters; either may be given as an object instead. A folder of adapters is
    merged into its base model, unless that is quantized."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, gguf = model_source(config)
    source = {"gguf_file": gguf} if gguf else {}
    tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
    if model is None and config.config:
        options = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | config.config
        options |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        if config.quantize:
            raise ValueError("model.quantize needs the weights of model.name; model.config creates new ones")
        if "model_type" not in options:
            raise ValueError(f"model.config needs model_type (llama, qwen2, ...), got {sorted(config.config)}")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options), dtype=torch.float32)
    elif model is None:
        if not folder:
            raise ValueError("no model: set model.name or model.config, or pass one to train()")
        check_model_path(str(config.name))
        if gguf and config.quantize:
            raise ValueError(f"model.quantize: {gguf} is already quantized; save the model as safetensors first")
        options = {"dtype": torch.float32, **source, **quantization(config)}
        adapters, base = [], base_of_adapters(config)
        below = folder
        while base is not None:  # adapters may have adapters as base
            adapters.append(below)
            below, base = base, adapted_model(base) if base != below else None
        try:
            model = AutoModelForCausalLM.from_pretrained(below, **options)
            for adapter in reversed(adapters):
                if getattr(model, "hf_quantizer", None):  # merging would round
                    model.load_adapter(adapter)
                else:
                    model = merge_adapters(model, adapter)
        except (torch.OutOfMemoryError, ModuleNotFoundError):
            raise
        except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:  # cut off, of another shape
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(f"the model in {folder} cannot be loaded ({reason})") from error
        if gguf:  # the weights are dequantized: save the model as such
            model.is_quantized, model.hf_quantizer = False, None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
    set_attention(model, config.attention)
    return model, tokenizer


def base_of_adapters(config: ModelConfig) -> str | None:
    """The base model that the adapters of `model.name` are merged into on loading; None if there are none."""
    folder, gguf = model_source(config)
    return None if not folder or gguf or config.quantize or config.config else adapted_model(folder)


def select_trainable(model: Any, training: TrainingConfig) -> list[tuple[str, nn.Parameter]]:
    """Freeze what does not train. Returns the (name, parameter) list of what does."""
    if training.train == "last_k":
        backbone = model.base_model
        layers = max((m for m in backbone.modules() if isinstance(m, nn.ModuleList)), key=len)
        if not 1 <= training.k <= len(layers):
            raise ValueError(
                f"training.k must be in [1, {len(layers)}], the model's number of layers; got {training.k}"
            )
        model.requires_grad_(False)
        children = list(backbone.children())
        place = next(i for i, child in enumerate(children) if any(m is layers for m in child.modules()))
        for module in [*layers[-training.k :], *children[place + 1 :]]:
            module.requires_grad_(True)
    elif training.train == "body":
        model.requires_grad_(True)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    elif training.train == "all":
        model.requires_grad_(True)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in named:
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"trainable parameters must be float32; {name} is {p.dtype}: load the model in float32")
    return named


def check_tokens(model: Any, tokenizer: Any, groups: Sequence[Encoded]) -> None:
    """Raise ValueError for a token or a position that has no embedding: the run would fail at that batch, on a GPU
    without a reason."""
    tokens = model.get_input_embeddings()
    largest = max((max(chain(g.prompt, *g.responses)) for g in groups), default=-1)
    if largest >= len(tokens.weight):
        raise ValueError(
            f"the tokenizer writes token {largest} ({tokenizer.decode([largest])!r}), but the model has "
            f"{len(tokens.weight)} embeddings: give its own tokenizer (model.tokenizer) or resize them"
        )
    limit, longest = learned_positions(model), max((max(g.rows("packed")) for g in groups), default=0)
    if longest > limit:
        raise ValueError(
            f"a prompt with its response has {longest} tokens, but the model has embeddings of {limit} positions: "
            f"set data.max_tokens to at most {limit}"
        )


def learned_positions(model: Any) -> float:
    """Positions that the model has an embedding of; inf if it computes them (RoPE)."""
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    tables = [m for m in model.base_model.modules() if isinstance(m, nn.Embedding)]
    of_tokens = model.get_input_embeddings()
    learned = (t for t in tables if t is not of_tokens and t.num_embeddings == limit + getattr(t, "offset", 0))
    return limit if any(learned) else math.inf


# how the model came about, not what it computes
ORIGIN = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def fingerprint(model: Any) -> str:
    """Hash of the config and of all weights: names, shapes, values."""
    hashed = blake2b(digest_size=16)
    options = {name: value for name, value in model.config.to_dict().items() if name not in ORIGIN}
    hashed.update(json.dumps(options, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        hashed.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows a progress bar for each file that it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_saving(model: Any, tokenizer: Any) -> None:
    """Raise ValueError if `save_pretrained` would refuse what the run will save at its end."""
    with TemporaryDirectory() as folder, no_progress_bars():
        try:
            model.save_pretrained(folder, state_dict={})
            tokenizer.save_pretrained(folder)
        except Exception as error:
            raise ValueError(f"the trained model could not be saved: {type(error).__name__}: {error}") from error


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    card: str,
    weights: dict[str, torch.Tensor] | None,
    chat_template: str,
) -> None:
    """Save model (safetensors), tokenizer and README.md atomically, for `from_pretrained`. `weights` and
    `chat_template` replace the model's and the tokenizer's own."""
    with atomic_folder(folder) as temporary, no_progress_bars():
        model.save_pretrained(temporary, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(temporary)
        (temporary / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        (temporary / "README.md").write_text(card)
