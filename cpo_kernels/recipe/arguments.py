"""The command line of what takes a recipe: any key of it may be overridden."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cpo_kernels.recipe.config import unknown_key
from cpo_kernels.recipe.keys import Config


def config_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(arguments, overrides) of a command that takes a recipe and any key of it: --training.lr 1e-4, training.lr=1e-4.
    Without a recipe only `--keys` may stand."""
    assert parser.description
    parser.description += " Any key of the config can be overridden: --training.lr 1e-4, training.lr=1e-4."
    parser.add_argument("config", nargs="?", help="YAML recipe; `cpo-kernels train --keys` lists what it may hold")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe; values are YAML")
    parser.add_argument("--on-bad-line", choices=("error", "skip"), help="same as --data.on_bad_line")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    plain, overrides = split_overrides(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    for name in (arg.partition("=")[0] for arg in plain if arg.startswith("--")):
        if not any(option.startswith(name) for option in known):  # a key, written without its section
            raise ValueError(unknown_key(name[2:].replace("-", "_")))
    args = parser.parse_intermixed_args(plain)
    if args.config is None and not getattr(args, "keys", False):
        parser.error("name a YAML recipe")
    overrides = [*overrides, *args.overrides]  # the latter are no keys, which is said where they are read
    if args.on_bad_line:
        overrides.append(f"data.on_bad_line={args.on_bad_line}")
    return args, overrides


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other arguments, key=value of every `section.key=value`, `--section.key value`, `--section.key=value` and
    `--seed 1`, in order)."""
    plain: list[str] = []
    overrides: list[str] = []
    left = list(argv)
    while left:
        arg = left.pop(0)
        name, equals, _ = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            is_key = equals and name.partition(".")[0] in Config.__annotations__  # no path, such as a.b=c/recipe.yaml
            (overrides if is_key else plain).append(arg)
        elif not ("." in name or name in Config.__annotations__):
            plain.append(arg)
        elif "=" in arg:
            overrides.append(arg[2:])
        elif left:
            overrides.append(f"{arg[2:]}={left.pop(0)}")
        else:
            raise ValueError(f"{arg} needs a value")
    return plain, overrides
