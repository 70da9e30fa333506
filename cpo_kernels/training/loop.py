"""The training loop: one function for all four stages.

    result = train("recipe.yaml")                                              # or a dict or a Config
    result = train(config, model=model, tokenizer=tokenizer, records=records)  # with objects in place of files

    cpsft  NLL of every response after its prompt and the tags of its own ratings    sft  the same without tags
    cdpo   preference loss on pairs ordered under the condition in their prompt      dpo  without conditions

The reference of cdpo and dpo is the model at the start of training. The loss of a micro-batch is divided by the
labelled tokens or pairs of its whole step, so gradient accumulation and several processes give the gradient of one
large batch. Everything specific to several processes is in `parallel`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from cpo_kernels.data.chat_template import level_template
from cpo_kernels.data.packing import Encoded, Unit, epoch_steps
from cpo_kernels.data.preparation import (
    check_sources,
    encodable,
    epoch_length,
    epochs_of,
    load_data,
    units_of,
)
from cpo_kernels.data.records import Record
from cpo_kernels.data.sources import notes
from cpo_kernels.data.template import PromptTemplate, check_prompt
from cpo_kernels.data.tokenizer import load_tokenizer
from cpo_kernels.hub import check_model_path
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import Config
from cpo_kernels.training.adapters import add_adapters
from cpo_kernels.training.checkpoints import checkpoints, load_checkpoint, save_checkpoint, training_state
from cpo_kernels.training.losses import FILTER_METRICS, StageLoss
from cpo_kernels.training.model_card import CONDITIONED, model_card
from cpo_kernels.training.models import (
    base_of_adapters,
    check_saving,
    check_tokens,
    fingerprint,
    load_model,
    save_model,
    select_trainable,
)
from cpo_kernels.training.optim import make_optimizer, peak_memory_gib, schedule
from cpo_kernels.training.parallel import (
    SHARDED,
    accumulation,
    backward,
    check_launcher,
    check_same,
    make_accelerator,
    prepare,
    share,
    to_save,
    together,
    update,
)
from cpo_kernels.training.reference import data_hash, with_reference
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
    source: str | Path | dict[str, Any] | Config,
    *,
    model: Any = None,
    tokenizer: Any = None,
    records: Sequence[Record] | None = None,
    eval_records: Sequence[Record] | None = None,
    overrides: Sequence[str] = (),
) -> TrainResult:
    """Train as the config specifies. Objects given here replace the config's files; `model` is modified in place.

    Raises ValueError or TypeError for a bad config, DataError for a broken line, FloatingPointError if the loss is not
    finite.
    """
    accelerator = make_accelerator()
    with together(accelerator):
        config = read_config(source, overrides)
        check_launcher(accelerator, config)
        run = RunDir(config, accelerator.is_main_process)
    try:
        return _train(config, accelerator, run, model, tokenizer, records, eval_records)
    finally:
        run.close()


def _train(
    config: Config,
    accelerator: Accelerator,
    run: RunDir,
    model: Any,
    tokenizer: Any,
    records: Sequence[Record] | None,
    eval_records: Sequence[Record] | None,
) -> TrainResult:
    report: dict[str, Any] = {}
    quiet = not (config.training.progress and accelerator.is_main_process)
    with together(accelerator):
        check_sources(config.data, records, eval_records)
        if model is None and config.model.name and not config.model.config:
            check_model_path(config.model.name)
        if tokenizer is None:
            tokenizer = load_tokenizer(config.model)  # before the data, which takes longer
        check_prompt(tokenizer, config.template)
        records, eval_records, objectives = load_data(config, records, eval_records, report, quiet)
        merged_into = base_of_adapters(config.model) if model is None else None
        model, tokenizer = load_model(config.model, model, tokenizer, config.seed)
        if accelerator.distributed_type not in SHARDED:  # those move it there in pieces
            model.to(accelerator.device)
        model.eval()
        template = PromptTemplate(tokenizer, config.template, objectives)
        template.set_end(model)
        chat_template = level_template(template, objectives if config.stage in CONDITIONED else ())
        records = encodable(config.data, records, template, report)
        eval_records = encodable(config.data, eval_records, template, report, may_be_empty=True)
        initial = fingerprint(model)
        adapted = add_adapters(model, config.training, config.seed)
        if run.writes and config.training.save_model:
            check_saving(model, tokenizer)
        if config.training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.training.compile:
            model.base_model.compile(dynamic=True)
        loss = StageLoss(model, config, objectives, accelerator.device)
        epochs = epochs_of(config, records, objectives, template, report)
        eval_set = units_of("eval", config, eval_records, objectives, template, report) if eval_records else []
        check_tokens(model, tokenizer, [group for units in (*epochs, eval_set) for unit in units for group in unit])
    same = {"initial_model": initial, "data": data_hash([*epochs, eval_set])}
    if accelerator.num_processes > 1:
        check_same(accelerator, weights=initial, data=same["data"])
    loop = Loop(config, accelerator, run, model, loss, same)
    for note in notes(report) if accelerator.is_main_process else ():
        print(note, file=sys.stderr, flush=True)
    with together(accelerator):
        run.begin(report, eval_records)
    loop.run_epochs(*loop.with_reference(epochs, eval_set, report))
    saving = run.path is not None and config.training.save_model
    saved, weights = to_save(model, loss.module, adapted, accelerator) if saving else (None, None)
    with together(accelerator):
        run.save_data(report, eval_records)
        if run.writes and saving:
            card = model_card(config, template, objectives, run.metrics, merged_into)
            save_model(saved, tokenizer, run.folder / "model", card, weights, chat_template)
    return TrainResult(model, tokenizer, template, objectives, run.metrics, report, list(eval_records))


class Loop:
    def __init__(
        self, config: Config, accelerator: Accelerator, run: RunDir, model: Any, loss: StageLoss, same: dict[str, str]
    ):
        self.config, self.training, self.accelerator = config, config.training, accelerator
        self.run, self.model, self.loss = run, model, loss
        self.same = same  # the hashes of the initial weights and of the data: a resumed run must have the same
        self.quiet = not (config.training.progress and accelerator.is_main_process)
        self.microbatches: list[tuple[Tensor, list[Encoded]]] = []  # loss and groups of the step's micro-batches
        with together(accelerator):
            optimizer = make_optimizer(select_trainable(model, config.training), config.training)
        self.optimizer = prepare(loss, optimizer, accelerator)
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def with_reference(
        self, epochs: list[list[Unit]], eval_set: list[Unit], report: dict[str, Any]
    ) -> tuple[list[list[Unit]], list[Unit]]:
        """All sets with the log-probs of the current model, for the groups whose loss needs them and that the run
        reaches."""
        if not self.loss.needs_reference:
            return epochs, eval_set
        folder = Path(self.config.cache_dir) if self.config.cache_dir else None
        if folder is None and self.config.run_dir:
            folder = self.run.folder / "reference"
        if folder:
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    folder.mkdir(parents=True, exist_ok=True)
            folder = folder / f"{self.same['initial_model']}-{self.training.precision}.json"
        (*epochs, eval_set), report["reference"] = with_reference(
            [*epochs, eval_set], self.loss, folder, self.accelerator, self.quiet, self.used(epochs, eval_set)
        )
        return epochs, eval_set

    def used(self, epochs: Sequence[Sequence[Unit]], eval_set: Sequence[Unit]) -> Callable[[Encoded], bool]:
        """Whether the run reaches a group: max_steps may end it earlier."""
        last = self.training.max_steps
        if not last or last >= sum(epoch_length(units, self.training) for units in epochs):
            return lambda group: True
        steps = [groups for _, groups in islice(self.batches(epochs, 0), last)]
        ids = {id(group) for groups in (*steps, *eval_set) for group in groups}
        return lambda group: id(group) in ids

    def run_epochs(self, epochs: Sequence[Sequence[Unit]], eval_set: Sequence[Unit]) -> None:
        """`epochs`: the units of each epoch; the last is used for all that follow."""
        training, run = self.training, self.run
        last = training.max_steps or self.steps_of(epochs)
        same = {**self.same, "steps": last}
        step, tokens = 0, 0
        with together(self.accelerator):
            if training.resume and (saved := checkpoints(run.folder / "checkpoints")):
                state = load_checkpoint(saved[-1], self.named, self.optimizer, same)
                step, tokens = state["step"], state["tokens"]
            run.start(step)
        check_same(self.accelerator, checkpoints=step)
        if step == 0:
            self.evaluate(0, eval_set)
        bar = tqdm(total=last, initial=step, desc=self.config.stage, disable=self.quiet)
        batches = self.batches(epochs, step)
        while step < last:
            epoch, groups = next(batches)
            row = self.step(step, groups, training.lr * schedule(step, last, training))
            step, tokens = step + 1, tokens + row["tokens"]
            run.log({"step": step, "epoch": epoch} | row | {"tokens": tokens})
            if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
                self.stop(step, row)
            shown = {name: row[name] for name in ("loss", "accuracy", "margin", "tokens_per_second") if name in row}
            bar.set_postfix({name.replace("tokens_per_second", "tok/s"): f"{x:.3g}" for name, x in shown.items()})
            bar.update()
            if step == last or (training.eval_every and step % training.eval_every == 0):
                self.evaluate(step, eval_set)
            if training.checkpoint_every and step % training.checkpoint_every == 0:
                tensors = training_state(self.named, self.optimizer, keep=run.writes)
                with together(self.accelerator):
                    if run.writes:
                        state = {"step": step, "tokens": tokens} | same
                        save_checkpoint(run.folder / "checkpoints", tensors, state, training.keep)
        bar.close()
        self.model.eval()

    def steps_of(self, epochs: Sequence[Sequence[Unit]]) -> int:
        """Number of steps of `training.epochs`, the last of which may be partial; at least one."""
        whole, part = divmod(self.training.epochs, 1)
        lengths = [epoch_length(epochs[min(i, len(epochs) - 1)], self.training) for i in range(int(whole) + 1)]
        return max(1, sum(lengths[:-1]) + math.ceil(part * lengths[-1] - 1e-9))  # 1.1 - 1 is a little more than 0.1

    def batches(self, epochs: Sequence[Sequence[Unit]], start: int) -> Iterator[tuple[float, list[Encoded]]]:
        """(epochs completed after it, groups) of each step from step `start` on, endlessly."""
        before, training = 0, self.training
        for epoch in count():
            units = epochs[min(epoch, len(epochs) - 1)]
            steps = epoch_length(units, training)
            if before + steps > start:
                groups = epoch_steps(units, training.batch_size, training.window, self.config.seed + epoch)
                for i in range(max(0, start - before), steps):
                    yield epoch + (i + 1) / steps, groups[i]
            before += steps

    def step(self, number: int, groups: Sequence[Encoded], lr: float) -> dict[str, Any]:
        """Forward and backward over the micro-batches of a step, then one update. Returns its row of metrics."""
        accelerator, device, module = self.accelerator, self.accelerator.device, self.loss.module
        started, total = time.perf_counter(), self.loss.total(groups)
        sums = torch.zeros(len(self.loss.metrics) + 2, dtype=torch.float64, device=device)
        torch.manual_seed(hash((self.config.seed, number, accelerator.process_index)))  # of dropout
        self.model.train()
        self.microbatches = []
        parts = self.parts(groups)
        for i, (part, weight) in enumerate(parts, 1):
            batch = self.loss.collate(part)
            with accumulation(module, i == len(parts)):
                loss, metrics = self.loss(batch, total)
                backward(weight * loss, module, accelerator, i == len(parts))
            if weight:
                self.microbatches.append((metrics[0], part))
                sums += torch.cat([metrics, metrics.new_tensor([batch.tokens, batch.input_ids.numel()])])
        everywhere = accelerator.gather(torch.cat([sums, sums.new_tensor([peak_memory_gib(device)])])[None])
        *values, tokens, padded = everywhere[:, :-1].sum(0).tolist()
        norm = math.nan
        if math.isfinite(values[0]):
            norm = update(self.named, self.optimizer, lr, self.training.clip, accelerator, module)
        seconds = time.perf_counter() - started
        row = dict(zip(self.loss.metrics, values, strict=True))
        row |= {"pairs": total.pairs} if self.loss.has_pairs else {}
        row |= {"lr": lr, "grad_norm": norm, "tokens": int(tokens), "labels": total.tokens}
        row |= self.loss.asked(groups)
        row |= {"padding": 1 - tokens / padded, "seconds": seconds, "tokens_per_second": tokens / seconds}
        return row | {"peak_memory_gib": float(everywhere[:, -1].max())}

    def stop(self, step: int, row: dict[str, Any]) -> None:
        """Save this step's micro-batches and raise. No parameter was updated."""
        parts = [(float(loss), [vars(group) for group in part]) for loss, part in self.microbatches]
        every = [{"loss": loss, "groups": groups} for loss, groups in gather_object(parts)]
        self.run.json("nonfinite.json", row | {"step": step, "microbatches": every})
        saved = f"; its batch is in {self.run.folder / 'nonfinite.json'}" if self.run.path else ""
        raise FloatingPointError(
            f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {step}: lower training.lr (now "
            f"{row['lr']:g}) or check the data{saved}"
        )

    @torch.no_grad()
    def evaluate(self, step: int, eval_set: Sequence[Unit]) -> None:
        """Log loss and metrics on the held-out prompts as eval_*."""
        groups = [group for unit in eval_set for group in unit]
        if not groups:
            return
        self.model.eval()
        total = self.loss.total(groups)
        sums = torch.zeros(len(self.loss.metrics), dtype=torch.float64, device=self.accelerator.device)
        for part, weight in tqdm(self.parts(groups, coupled=False), "eval", leave=False, disable=self.quiet):
            metrics = self.loss(self.loss.collate(part), total)[1]
            sums += metrics if weight else 0
        values = self.accelerator.gather(sums[None]).sum(0).tolist()
        named = zip(self.loss.metrics, values, strict=True)  # without gradients there is nothing to filter
        self.run.log({"step": step} | {f"eval_{n}": x for n, x in named if n not in FILTER_METRICS})

    def parts(self, groups: Sequence[Encoded], coupled: bool = True) -> list[tuple[list[Encoded], float]]:
        """This process's micro-batches of `groups`, with their weights."""
        ranks = self.accelerator.num_processes
        parts = self.loss.parts(groups, ranks)
        if coupled and self.loss.has_pairs and self.loss.loss_fn.options.couples_pairs and len(parts) * ranks > 1:
            raise ValueError(
                f"loss.type {', '.join(self.config.loss.type)} sorts all pairs of a step, so a step must be one "
                f"micro-batch on one process, but it is {len(parts)} on {ranks}: raise "
                "training.tokens_per_microbatch or lower training.batch_size"
            )
        return share(parts, self.accelerator)
