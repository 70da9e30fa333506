"""Find and load models to evaluate or play with: a run directory, a checkpoint in one, or any transformers
directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cpo_kernels.data.template import PromptTemplate, check_prompt
from cpo_kernels.data.tokenizer import load_tokenizer
from cpo_kernels.hub import check_model_path
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import Config, ModelConfig
from cpo_kernels.training.adapters import add_adapters
from cpo_kernels.training.models import load_model


@dataclass(frozen=True)
class Source:
    """Where a model is, and the config that defines its prompts: template and objectives."""

    name: str  # in tables and pictures
    config: Config
    model: ModelConfig
    checkpoint: Path | None = None  # weights to lay over `model`
    folder: Path | None = None  # run directory

    @property
    def objectives(self) -> list[Objective]:
        return [Objective(o.name, o.low, o.high, o.weight, o.strength) for o in self.config.objectives]


def find_model(given: str, base: bool = False, recipe: str | None = None, tokenizer: str | None = None) -> Source:
    """The model that `given` names; with `base`, the one that this run started from.

    A plain model (a folder of weights, a hub name, package:NAME) takes its config from the run directory
    around it or from `recipe`, a YAML file. `tokenizer` is for a model without one. Raises FileNotFoundError or
    ValueError for what cannot be loaded, before loading anything.
    """
    source = _find(given, base, recipe)
    if source.model.name:
        check_model_path(source.model.name, "MODEL")
    option = "--tokenizer FOLDER"
    try:
        loaded = load_tokenizer(source.model, option)
    except ValueError:
        if tokenizer is None:
            raise
        source = replace(source, model=replace(source.model, tokenizer=tokenizer))
        loaded = load_tokenizer(source.model, option)
    check_prompt(loaded, source.config.template)
    return source


def _find(given: str, base: bool, recipe: str | None) -> Source:
    path = Path(given)
    checkpoint = path if (path / "state.json").exists() else None
    folder = path.parent.parent if checkpoint else path
    if not (folder / "config.yaml").exists():
        if base or checkpoint:
            raise ValueError(f"{path} is not a run directory: there is no {folder / 'config.yaml'}")
        return _plain_model(given, recipe)
    config = read_config(recipe or folder / "config.yaml")
    if base:
        return Source("base", config, config.model, None, folder)
    if checkpoint:
        return Source(f"{folder.resolve().name}/{path.resolve().name}", config, config.model, checkpoint, folder)
    if not (folder / "model").is_dir():
        raise ValueError(f"{folder} has no model/: train with training.save_model, or give one of its checkpoints")
    return Source(folder.resolve().name, config, _saved(folder / "model", config), None, folder)


def _plain_model(given: str, recipe: str | None) -> Source:
    path = Path(given)
    if not path.exists():
        check_model_path(given, "MODEL")
    run = path.parent if path.is_dir() and (path.parent / "config.yaml").exists() else None
    weights = path.is_dir() and any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    if path.exists() and not weights and not list(path.glob("*.gguf")):
        raise ValueError(f"{given} is neither a run directory, nor a checkpoint of one, nor a transformers directory")
    if recipe is None and run is None:
        raise ValueError(
            f"{given} is not a run directory, so its objectives and template are unknown: give a recipe with them, "
            "--config RECIPE.yaml"
        )
    config = read_config(recipe or (run or path) / "config.yaml")
    name = (run or path).resolve().name if path.exists() else given
    return Source(name, config, _saved(path, config) if weights else ModelConfig(given), None, run)


def _saved(folder: Path, config: Config) -> ModelConfig:
    adapters = (folder / "adapter_config.json").exists()  # on a 4-bit base, else they would have been merged
    quantize = config.model.quantize if adapters else None
    return ModelConfig(str(folder), quantize=quantize, attention=config.model.attention)


def load(source: Source, objectives: Sequence[Objective] | None = None) -> tuple[Any, PromptTemplate]:
    """(model in float32, on the GPU if there is one; its template). `objectives` replace the config's."""
    attention = None if source.model.attention == "flash_attention_2" else source.model.attention  # only 16 bit
    model, tokenizer = load_model(replace(source.model, attention=attention), seed=source.config.seed)
    if source.checkpoint:
        from safetensors.torch import load_file

        add_adapters(model, source.config.training, source.config.seed)
        weights = load_file(source.checkpoint / "model.safetensors")
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(
                f"{source.checkpoint} has {unknown[0]!r}, which the model of {source.model.name} does not have"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not getattr(model, "is_loaded_in_4bit", False):
        model.float()
    template = PromptTemplate(
        tokenizer, source.config.template, source.objectives if objectives is None else objectives
    )
    return model.to(device).eval(), template
