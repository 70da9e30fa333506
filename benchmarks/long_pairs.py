"""A pair longer than the memory budget: the strategies `deferred` and `two_pass`, and what `two_pass` did before.

    python -m benchmarks.long_pairs --out benchmarks/results/long-pairs-cpu.json

by rows: 4 products, dW of the second pass added up in float32 over chunks of rows; `two_pass` goes by columns.

The ways take turns; a ratio is the median over rounds of the time over that of the 3 bare products in the same round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cpo_kernels as cpo
from cpo_kernels.backends import dispatch
from cpo_kernels.bench.implementation import BETA, Step
from cpo_kernels.bench.measure import peak_bytes
from cpo_kernels.bench.workload import HEADS
from cpo_kernels.environment import describe, processor
from cpo_kernels.head.grads import WeightGrad
from cpo_kernels.head.inputs import Head, Needs
from cpo_kernels.head.strategy import budget_rows, chunks, even_rows
from cpo_kernels.ops.token_logps import HeadOptions

CPU = torch.device("cpu")
CASES = (
    ("qwen2.5-0.5b", 1200, "bfloat16"),
    ("qwen2.5-0.5b", 4096, "bfloat16"),
    ("qwen2.5-0.5b", 800, "float32"),
    ("smollm2-135m", 4096, "bfloat16"),
)


class Pair:
    """One pair of rows / 2 tokens each, all labelled, and a chunk size that does not hold it."""

    def __init__(self, name: str, rows: int, dtype: str) -> None:
        g, (hidden, vocab) = torch.Generator().manual_seed(0), HEADS[name][:2]
        self.x = torch.randn(rows, hidden, generator=g).to(getattr(torch, dtype))
        self.weight = (torch.randn(vocab, hidden, generator=g) * hidden**-0.5).to(self.x.dtype)
        self.labels = torch.randint(vocab, (rows,), generator=g)
        self.ref_logps = torch.full((2,), -12.0 * (rows // 2))
        self.sign = torch.ones(rows)  # [n] 1 of the chosen rows, -1 of the rejected
        self.sign[rows // 2 :] = -1
        step = even_rows(rows, budget_rows(vocab, self.x.dtype, CPU, None))
        self.parts = [slice(low, high) for low, high in chunks(rows, step)]
        options, kernels = HeadOptions(-100, 1.0, 0.0, vocab), dispatch.kernels("cpu", self.x)
        self.head = lambda: Head(self.weight, self.x.new_empty(0), self.labels, options, step, kernels)

    def loss(self, logp: Tensor) -> tuple[float, float]:
        """Loss, and its derivative by the chosen log-prob; that by the rejected one is its opposite."""
        d = float((logp.double() * self.sign).sum() - self.ref_logps[0] + self.ref_logps[1])
        margin = torch.tensor(BETA * d, dtype=torch.float64)
        return float(-F.logsigmoid(margin)), float(-BETA * torch.sigmoid(-margin))


Outcome = tuple[float, Tensor, Tensor]  # loss, dX, dW
Way = Callable[[Pair], Outcome]


def products(pair: Pair) -> Outcome:
    x, weight = pair.x, pair.weight
    z = x.new_empty(pair.parts[0].stop, weight.shape[0])
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    for part in pair.parts:
        g = z[: part.stop - part.start]
        torch.mm(x[part], weight.t(), out=g)
        torch.mm(g, weight, out=dx[part])
        torch.mm(g.t(), x[part], out=dw)
    return 0.0, dx, dw


def library(pair: Pair, pairs: Tensor) -> Outcome:
    loss_fn = cpo.FusedLinearCPOLoss(beta=BETA)
    x, weight = (t.detach().requires_grad_() for t in (pair.x.view(2, -1, pair.x.shape[1]), pair.weight))
    loss = loss_fn(x, weight, pair.labels.view(2, -1), pairs=pairs, ref_logps=pair.ref_logps).loss
    dx, dw = torch.autograd.grad(loss, (x, weight))
    return loss.item(), dx.flatten(0, 1), dw


def deferred(pair: Pair) -> Outcome:
    return library(pair, torch.tensor([[0, 1]]))


def two_pass(pair: Pair) -> Outcome:
    """The same mean over the pair stated twice, which is no single pair."""
    return library(pair, torch.tensor([[0, 1], [0, 1]]))


def by_rows(pair: Pair) -> Outcome:
    x, head = pair.x, pair.head()
    first = [head.forward(x[part], pair.labels[part])[1] for part in pair.parts]
    logp, lse = torch.cat([f.logp for f in first]), torch.cat([f.lse for f in first])
    loss, coefficient = pair.loss(logp)
    coef = coefficient * pair.sign
    needs, dx = Needs(dx=True, dw=True, db=False), torch.empty_like(x)
    sums = WeightGrad(head, len(pair.parts), needs)
    for part in pair.parts:
        g, anchors = head.logits(x[part], pair.labels[part])
        head.kernels.token_logps_bwd_(g, pair.labels[part], lse[part], coef[part], *head.options, anchors)
        torch.mm(g, pair.weight, out=dx[part])
        sums.add(g, x[part], torch.ones_like(coef[part]))
    return loss, dx, sums.result(dx, coef).dw


WAYS: dict[str, Way] = {"products": products, "deferred": deferred, "two_pass": two_pass, "by rows": by_rows}


def measure(name: str, rows: int, dtype: str, rounds: int) -> dict[str, Any]:
    pair = Pair(name, rows, dtype)
    want = by_rows(pair)
    for way in (two_pass, deferred):
        for seen, truth in zip(way(pair), want, strict=True):
            a, b = torch.as_tensor(seen).double(), torch.as_tensor(truth).double()
            if not (a - b).norm() <= (1e-4 if dtype == "float32" else 1e-2) * b.norm():
                raise ValueError(f"{way.__name__} differs from by_rows by {float((a - b).norm() / b.norm()):.2e}")
    del want
    memory = {way: peak_bytes(Step(lambda run=run: run(pair) and {}), CPU) for way, run in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for r in range(rounds):
        for way in (list(WAYS), list(WAYS)[::-1])[r % 2]:
            start = time.perf_counter()
            WAYS[way](pair)
            times[way].append(time.perf_counter() - start)
    ratios = {way: [t / floor for t, floor in zip(seen, times["products"], strict=True)] for way, seen in times.items()}
    return {
        "head": name, "rows": rows, "dtype": dtype, "chunks": len(pair.parts),
        "ways": {
            way: {
                "ms": round(1e3 * statistics.median(times[way]), 1),
                "ratio": round(statistics.median(ratios[way]), 3),
                "ratio_spread": [round(min(ratios[way]), 3), round(max(ratios[way]), 3)],
                "peak_bytes": memory[way],
            }
            for way in WAYS
        },
    }  # fmt: skip


def table(content: dict[str, Any]) -> str:
    ways = [f"`{way}`" if way != "by rows" else way for way in WAYS if way != "products"]
    lines = ["| one pair | " + " | ".join(ways) + " |", "|---" * len(WAYS) + "|"]
    for case in content["cases"]:
        cells = [
            f"{row['ratio']:.2f}× · {row['peak_bytes'] / 2**20:.0f} MiB"
            for way, row in case["ways"].items()
            if way != "products"
        ]
        title = f"{case['head']}, {case['rows']} rows in {case['chunks']} chunks, {case['dtype']}"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    env = content["environment"]
    return (
        "\n".join(lines)
        + "\n\nTime in bare products (3), peak memory beyond inputs, gradients included. "
        + f"{processor(env)}; `{content['command']}`."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default 5)")
    parser.add_argument("--case", nargs=3, metavar=("HEAD", "ROWS", "DTYPE"), help="instead of the table's cases")
    parser.add_argument("--out", type=Path, help="results as JSON")
    args = parser.parse_args(argv)
    cases = [(args.case[0], int(args.case[1]), args.case[2])] if args.case else CASES
    content: dict[str, Any] = {
        "command": "python -m benchmarks.long_pairs",
        "environment": describe(CPU, (), torch.get_num_threads()),
        "cases": [],
    }
    for case in cases:
        content["cases"].append(measure(*case, args.rounds))
    print(table(content))
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
