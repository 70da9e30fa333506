"""One YAML file, one dataclass tree (`keys`).

    config = read_config("recipe.yaml", ["training.lr=1e-4", "data.train=[answers.jsonl]"])

An unknown key raises an error with the nearest valid name; a wrong type, one that names key and value.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cpo_kernels.recipe.aliases import ALIASES
from cpo_kernels.recipe.keys import CHOICES, MEANT, SHORTHAND, Config, in_range


def read_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Read a Config from a YAML file, a dict or a Config, with `section.key=value` overrides (values are YAML).

    Raises ValueError or TypeError for an unknown key, a value of the wrong type, a number out of range or an
    impossible loss.
    """
    if isinstance(source, Config):
        tree = dataclasses.asdict(source)
    elif isinstance(source, Mapping):
        tree = _copy(source)
    else:
        tree = parse_yaml(_recipe(Path(source)).read_text(encoding="utf-8"), str(source)) or {}
        if not isinstance(tree, dict):
            raise ValueError(f"{source}: a config is a mapping of keys, got {type(tree).__name__}")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: write section.key=value or --section.key value")
        _set(tree, name.strip().lstrip("-").replace("-", "_"), parse_yaml(text, f"override {override!r}"))
    config: Config = _build(Config, tree, "")
    for name, choices in CHOICES.items():
        value = _get(config, name)
        if value not in choices:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(filter(None, choices))}")
    if len(config.training.betas) != 2:
        raise ValueError(f"training.betas: AdamW takes two numbers, got {config.training.betas}")

    from cpo_kernels.objectives import Objective  # imports torch: help and unknown keys must not wait for it
    from cpo_kernels.recipe.loss import preference_loss

    preference_loss(config, [Objective(**vars(objective)) for objective in config.objectives])
    return config


def _recipe(path: Path) -> Path:
    if not path.exists():
        beside = [other.name for other in path.parent.glob("*.y*ml")]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise FileNotFoundError(f"the recipe {path} does not exist{hint}")
    return path


def config_text(config: Config) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def write_config(config: Config, path: Path) -> None:
    path.write_text(config_text(config), encoding="utf-8")


def config_keys(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, default, help with its range) of every key."""
    for f in dataclasses.fields(cls):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if dataclasses.is_dataclass(default):
            yield from config_keys(type(default), f"{prefix}{f.name}.")
        else:
            range = f.metadata["range"]
            yield prefix + f.name, default, f.metadata["help"] + (f"; in {range}" if range else "")


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        why = f" ({reason})" if reason else ""
        raise ValueError(f"{where}{place} is not valid YAML{why}: quote strings with special characters") from None


def _copy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _copy(value) for name, value in tree.items()}
    return list(tree) if isinstance(tree, list) else tree


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        inner = tree.get(section)
        if isinstance(inner, str) and section == "model":  # the shorthand `model: NAME`
            inner = {"name": inner}
        tree[section] = inner if isinstance(inner, dict) else {}
        tree = tree[section]
    if last == "model" and isinstance(value, str) and isinstance(tree.get(last), dict):
        kept = {name: tree[last][name] for name in tree[last] if name not in ("config", "gguf_file")}
        tree[last] = kept | {"name": value}  # the shorthand sets where weights come from and keeps the rest
    else:
        tree[last] = value


def unknown_key(name: str, cls: type = Config, prefix: str = "") -> str:
    """The message for a key that section `prefix` of class `cls` does not have: the right key, or all valid ones."""
    every = [full for full, _, _ in config_keys()]
    short = name.rpartition(".")[2]
    near = [full for full in every if full.rpartition(".")[2] == short]  # the right name in the wrong place
    if not near and short in ALIASES:
        hint = ALIASES[short]
        return f"unknown key {prefix}{name}: " + (hint if " " in hint else f"use {hint}")
    here = {f.name: prefix + f.name for f in dataclasses.fields(cls)}
    near = near or [here[match] for match in difflib.get_close_matches(short, here, n=1, cutoff=0.6)]
    names = {full.rpartition(".")[2]: full for full in every}
    near = near or [names[match] for match in difflib.get_close_matches(short, names, n=1, cutoff=0.75)]
    return f"unknown key {prefix}{name}; " + (
        f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(here.values())}"
    )


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if dataclasses.is_dataclass(tree):
        tree = dataclasses.asdict(tree)  # type: ignore[arg-type]
    if isinstance(tree, str) and cls in SHORTHAND:
        tree = {SHORTHAND[cls]: tree}
    if not isinstance(tree, Mapping):
        section, keys = prefix.rstrip("."), [f.name for f in dataclasses.fields(cls)]
        hint = f"did you mean {prefix}{MEANT[cls]}?" if cls in MEANT else f"keys: {', '.join(keys[:3])}, ..."
        raise TypeError(f"{section}: expected a mapping of keys, got {tree!r} ({hint})")
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in hints:
            raise ValueError(unknown_key(str(name), cls, prefix))
    fields = {f.name: f.metadata for f in dataclasses.fields(cls)}
    values = {name: _coerce(hints[name], value, prefix + name, **fields[name]) for name, value in tree.items()}
    return cls(**values)


def _coerce(hint: Any, value: Any, name: str, help: str, range: str | None) -> Any:
    """`value` converted to the key's declared type and checked against its range. YAML reads 1e-4 as a string and a
    list of one as a scalar."""
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        kinds = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if str in kinds and kinds[0] is float and isinstance(value, str) and _number(float, value) is None:
            if value != "auto":
                raise ValueError(f"{name}: expected auto or a number in {range}, got {value!r} ({help})")
            return value
        hint = kinds[0]
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{name}.")
    if typing.get_origin(hint) is list:
        item = typing.get_args(hint)[0]
        values = value if isinstance(value, (list, tuple)) else [value]
        return [_coerce(item, v, f"{name}[{i}]", help, range) for i, v in enumerate(values)]
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):
        item = typing.get_args(hint)[1]
        if item is Any:
            return _numbers(value)
        return {key: _coerce(item, v, f"{name}.{key}", help, range) for key, v in value.items()}
    if hint in (int, float):
        number = _number(hint, value)
        if number is not None and not in_range(number, str(range)):
            raise ValueError(f"{name}: {number} is not in {range} ({help})")
        if number is not None:
            return number
    elif isinstance(value, typing.get_origin(hint) or hint):
        return value
    raise TypeError(f"{name}: expected {hint.__name__}, got {value!r} ({help})")


def _numbers(value: Any) -> Any:
    """`value` with the numbers that YAML reads as strings, such as 1e-6, converted."""
    if isinstance(value, dict):
        return {name: _numbers(x) for name, x in value.items()}
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", value) else value


def _number(hint: type, value: Any) -> Any:
    """`value` as an int (of 64 bits) or float; None if it is neither."""
    if isinstance(value, bool):
        return None
    try:
        number = value if isinstance(value, int) else float(value)
        return hint(number) if hint is float or (number == int(number) and abs(number) < 2**63) else None
    except (TypeError, ValueError, OverflowError):
        return None
