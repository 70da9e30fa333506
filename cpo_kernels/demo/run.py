"""`cpo-kernels demo`: train a tiny model with CPSFT and CDPO, and with SFT and DPO on the same data, and compare.

Everything is generated locally: the world and its rated answers, the word-level tokenizer, the model. The program that
rated the data also scores generated answers.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpo_kernels.data.records import Record, Response, write_records
from cpo_kernels.demo.arguments import parser
from cpo_kernels.demo.judge import NAMES, Judged, held_out, judge, trade_off_table
from cpo_kernels.demo.model import build_model, build_tokenizer
from cpo_kernels.demo.world import OBJECTIVES, World
from cpo_kernels.evaluation.controllability import control_table
from cpo_kernels.training.rundir import versions

MODELS = {"sft": "SFT", "dpo": "SFT + DPO", "cpsft": "CPO stage 1", "cdpo": "CPO stage 2"}
STAGES = {
    "sft": "SFT on the best answers, without tags",
    "dpo": "DPO with a little NLL from there, on pairs ordered by their mean rating",
    "cpsft": "CPO stage 1 (CPSFT) from random weights, on every answer under the tags of its ratings",
    "cdpo": "CPO stage 2 (CDPO with a little NLL) from there, on pairs ordered under their tags",
}
# Weight of the chosen answers' NLL beside the loss of DPO, which only needs a difference of log-probs. Without the NLL
# a model asked for the best of everything began to refuse a robber and then helped: "i will not help with that , guard
# rita .", a text that is in no pair.
NLL_WEIGHT = 0.2


@dataclass(frozen=True)
class Size:
    """Sizes of the demo. The full size takes two cores four minutes."""

    people: int = 16
    prompts: int = 4000
    hidden_size: int = 128
    num_layers: int = 3
    sft_epochs: float = 6.0  # only on the best answers, about a quarter of all
    cpsft_epochs: float = 4.0
    preference_epochs: float = 1.0
    batch_size: int = 64
    sft_lr: float = 2e-3
    preference_lr: float = 2e-4
    held_out: int = 60
    threads: int = 2  # more do not help a model this small


QUICK = Size(
    people=3,
    prompts=500,
    hidden_size=64,
    num_layers=2,
    sft_epochs=12,
    cpsft_epochs=6,
    preference_epochs=2,
    batch_size=32,
    preference_lr=4e-4,
    held_out=20,
    threads=1,
)


def stage_config(stage: str, size: Size, seed: int, folder: Path, progress: bool) -> dict[str, Any]:
    """The trainer's config of one stage, as in a YAML recipe."""
    preference = stage in ("cdpo", "dpo")
    epochs = {"sft": size.sft_epochs, "cpsft": size.cpsft_epochs}.get(stage, size.preference_epochs)
    loss: dict[str, Any] = {"beta": 0.3}
    if preference:
        loss |= {"type": ["sigmoid", "sft"], "weights": [1.0, NLL_WEIGHT]}
    conditions: dict[str, Any] = {}
    if stage in ("cpsft", "cdpo"):
        conditions["mixture"] = [
            {"sampler": "attained", "share": 0.8},
            {"sampler": "attained", "share": 0.2, "objectives": ["harmlessness"]},
        ]
    if stage == "cdpo":  # also what no answer attains: the pairs show what comes closest
        conditions["mixture"] += [{"sampler": "best", "share": 0.6}, {"sampler": "grid", "share": 0.4}]
        conditions["per_prompt"] = 3
    return {
        "stage": stage,
        "run_dir": str(folder / stage),
        "seed": seed,
        "objectives": [asdict(o) for o in OBJECTIVES],
        "data": {"eval_share": 0.02},
        "template": {"answer_prefix": " "},  # the tokenizer knows whole words
        "conditions": conditions,
        "loss": loss,
        "training": {
            "epochs": epochs,
            "batch_size": 16 if preference else size.batch_size,
            "lr": size.preference_lr if preference else size.sft_lr,
            "betas": [0.9, 0.98],
            "warmup": 20,
            "precision": "fp32",
            "overwrite": True,
            "progress": progress,
        },
    }


def make_data(world: World, size: Size, seed: int) -> tuple[list[Record], frozenset[Any]]:
    rated = list(world.rated_questions(size.prompts, seed))
    records = [
        Record(q.prompt, tuple(Response(text, {n: float(v) for n, v in world.rate(q, text).items()}) for text in texts))
        for q, texts in rated
    ]
    return records, frozenset(q for q, _ in rated)


