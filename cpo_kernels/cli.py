"""`cpo-kernels train | data | eval | play | demo | check | bench`.

cpo-kernels train recipes/truthfulqa_cpsft.yaml --data.train ratings.jsonl --training.lr 1e-4 conditions.strip_best=0.5
cpo-kernels data recipes/truthfulqa_cpsft.yaml --data.train ratings.jsonl --preview 3
cpo-kernels eval --help
cpo-kernels play runs/cdpo
cpo-kernels demo --help
cpo-kernels check --help
cpo-kernels bench --help
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from cpo_kernels.extras import explained

# command -> (module whose main(argv) runs it, help)
COMMANDS = {
    "data": ("cpo_kernels.data.command", "prepare the data of a recipe, count what it holds, show examples"),
    "eval": ("cpo_kernels.evaluation.run", "how well a trained model follows conditions"),
    "play": ("cpo_kernels.play.run", "a local page with a slider per objective that generates from a model"),
    "demo": ("cpo_kernels.demo.run", "the whole method on a small generated world, in minutes on a CPU"),
    "check": ("cpo_kernels.check.run", "every kernel on this device against the float64 oracle"),
    "bench": ("cpo_kernels.bench.run", "ours, naive PyTorch and the baselines side by side on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on an error in what the user gave, which is printed without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="cpo-kernels", description="Controllable Preference Optimization.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train one stage as a YAML recipe says", add_help=False)
    for name, (_, help) in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    args, rest = parser.parse_args(argv[:1]), argv[1:]
    try:
        if args.command == "train":
            return train(rest)
        return importlib.import_module(COMMANDS[args.command][0]).main(rest) or 0
    except ModuleNotFoundError as error:
        told = explained(error, f"cpo-kernels {args.command}")
        if told is error or "--traceback" in argv:
            raise
        print(told, file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if "--traceback" in argv:
            raise
        print(f"cpo-kernels {args.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def train(argv: Sequence[str]) -> int:
    from cpo_kernels.recipe.arguments import config_arguments
    from cpo_kernels.recipe.config import config_keys, read_config

    parser = argparse.ArgumentParser(prog="cpo-kernels train", description="Train one stage.")
    parser.add_argument("--resume", action="store_true", help="same as --training.resume true")
    parser.add_argument("--overwrite", action="store_true", help="same as --training.overwrite true")
    parser.add_argument("--keys", action="store_true", help="list every key with its default, and stop")
    args, overrides = config_arguments(parser, argv)
    if args.keys:
        for name, default, help in config_keys():
            print(f"{name:32} {default!s:14} {help}")
        return 0
    overrides += [f"training.{name}=true" for name in ("resume", "overwrite") if getattr(args, name)]
    config = read_config(args.config, overrides)
    if not config.run_dir and os.environ.get("RANK", "0") == "0":
        print("run_dir is not set: neither model nor metrics are kept (--run_dir FOLDER keeps them)", file=sys.stderr)

    from accelerate import PartialState

    from cpo_kernels.training.loop import train

    result = train(config)
    ranks = PartialState()
    if ranks.is_main_process:
        print(summary(result))
    ranks.destroy_process_group()
    return 0


def summary(result: Any) -> str:
    """What the data held and left out, and the last metrics."""
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


if __name__ == "__main__":
    raise SystemExit(main())
