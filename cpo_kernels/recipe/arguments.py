"""The command line of commands that take a recipe: any of its keys can be overridden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpo_kernels.arguments import Parser
from cpo_kernels.recipe.config import unknown_key
from cpo_kernels.recipe.keys import Config

OVERRIDES = """
Any key of the recipe can be overridden: --training.lr 1e-4, or training.lr=1e-4. `cpo-kernels train --keys` lists them.
"""


class RecipeParser(Parser):
    """The namespace holds `config`, the recipe, and `overrides`, a list of key=value in the order given."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description + OVERRIDES)
        self.add_argument("config", nargs="?", metavar="RECIPE", help="YAML file")
        self.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values are YAML")
        self.add_argument("--on-bad-line", choices=("error", "skip"), help="same as --data.on_bad_line")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        plain, overrides = split_overrides(args)
        options = [option for action in self._actions for option in action.option_strings]
        for name in (arg.partition("=")[0] for arg in plain if arg.startswith("--")):
            if name == "--config":
                self.error("give the recipe without --config")
            if not any(option.startswith(name) for option in options):  # a key, written without its section
                raise ValueError(unknown_key(name[2:].replace("-", "_")))
        arguments = self.parse_intermixed_args(plain)
        if arguments.config is None and not getattr(arguments, "keys", False):
            self.error("give a YAML recipe")
        if arguments.on_bad_line:
            overrides.append(f"data.on_bad_line={arguments.on_bad_line}")
        # positional ones are no known keys: reading the config raises
        arguments.overrides = [*overrides, *arguments.overrides]
        return arguments


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other arguments, overrides as key=value in order), where overrides are `section.key=value`, `--section.key
    value`, `--section.key=value` and `--seed 1`."""
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
