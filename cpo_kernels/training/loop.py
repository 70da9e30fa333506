"""The training loop: one function for all four stages.

    result = train("recipe.yaml")                       # or a dict or a Config
    result = train(config, model=model, tokenizer=tokenizer, records=records)

    cpsft  NLL of every response after prompt and tags of its own ratings        sft  the same without tags
    cdpo   preference loss on pairs ordered under the prompt's condition          dpo  pairs ordered without one

The reference of cdpo and dpo is the model as it is at the start. A step's loss is divided by what the whole step
holds (its tokens or its pairs), so gradient accumulation and several processes give the gradient of one big batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor
from tqdm import tqdm

import cpo_kernels as cpo
from cpo_kernels.data.conditions import prepare
from cpo_kernels.data.packing import Batch, Encoded, collate, encode, epoch_steps, microbatches
from cpo_kernels.data.records import Record, write_records
from cpo_kernels.data.sources import load_records, overall_objective, split_by_prompt
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.objectives import Objective
from cpo_kernels.training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from cpo_kernels.training.config import Config, TrainingConfig, read_config
from cpo_kernels.training.models import (
    check_shared_prompt,
    fingerprint,
    head_of,
    load_model,
    save_model,
    select_trainable,
)
from cpo_kernels.training.reference import with_reference
from cpo_kernels.training.rundir import RunDir

SUMS = ("loss", "chosen_rewards", "rejected_rewards", "accuracy", "margin")  # of a step, over its pairs
Unit = tuple[Encoded, ...]


@dataclass
class TrainResult:
    model: Any
    tokenizer: Any
    template: PromptTemplate
    objectives: list[Objective]
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl
    report: dict[str, Any]  # the counts of data.json
    eval_records: list[Record]


class Objectives:
    """What a batch is worth: the backbone's hidden states of the labelled positions, then the fused head."""

    def __init__(self, model: Any, config: Config, objectives: Sequence[Objective], device: torch.device):
        self.model, self.head, self.device = model, head_of(model), device
        self.preferring = config.stage in ("cdpo", "dpo")
        self.bf16 = config.training.precision == "bf16"
        # sums that only a whole step knows: sorts over pairs, the mean over chosen tokens
        coupled = {"aot", "aot_unpaired", "sft", "orpo", "contrastive_cpo"}
        self.whole_step = self.preferring and not coupled.isdisjoint(config.loss.type)
        if self.preferring:
            loss = config.loss
            self.loss_fn = cpo.FusedLinearCPOLoss(
                objectives,
                beta=loss.beta,
                loss_type=loss.type,
                loss_weights=loss.weights,
                softcap=self.head.softcap,
                scale=self.head.scale,
                **loss.options,
            )

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def hidden(self, batch: Batch) -> Tensor:
        """[N, H]: the last hidden state at each position that predicts a label."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.rows)

    def seq_logps(self, batch: Batch) -> Tensor:
        """[S] log-probs of the responses, without gradients."""
        head = self.head
        with torch.no_grad(), self.autocast():
            logps = cpo.linear_token_logps(
                self.hidden(batch), head.weight, batch.labels, head.bias, softcap=head.softcap, scale=head.scale
            )
        return cpo.sequence_logps(logps, batch.cu_seqlens)

    def __call__(self, batch: Batch, total: StepTotal) -> tuple[Tensor, Tensor]:
        """(loss of this batch divided by what the step holds, its part of SUMS)."""
        head = self.head
        with self.autocast():
            hidden = self.hidden(batch)
            if not self.preferring:
                options = {"softcap": head.softcap, "scale": head.scale, "num_tokens": total.tokens}
                loss = cpo.linear_nll(hidden, head.weight, batch.labels, head.bias, **options)
                return loss, loss.detach().double().reshape(1)
            out = self.loss_fn(
                hidden,
                head.weight,
                batch.labels,
                bias=head.bias,
                pairs=batch.pairs,
                ref_logps=batch.ref_logps,
                scores=batch.scores,
                conditions=batch.conditions,
                cu_seqlens=batch.cu_seqlens,
                num_pairs=total.pairs,
            )
        part = len(batch.pairs) / total.pairs
        means = [out.chosen_rewards.mean(), out.rejected_rewards.mean(), out.accuracy, out.margin]
        return out.loss, torch.stack([out.loss.detach(), *[part * mean for mean in means]]).double()


@dataclass(frozen=True)
class StepTotal:
    """What all micro-batches of a step hold together, on all processes."""

    tokens: int  # with a label
    pairs: int

    @staticmethod
    def of(groups: Sequence[Encoded]) -> StepTotal:
        return StepTotal(sum(g.labels for g in groups), sum(len(g.pairs) for g in groups))


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

    Raises ValueError or TypeError on a bad config, DataError on a broken line, FloatingPointError on a loss that is
    not finite.
    """
    config = read_config(source, overrides)
    training, accelerator = config.training, Accelerator()
    is_main = accelerator.is_main_process
    objectives = [Objective(o.name, o.low, o.high, o.weight, o.strength) for o in config.objectives]
    run = RunDir(config, is_main)
    report: dict[str, Any] = {}
    if records is None:
        records = load_records(config.data.train, config.data, objectives, report)
    if eval_records is None and config.data.eval:
        eval_records = load_records(config.data.eval, config.data, objectives, report)
    elif eval_records is None:
        records, eval_records = split_by_prompt(records, config.data.eval_share, config.data.split_seed)
    if not objectives and config.data.layout == "pairs":
        objectives = [overall_objective(records)]
    elif not objectives and config.stage != "sft":
        raise ValueError(f"objectives: stage {config.stage} needs at least one, with name, low and high")

    model, tokenizer = load_model(config.model, model, tokenizer, config.seed)
    model.to(accelerator.device)
    template = PromptTemplate(tokenizer, config.template, objectives)
    losses = Objectives(model, config, objectives, accelerator.device)
    share_prompt = training.share_prompt and losses.preferring
    if share_prompt:
        check_shared_prompt(model)

    sets = []
    for split, part in (("train", records), ("eval", eval_records)):
        if not part:
            sets.append([])
            continue
        tie_margin = config.loss.options.get("tie_margin", 1e-6)
        draws = prepare(config.stage, part, objectives, config.conditions, config.seed + len(sets), tie_margin)
        sets.append(encode(draws, template, objectives, config.data.max_prompt_tokens, config.data.max_tokens))
        report[split] = {"prompts": len({r.prompt for r in part})} | draws.counts
    initial = fingerprint(model)
    if losses.preferring and losses.loss_fn.options.needs_reference:
        model.eval()
        cache = Path(config.cache_dir) if config.cache_dir else run.path and run.path / "reference"
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
            cache = cache / f"{initial}-{training.precision}.json"
        budget = training.tokens_per_microbatch
        sets, report["reference"] = with_reference(
            sets, losses.seq_logps, cache, accelerator, budget, share_prompt, training.progress and is_main
        )
    train_set, eval_set = sets
    run.json("data.json", report)
    if run.writes:
        write_records(eval_records, run.path / "eval_records.jsonl")

    named = select_trainable(model, training)
    optimizer = make_optimizer(named, training)
    per_epoch = math.ceil(len(train_set) / training.batch_size)
    total_steps = training.max_steps or math.ceil(training.epochs * per_epoch)
    state = {"step": 0, "tokens": 0, "initial_model": initial, "total_steps": total_steps}
    if training.resume and (saved := checkpoints(run.path / "checkpoints")):
        expect = {"initial_model": initial, "total_steps": total_steps}
        state = load_checkpoint(saved[-1], named, optimizer, expect)
        run.rewind(state["step"])

    def batches(groups: Sequence[Encoded]) -> list[list[Encoded]]:
        found = list(microbatches(groups, training.tokens_per_microbatch, share_prompt))
        if losses.whole_step and len(found) * accelerator.num_processes > 1:
            raise ValueError(
                f"loss.type {', '.join(config.loss.type)} needs a step in one micro-batch, and here it takes "
                f"{len(found)}: raise training.tokens_per_microbatch or lower training.batch_size"
            )
        return found[accelerator.process_index :: accelerator.num_processes]

    def evaluate(step: int) -> None:
        if not eval_set:
            return
        model.eval()
        groups = [group for unit in eval_set for group in unit]
        total, sums = StepTotal.of(groups), torch.zeros(len(SUMS), dtype=torch.float64)
        with torch.no_grad():
            for part in tqdm(batches(groups), "eval", leave=False, disable=not (training.progress and is_main)):
                _, found = losses(collate(part, share_prompt).to(accelerator.device), total)
                sums[: len(found)] += found.cpu()
        names = SUMS if losses.preferring else SUMS[:1]
        values = reduce(sums.to(accelerator.device), "sum").tolist()
        run.log({"step": step} | {f"eval_{name}": value for name, value in zip(names, values, strict=False)})

    if state["step"] == 0:
        evaluate(0)
    bar = tqdm(total=total_steps, initial=state["step"], desc=config.stage, disable=not (training.progress and is_main))
    steps: list[list[Encoded]] = []
    epoch = -1
    while state["step"] < total_steps:
        step = state["step"]
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            steps = epoch_steps(train_set, training.batch_size, training.window, config.seed + epoch)
        groups = steps[step % per_epoch]
        total, started, tokens, padded = StepTotal.of(groups), time.perf_counter(), 0, 0
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=accelerator.device)
        model.train()
        for part in batches(groups):
            batch = collate(part, share_prompt).to(accelerator.device)
            loss, found = losses(batch, total)
            loss.backward()
            sums[: len(found)] += found
            tokens, padded = tokens + batch.tokens, padded + batch.input_ids.numel()
        lr = training.lr * schedule(step, total_steps, training)
        norm = update(named, optimizer, lr, training.clip, accelerator)
        counts = torch.tensor([tokens, padded], dtype=torch.float64, device=accelerator.device)
        values, (tokens, padded) = reduce(sums, "sum").tolist(), reduce(counts, "sum").tolist()
        if not math.isfinite(values[0]):
            raise FloatingPointError(f"loss is {values[0]} at step {step + 1}: lower training.lr (now {lr:g})")
        seconds = time.perf_counter() - started
        names = SUMS if losses.preferring else SUMS[:1]
        row = dict(zip(names, values, strict=False)) | ({"pairs": total.pairs} if losses.preferring else {})
        state |= {"step": step + 1, "tokens": state["tokens"] + int(tokens)}
        row |= {"lr": lr, "grad_norm": norm, "tokens": state["tokens"], "labels": total.tokens}
        row |= {"padding": 1 - tokens / padded, "seconds": seconds, "tokens_per_second": tokens / seconds}
        run.log({"step": step + 1, "epoch": (step + 1) / per_epoch} | row)
        shown = ("loss", "accuracy", "margin", "tokens_per_second")
        bar.set_postfix(
            {name.replace("tokens_per_second", "tok/s"): f"{row[name]:.3g}" for name in shown if name in row}
        )
        bar.update()
        if step + 1 == total_steps or (training.eval_every and (step + 1) % training.eval_every == 0):
            evaluate(step + 1)
        if run.writes and training.checkpoint_every and (step + 1) % training.checkpoint_every == 0:
            save_checkpoint(run.path / "checkpoints", named, optimizer, state, training.keep)
    bar.close()
    model.eval()
    if run.writes and training.save_model:
        save_model(model, tokenizer, run.path / "model")
    accelerator.wait_for_everyone()
    return TrainResult(model, tokenizer, template, objectives, run.metrics, report, list(eval_records))


