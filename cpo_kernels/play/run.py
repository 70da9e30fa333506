"""`cpo-kernels play MODEL`: loads the model and serves the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpo_kernels.evaluation.loading import find_model, load
from cpo_kernels.evaluation.requests import check_positive, parse_objective
from cpo_kernels.play.arguments import parser
from cpo_kernels.play.server import Player, make_server


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(argv))


def run(args: Any) -> int:
    check_positive(args, "max_new_tokens")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port must be in [0, 65535], got {args.port}")
    source = find_model(args.model, recipe=args.config, tokenizer=args.tokenizer)
    objectives = [parse_objective(text) for text in args.objective] or source.objectives
    if not objectives:
        raise ValueError(f"{source.name} has no objectives: give --objective NAME:LOW:HIGH")
    model, template = load(source, objectives)
    try:
        server = make_server(Player(source.name, model, template, args.max_new_tokens), args.port)
    except OSError as error:
        raise OSError(f"port {args.port} cannot be used; give another --port: {error}") from None
    print(f"{source.name}: http://127.0.0.1:{server.server_port}  (Ctrl-C stops it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0
