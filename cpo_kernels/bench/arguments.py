"""Time this library, naive PyTorch and the baselines side by side on this machine.

    cpo-kernels bench --set default --out results.json      # gpu where there is one
    cpo-kernels bench --only head --implementations products ours cce --workload head=llama-3-8b,mode=frozen
    cpo-kernels bench --only trainers                       # TRL's trainers, with TRL's head and with ours
    cpo-kernels bench --list

Every implementation runs in its own process on the same tensors; the processes take turns in changing order. Results
are checked first: a wrong one is listed but not timed, and the exit status is 1 if it is ours. The file is written
after every implementation and every round; --resume continues one that a time limit, a signal or an interrupt cut off.
Ratios are medians over rounds of the ratio to the floor in the same round.
"""

from pathlib import Path

from cpo_kernels.arguments import Parser

SETS = ("ci", "default", "full", "gpu", "filtered")
PARTS = ("head", "tokens", "preference", "training_step", "trainers", "growth", "cold_start")


def parser() -> Parser:
    made = Parser("cpo-kernels bench", __doc__ or "")
    made.add_argument("--set", choices=SETS, help="default: gpu if there is a GPU, else default")
    made.add_argument("--out", type=Path, metavar="FILE", help="JSON file of results, written as they come")
    made.add_argument(
        "--resume", action="store_true", help="keep the results in the file at --out and measure the rest"
    )
    asked_for = [part for part in PARTS if part != "trainers"]  # they load a model for every turn: only where named
    made.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=asked_for,
        help="only these parts of the set; default: all but trainers",
    )
    made.add_argument(
        "--implementations", "--subjects", nargs="+", metavar="NAME", help="only these, and the floor; see --list"
    )
    made.add_argument(
        "--workload", action="append", metavar="KEY=VALUE,...", help="a head to measure instead of the set's runs"
    )
    made.add_argument(
        "--model",
        metavar="PATH",
        help="model.name of the training steps, instead of random weights; with --data also for the set filtered",
    )
    made.add_argument(
        "--data",
        metavar="JSONL",
        help="pairs for the training steps of two responses and the set filtered: {prompt, chosen, rejected} a line",
    )
    made.add_argument("--device", help="cuda, cuda:1 or cpu; default: cuda if there is a GPU")
    made.add_argument("--threads", type=int, help="CPU threads; default: torch's default")
    made.add_argument("--rounds", type=int, help="number of turns of each implementation")
    made.add_argument("--time-limit", type=float, metavar="SECONDS", help="start nothing after this time")
    made.add_argument("--list", action="store_true", help="print the set's workloads and implementations and exit")
    return made
