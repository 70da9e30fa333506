"""The training loop: one function for all four stages.

    result = train("recipe.yaml")                                              # or a dict or a Config
    result = train(config, model=model, tokenizer=tokenizer, records=records)  # with objects in place of files

    cpsft  NLL of every response after its prompt and the tags of its own ratings    sft  the same without tags
    cdpo   preference loss on pairs ordered under the condition in their prompt      dpo  without conditions

The reference of cdpo and dpo is the model as it is at the start. The loss of a micro-batch is divided by what its whole
step holds (labelled tokens or pairs): gradient accumulation and several processes give the gradient of one big batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from torch import Tensor
from tqdm import tqdm

from cpo_kernels.data.packing import Encoded, Unit, epoch_steps
from cpo_kernels.data.preparation import load_data, units_of
from cpo_kernels.data.records import Record
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.objectives import Objective
from cpo_kernels.training.adapters import add_adapters
from cpo_kernels.training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from cpo_kernels.training.config import read_config
from cpo_kernels.training.keys import Config
from cpo_kernels.training.losses import StageLoss, StepTotal
from cpo_kernels.training.model_card import model_card
from cpo_kernels.training.models import fingerprint, load_model, save_model, select_trainable
from cpo_kernels.training.optim import make_optimizer, peak_memory_gib, schedule, update
from cpo_kernels.training.reference import with_reference
from cpo_kernels.training.rundir import RunDir


@dataclass
class TrainResult:
    model: Any
    tokenizer: Any
    template: PromptTemplate
    objectives: list[Objective]
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl
    report: dict[str, Any]  # the counts of data.json
    eval_records: list[Record]


def train(
    source: str | Path | dict | Config,
    *,
    model: Any = None,
    tokenizer: Any = None,
    records: Sequence[Record] | None = None,
    eval_records: Sequence[Record] | None = None,
    overrides: Sequence[str] = (),
) -> TrainResult:
    """Train as the config says. Objects given here take the place of the config's files; `model` is changed in place.

    Raises ValueError or TypeError on a bad config, DataError on a broken line, FloatingPointError when the loss is not
    finite.
    """
    config = read_config(source, overrides)
    accelerator = Accelerator()
    run = RunDir(config, accelerator.is_main_process)
    report: dict[str, Any] = {}
    quiet = not (config.training.progress and accelerator.is_main_process)
    records, eval_records, objectives = load_data(config, records, eval_records, report, quiet)
    model, tokenizer = load_model(config.model, model, tokenizer, config.seed)
    model.to(accelerator.device).eval()
    template = PromptTemplate(tokenizer, config.template, objectives)
    initial = fingerprint(model)
    adapted = add_adapters(model, config.training, config.seed)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.training.compile:
        model.base_model.compile(dynamic=True)
    loss = StageLoss(model, config, objectives, accelerator.device)

    train_set = units_of("train", config, records, objectives, template, report)
    eval_set = units_of("eval", config, eval_records, objectives, template, report) if eval_records else []
    run.save_data(report, eval_records)
    loop = Loop(config, accelerator, run, model, loss, initial)
    loop.run_epochs(*loop.with_reference(train_set, eval_set, report))
    run.save_data(report, eval_records)
    if run.writes and config.training.save_model:
        card = model_card(config, template, objectives, run.metrics)
        save_model(model, tokenizer, run.folder / "model", adapted, card)
    accelerator.wait_for_everyone()
    return TrainResult(model, tokenizer, template, objectives, run.metrics, report, list(eval_records))


class Loop:
    def __init__(
        self, config: Config, accelerator: Accelerator, run: RunDir, model: Any, loss: StageLoss, initial: str
    ):
        self.config, self.training, self.accelerator = config, config.training, accelerator
        self.run, self.model, self.loss = run, model, loss
        self.initial = initial  # the hash of the weights at the start
        self.quiet = not (config.training.progress and accelerator.is_main_process)
        self.seen: list[tuple[Tensor, list[Encoded]]] = []  # loss and groups of the step's micro-batches

    def with_reference(
        self, train_set: list[Unit], eval_set: list[Unit], report: dict[str, Any]
    ) -> tuple[list[Unit], list[Unit]]:
        """Both sets with the log-probs of the model as it is now, where the loss needs them."""
        if not self.loss.needs_reference:
            return train_set, eval_set
        folder = Path(self.config.cache_dir) if self.config.cache_dir else None
        if folder is None and self.config.run_dir:
            folder = self.run.folder / "reference"
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            folder = folder / f"{self.initial}-{self.training.precision}.json"
        (train_set, eval_set), report["reference"] = with_reference(
            [train_set, eval_set], self.loss, folder, self.accelerator, self.quiet
        )
        return train_set, eval_set

    def run_epochs(self, train_set: Sequence[Unit], eval_set: Sequence[Unit]) -> None:
        training, run = self.training, self.run
        named = select_trainable(self.model, training)
        optimizer = make_optimizer(named, training)
        per_epoch = math.ceil(len(train_set) / training.batch_size)
        last = training.max_steps or math.ceil(training.epochs * per_epoch)
        same = {"initial_model": self.initial, "steps": last}  # what a continuation must share
        step, tokens = 0, 0
        if training.resume and (saved := checkpoints(run.folder / "checkpoints")):
            state = load_checkpoint(saved[-1], named, optimizer, same)
            step, tokens = state["step"], state["tokens"]
        run.start(step)
        if step == 0:
            self.evaluate(0, eval_set)
        bar = tqdm(total=last, initial=step, desc=self.config.stage, disable=self.quiet)
        epoch, steps = -1, list[list[Encoded]]()
        while step < last:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                steps = epoch_steps(train_set, training.batch_size, training.window, self.config.seed + epoch)
            lr = training.lr * schedule(step, last, training)
            row = self.step(steps[step % per_epoch], named, optimizer, lr)
            step, tokens = step + 1, tokens + row["tokens"]
            run.log({"step": step, "epoch": step / per_epoch} | row | {"tokens": tokens})
            if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
                self.stop(step, row)
            shown = {name: row[name] for name in ("loss", "accuracy", "margin", "tokens_per_second") if name in row}
            bar.set_postfix({name.replace("tokens_per_second", "tok/s"): f"{x:.3g}" for name, x in shown.items()})
            bar.update()
            if step == last or (training.eval_every and step % training.eval_every == 0):
                self.evaluate(step, eval_set)
            if run.writes and training.checkpoint_every and step % training.checkpoint_every == 0:
                state = {"step": step, "tokens": tokens} | same
                save_checkpoint(run.folder / "checkpoints", named, optimizer, state, training.keep)
        bar.close()
        run.close()
        self.model.eval()

    def step(self, groups: Sequence[Encoded], named: Any, optimizer: torch.optim.Optimizer, lr: float) -> dict:
        """Forward and backward over the micro-batches of a step, one update; its row of metrics."""
        started, total, device = time.perf_counter(), StepTotal.of(groups), self.accelerator.device
        sums = torch.zeros(len(self.loss.metrics) + 2, dtype=torch.float64, device=device)
        self.model.train()
        self.seen = []
        for part in self.parts(groups):
            batch = self.loss.collate(part)
            loss, metrics = self.loss(batch, total)
            loss.backward()
            self.seen.append((metrics[0], part))
            sums += torch.cat([metrics, metrics.new_tensor([batch.tokens, batch.input_ids.numel()])])
        *values, tokens, padded = reduce(sums, "sum").tolist()
        norm = math.nan
        if math.isfinite(values[0]):
            norm = update(named, optimizer, lr, self.training.clip, self.accelerator)
        seconds = time.perf_counter() - started
        row = dict(zip(self.loss.metrics, values, strict=True)) | (
            {"pairs": total.pairs} if self.loss.has_pairs else {}
        )
        row |= {"lr": lr, "grad_norm": norm, "tokens": int(tokens), "labels": total.tokens}
        row |= {f"conditioned_{name}": count for name, count in self.loss.conditioned(groups).items()}
        row |= {"padding": 1 - tokens / padded, "seconds": seconds, "tokens_per_second": tokens / seconds}
        return row | {"peak_memory_gib": peak_memory_gib(device)}

    def stop(self, step: int, row: dict[str, Any]) -> None:
        """Save what this step ran, by micro-batch, and raise. No parameter has taken part of it."""
        parts = [(float(loss), [vars(group) for group in part]) for loss, part in self.seen]
        every = [{"loss": loss, "groups": groups} for loss, groups in gather_object(parts)]
        self.run.json("nonfinite.json", row | {"step": step, "microbatches": every})
        saved = f"; its batch is in {self.run.folder / 'nonfinite.json'}" if self.run.path else ""
        raise FloatingPointError(
            f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {step}: lower training.lr (now "
            f"{row['lr']:g}) or look at the data{saved}"
        )

    @torch.no_grad()
    def evaluate(self, step: int, eval_set: Sequence[Unit]) -> None:
        """Log the loss and metrics of the held-out prompts as eval_*."""
        groups = [group for unit in eval_set for group in unit]
        if not groups:
            return
        self.model.eval()
        total, device = StepTotal.of(groups), self.accelerator.device
        sums = torch.zeros(len(self.loss.metrics), dtype=torch.float64, device=device)
        for part in tqdm(self.parts(groups, whole_step=False), "eval", leave=False, disable=self.quiet):
            sums += self.loss(self.loss.collate(part), total)[1]
        values = reduce(sums, "sum").tolist()
        self.run.log({"step": step} | {f"eval_{n}": x for n, x in zip(self.loss.metrics, values, strict=True)})

    def parts(self, groups: Sequence[Encoded], whole_step: bool = True) -> list[list[Encoded]]:
        """This process's micro-batches of `groups`."""
        parts = self.loss.parts(groups)
        if whole_step and self.loss.whole_step and len(parts) * self.accelerator.num_processes > 1:
            raise ValueError(
                f"loss.type {', '.join(self.config.loss.type)} needs a step in one micro-batch on one process, and it "
                f"takes {len(parts)}: raise training.tokens_per_microbatch or lower training.batch_size"
            )
        return parts[self.accelerator.process_index :: self.accelerator.num_processes]