def make_optimizer(named: Sequence[tuple[str, torch.nn.Parameter]], training: TrainingConfig) -> torch.optim.AdamW:
    matrices = [p for _, p in named if p.dim() >= 2]
    vectors = [p for _, p in named if p.dim() < 2]
    parts = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    beta1, beta2 = training.betas
    return torch.optim.AdamW([p for p in parts if p["params"]], lr=training.lr, betas=(beta1, beta2), fused=True)


def schedule(step: int, total: int, training: TrainingConfig) -> float:
    """Factor on the peak learning rate at `step` of 0 .. total - 1: warm-up, then decay."""
    warmup = training.warmup if training.warmup >= 1 else training.warmup * total
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    left = (total - step) / max(1.0, total - warmup)
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda x: x,
        "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
        "constant": lambda x: 1.0,
    }
    return shapes[training.schedule](min(1.0, left))


def update(
    named: Sequence[tuple[str, torch.nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    lr: float,
    clip: float,
    accelerator: Accelerator,
) -> float:
    """One optimizer step on the gradients summed over processes; the gradient norm before clipping."""
    parameters = [p for _, p in named]
    if accelerator.num_processes > 1:
        for p in parameters:
            p.grad = reduce(p.grad if p.grad is not None else torch.zeros_like(p), "sum")
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)
