"""`cpo-kernels train RECIPE`: runs the stage, then summarises the data and shows what to do with the model."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from cpo_kernels.recipe.config import config_keys, read_config
from cpo_kernels.recipe.keys import Config, MixConfig, ObjectiveConfig, SourceConfig


def run(args: Any) -> int:
    if args.keys:
        print(keys_table())
        return 0
    overrides = [f"training.{name}=true" for name in ("resume", "overwrite") if getattr(args, name)]
    overrides += ["training.progress=false"] * args.quiet
    config = read_config(args.config, [*args.overrides, *overrides])
    main_process = os.environ.get("RANK", "0") == "0"
    if not config.run_dir and main_process:
        print("run_dir is not set: neither model nor metrics are saved (--run_dir FOLDER saves them)", file=sys.stderr)

    from accelerate import PartialState

    from cpo_kernels.training.loop import train

    result = train(config)
    ranks = PartialState()
    if ranks.is_main_process:
        print(summary(result))
        print(next_steps(config), end="")
    ranks.destroy_process_group()
    return 0


def keys_table() -> str:
    """A line for each key: its name, its default as in a recipe, its help. The keys of list items follow."""
    lists = {"data.train[]": SourceConfig, "conditions.mixture[]": MixConfig, "objectives[]": ObjectiveConfig}
    keys = list(config_keys())
    for name, item in lists.items():
        keys += config_keys(item, f"{name}.")
    return "\n".join(f"{name:32} {as_yaml(default):14} {help}" for name, default, help in keys)


def as_yaml(value: Any) -> str:
    """A value as one line of YAML; for list items only the keys that are set."""
    if isinstance(value, list) and value and is_dataclass(value[0]):
        value = [{name: x for name, x in vars(item).items() if x is not None} for item in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def summary(result: Any) -> str:
    """What the data contained and left out, and the last metrics."""
    report = result.report
    lines = []
    for split in ("train", "eval", "reference"):
        if split in report:
            lines.append(f"{split}: " + ", ".join(f"{name} {count}" for name, count in report[split].items()))
    if report.get("bad_lines"):
        lines.append(f"bad lines skipped: {report['bad_lines']}")
        lines += [f"  {reason}" for reason in report["bad_line_reasons"][:5]]
    for row in result.metrics[-2:]:
        lines.append(", ".join(f"{name} {x:.4g}" for name, x in row.items()))
    return "\n".join(lines)


def next_steps(config: Config) -> str:
    """Where the model is and the commands that use it; '' if nothing was saved."""
    if not config.run_dir or not config.training.save_model:
        return ""
    run_dir = shlex.quote(str(config.run_dir))
    lines = ["", f"model: {Path(config.run_dir) / 'model'}"]
    if config.stage == "cpsft":
        lines.append(f"train stage two from it:  cpo-kernels train RECIPE.yaml --model {run_dir}/model --stage cdpo")
    lines.append(f"measure how it follows:   cpo-kernels eval {run_dir}")
    lines.append(f"try it in a browser:      cpo-kernels play {run_dir}")
    return "\n".join(lines) + "\n"
