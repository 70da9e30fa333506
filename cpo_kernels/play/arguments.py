"""Serve a page on this machine with a slider per objective that generates from a trained model.

cpo-kernels play runs/demo/cdpo
"""

from __future__ import annotations

from cpo_kernels.arguments import Parser


def parser() -> Parser:
    made = Parser("cpo-kernels play", __doc__ or "")
    made.add_argument("model", metavar="MODEL", help="run directory, checkpoint inside one, or transformers directory")
    made.add_argument("--config", metavar="RECIPE", help="recipe with template and objectives; default: the run's")
    made.add_argument(
        "--objective", action="append", default=[], metavar="NAME:LOW:HIGH", help="instead of the config's"
    )
    made.add_argument("--tokenizer", metavar="FOLDER", help="for a model whose folder has none")
    made.add_argument("--port", type=int, default=8765, help="default %(default)s; 0: any free port")
    made.add_argument(
        "--max-new-tokens", type=int, default=100, help="maximum length of an answer (default %(default)s)"
    )
    return made
