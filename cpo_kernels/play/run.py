"""`cpo-kernels play MODEL`: a page on this machine with a slider per objective that generates from a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cpo_kernels.evaluation.loading import find_model, load
from cpo_kernels.evaluation.requests import check_positive, parse_objective
from cpo_kernels.play.server import Player, make_server


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="cpo-kernels play", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument(
        "model", metavar="MODEL", help="run directory, checkpoint inside one, or transformers directory"
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe with template and objectives; default: the run's")
    parser.add_argument(
        "--objective", action="append", default=[], metavar="NAME:LOW:HIGH", help="in place of the config's"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="for a model whose folder holds none")
    parser.add_argument("--port", type=int, default=8765, help="default %(default)s; 0: a free one")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="longest answer (default %(default)s)")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    check_positive(args, "max_new_tokens")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port must lie in [0, 65535], got {args.port}")
    source = find_model(args.model, recipe=args.config, tokenizer=args.tokenizer)
    objectives = [parse_objective(text) for text in args.objective] or source.objectives
    if not objectives:
        raise ValueError(f"{source.name} names no objectives: give --objective NAME:LOW:HIGH")
    model, template = load(source, objectives)
    try:
        server = make_server(Player(source.name, model, template, args.max_new_tokens), args.port)
    except OSError as error:
        raise OSError(f"port {args.port} cannot be used, give another --port: {error}") from None
    print(f"{source.name}: http://127.0.0.1:{server.server_port}  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0
