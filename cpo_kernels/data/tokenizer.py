"""The tokenizer of a recipe."""

from __future__ import annotations

import importlib.util
from typing import Any

from cpo_kernels.hub import check_model_path, model_source, tokenizer_source
from cpo_kernels.recipe.keys import ModelConfig


def load_tokenizer(config: ModelConfig, option: str = "--model.tokenizer FOLDER") -> Any:
    """The tokenizer of `config`. If there is none, raises a ValueError that names the `option` to give one."""
    from transformers import AutoTokenizer

    folder: str | None
    if config.tokenizer:
        folder, gguf = tokenizer_source(config.tokenizer)
    elif config.name:
        check_model_path(config.name)
        folder, gguf = model_source(config)
    else:
        raise ValueError(
            "model.name is empty: give a model with --model FOLDER or a tokenizer with --model.tokenizer FOLDER"
        )
    if gguf and importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{folder}: {gguf} is a GGUF file, which needs the gguf package: pip install --no-deps gguf")
    reason = "its vocabulary is empty"  # what transformers makes for some models if the files are missing
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
        special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
        if not tokenizer.get_vocab().keys() <= special:
            return tokenizer
    except Exception as error:  # the tokenizers package raises that class itself
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    raise ValueError(f"{folder} has no tokenizer ({reason}): give one with {option}")
