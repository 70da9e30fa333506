"""Train a tiny model with CPSFT and CDPO, and with SFT and DPO on the same data, and see which one follows its tags.

Everything is generated locally: a small world with rated answers, a word-level tokenizer and the model. The program
that rated the data also scores generated answers. Four minutes on two cores; --quick takes less than one.
"""

from __future__ import annotations

from pathlib import Path

from cpo_kernels.arguments import Parser


def parser() -> Parser:
    made = Parser("cpo-kernels demo", __doc__ or "")
    made.add_argument(
        "--quick", action="store_true", help="tiny models, under a minute; fails unless control beats chance"
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the world, the data and the model (default 0)")
    made.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default %(default)s)")
    made.add_argument("--no-progress", action="store_true", dest="quiet", help="same as --quiet")
    return made
