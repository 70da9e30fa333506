"""`cpo-kernels COMMAND`: parse the arguments, then import the module that runs the command.

Help and argument errors do not import torch, so they appear at once.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence

from cpo_kernels import __version__
from cpo_kernels.arguments import Parser
from cpo_kernels.extras import explained

# command -> (module whose parser() takes its arguments, module whose run(arguments) runs it, help)
COMMANDS = {
    "train": ("training.arguments", "training.run", "train one stage described by a YAML recipe"),
    "data": ("data.arguments", "data.command", "prepare a recipe's data, count it and show examples"),
    "eval": ("evaluation.arguments", "evaluation.run", "measure how well trained models follow conditions"),
    "play": ("play.arguments", "play.run", "serve a local page with a slider per objective"),
    "demo": ("demo.arguments", "demo.run", "run the whole method on a small generated world, in minutes on a CPU"),
    "check": ("check.arguments", "check.run", "check every kernel on this device against a float64 oracle"),
    "bench": ("bench.arguments", "bench.run", "time this library, naive PyTorch and the baselines side by side"),
    "explain": ("cli", "cli", "show what a head of a given shape costs: strategy, matmuls, memory"),
}
DESCRIPTION = (
    "Controllable Preference Optimization: train, evaluate and serve models that follow conditions.\n\ncommands:\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 on success, 2 on a user error, which prints no traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    lines = "".join(f"  {name:8} {help}\n" for name, (_, _, help) in COMMANDS.items())
    top = Parser("cpo-kernels", DESCRIPTION + lines + "\n`cpo-kernels COMMAND --help` lists its options.")
    top.add_argument("--version", action="version", version=f"cpo-kernels {__version__}")
    top.add_argument("--completion", action="store_true", help='for bash: eval "$(cpo-kernels --completion)"')
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    if argv[:1] == ["--completion"]:
        print(completion())
        return 0
    place = next((i for i, arg in enumerate(argv) if not arg.startswith("-")), len(argv))
    command = top.parse_args(argv[: place + 1]).command
    rest = argv[:place] + argv[place + 1 :]
    arguments, runs, _ = COMMANDS[command]
    try:
        args = importlib.import_module(f"cpo_kernels.{arguments}").parser().parse_args(rest)
        if args.quiet:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' bars follow it
        if not args.verbose:
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional CPU kernels on each import
        with warnings.catch_warnings():
            if not args.verbose and not sys.warnoptions:
                warnings.filterwarnings("ignore", module=r"(?!cpo_kernels\b)")
            return importlib.import_module(f"cpo_kernels.{runs}").run(args) or 0
    except ModuleNotFoundError as error:
        told = explained(error, f"cpo-kernels {command}")
        if told is error or "--traceback" in argv:
            raise
        print(told, file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if "--traceback" in argv:
            raise
        print(f"cpo-kernels {command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def completion() -> str:
    """A bash function that completes commands, then the options and choices of the command, and files."""
    from cpo_kernels.recipe.config import config_keys

    keys = [f"--{name}" for name, _, _ in config_keys()]
    cases = []
    for name, (arguments, _, _) in COMMANDS.items():
        words = importlib.import_module(f"cpo_kernels.{arguments}").parser().names()
        cases.append(f"    {name}) words='{' '.join(words + (keys if name in ('train', 'data') else []))}' ;;")
    return "\n".join(
        [
            "_cpo_kernels() {",
            "  local words",
            '  case "${COMP_WORDS[1]}" in',
            *cases,
            f"    *) words='{' '.join(COMMANDS)} --help --version' ;;",
            "  esac",
            f"  [ \"$COMP_CWORD\" -eq 1 ] && words='{' '.join(COMMANDS)} --help --version'",
            '  COMPREPLY=($(compgen -W "$words" -- "$2"))',
            "}",
            "complete -o default -F _cpo_kernels cpo-kernels",
        ]
    )


def parser() -> Parser:
    """The parser of `explain`."""
    made = Parser(
        "cpo-kernels explain",
        "Show how a head of this shape would be computed and what that costs, without computing it.",
    )
    add = made.add_argument
    add("rows", type=int, metavar="ROWS", help="number of labelled positions (no prompts, no padding)")
    add("hidden", type=int, metavar="HIDDEN", help="hidden size")
    add("vocab", type=int, metavar="VOCAB", help="vocabulary size")
    add(
        "--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16", help="default %(default)s"
    )
    add("--device", default="cpu", help="cpu or cuda; default %(default)s")
    add("--frozen", action="store_true", help="the head is frozen, as under LoRA")
    add("--no-grad", action="store_true", help="no gradients: reference model or evaluation")
    add("--loss", choices=("preference", "kto", "nll", "unknown"), default="preference", help="default %(default)s")
    add(
        "--group-tokens",
        type=int,
        metavar="N",
        help="labelled positions of the largest group of linked pairs, or of the longest response under kto; "
        "default: ROWS, one group",
    )
    add("--filter-eps", type=eps, metavar="EPS", help="threshold of filtered gradients: a number or auto")
    add("--filter-head-grad", action="store_true", help="with --filter-eps: also filter the gradient of the head")
    add("--live-share", type=float, metavar="L", help="with --filter-eps: assumed share of live columns; default 0.19")
    add("--memory-budget", type=float, metavar="MIB", help="memory of one chunk of logits; default: by device")
    return made


def eps(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be auto or a number in (0, 1), such as 6e-5, got {text!r}") from None


def run(args: Namespace) -> int:
    import torch

    from cpo_kernels.head.strategy import explain

    budget = None if args.memory_budget is None else int(args.memory_budget * 2**20)
    trained = {"train_hidden": not args.no_grad, "train_head": not (args.no_grad or args.frozen)}
    dtype = getattr(torch, args.dtype)
    shape = args.rows, args.hidden, args.vocab
    keys = {"loss": args.loss, "group_tokens": args.group_tokens, "memory_budget": budget}
    if args.live_share is not None and args.filter_eps is None:
        raise ValueError(f"--live-share {args.live_share:g} counts only with --filter-eps: also give that")
    share = {} if args.live_share is None else {"live_share": args.live_share}
    keys |= {"filter_eps": args.filter_eps, "filter_head_grad": args.filter_head_grad, **share, **trained}
    print(explain(*shape, dtype, args.device, **keys))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