def run_demo(out: Path, size: Size | None = None, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Train the four models, evaluate them, and write results.json, controllability.png and a run folder per stage."""
    import torch
    from transformers.utils import logging

    from cpo_kernels.training.loop import train

    logging.disable_progress_bar()  # of saving a small file

    size = size or Size()
    torch.set_num_threads(min(size.threads, os.cpu_count() or 1))
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    world = World(seed, size.people)
    records, asked = make_data(world, size, seed)
    write_records(records, out / "data.jsonl")
    questions = held_out(world, size.held_out, seed, asked)
    tokenizer = build_tokenizer()
    print(f"{len(records)} questions with {sum(len(r.responses) for r in records)} rated answers, such as\n")
    print(f"  {records[0].prompt}")
    for response in records[0].responses:
        print("    {:<62} {}".format(response.text, " ".join(f"{n} {v:g}" for n, v in response.ratings.items())))

    judged: dict[str, Judged] = {}
    seconds: dict[str, float] = {}
    model: Any = None
    for stage, name in MODELS.items():
        if stage in ("sft", "cpsft"):  # dpo and cdpo continue from these
            model = build_model(tokenizer, size.hidden_size, size.num_layers, seed)
            if stage == "sft":
                weights = sum(p.numel() for p in model.parameters())
                print(f"\nFour models, Llamas of {weights:,} weights, are trained and then evaluated.")
        print(f"[{list(MODELS).index(stage) + 1}/{len(MODELS)}] {STAGES[stage]}", flush=True)
        config = stage_config(stage, size, seed, out, progress)
        clock = time.perf_counter()
        result = train(config, model=model, tokenizer=tokenizer, records=records)
        seconds[stage] = time.perf_counter() - clock
        judged[name] = judge(world, model, result.template, questions, tags=stage in ("cpsft", "cdpo"))
    seconds["total"] = time.perf_counter() - started

    results = {
        "seed": seed,
        "size": asdict(size),
        "seconds": seconds,
        "versions": versions() | {"cpus": os.cpu_count(), "machine": platform.machine()},
        "models": {name: asdict(result) for name, result in judged.items()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(judged, out / "controllability.png")
    print(report(judged, size))
    print(f"\n{seconds['total']:.0f} s; {out / 'controllability.png'}, {out / 'results.json'}")
    return results


def report(judged: dict[str, Judged], size: Size) -> str:
    controls = {name: result.control for name, result in judged.items()}
    shares = "; ".join(f"{name} {result.well_formed:.0%}" for name, result in judged.items())
    refused = ["; ".join(f"{name} {r.refused[k]:.0%}" for name, r in judged.items()) for k in ("no tags", "best tags")]
    return f"""
Requested and achieved scores on {size.held_out} held-out questions. The tag of helpfulness or honesty varies while the
others request the best; harmful requests carry only the harmlessness tag. SFT and DPO do not use tags: they give the
same answer to every request.

{control_table(controls)}

Questions to which nobody knows the answer: helpfulness / honesty. Any fact in the answer is made up, so more of one is
less of the other. All requests can be met except "5, 5"; no tags means the best of everything.

{trade_off_table(judged)}

Share of harmful requests refused. Help with a harmful request is harmful, so no answer is the best on everything, which
is what both no tags and all best tags request. A refusal comes closest, since harmlessness weighs most; stage 2 has
pairs that say so, stage 1 has no such request. SFT and DPO learn only the answer that is best overall: a refusal.

without tags:                                      {refused[0]}
all best tags:                                     {refused[1]}

Answers that are well formed:                      {shares}"""


def draw(judged: dict[str, Judged], path: Path) -> None:
    from cpo_kernels.evaluation.plot import plot_controllability

    trade_off = {}
    for stage, name in MODELS.items():
        points = judged[name].trade_off
        if stage in ("sft", "dpo"):
            points = {"": points["no tags"]}
        else:
            points = {request: point for request, point in points.items() if request not in ("5, 5", "no tags")}
        trade_off[name] = [(request, p["helpfulness"], p["honesty"]) for request, p in points.items()]
    controls = {name: result.control for name, result in judged.items()}
    axes = (NAMES[0], NAMES[1])
    plot_controllability(controls, trade_off, axes, path, "Requested and achieved: one model, many trade-offs")


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(argv))


def run(args: Any) -> int:
    results = run_demo(args.out, QUICK if args.quick else Size(), args.seed, not args.quiet)
    return check(results)


def check(results: dict[str, Any]) -> int:
    """0 if the model follows its tags better than chance: every rank correlation of CPO exceeds DPO's by 0.3."""
    models = results["models"]
    for objective in NAMES:
        ours = models[MODELS["cdpo"]]["control"][objective]["correlation"]
        plain = models[MODELS["dpo"]]["control"][objective]["correlation"]
        if not ours > plain + 0.3:
            print(f"the model does not follow {objective}: rank correlation {ours:.2f}, DPO has {plain:.2f}")
            return 1
    return 0
