"""The data of a run, from its config: records, objectives, and the units of each split."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cpo_kernels.data.conditions import Draws, prepare
from cpo_kernels.data.packing import Unit, encode
from cpo_kernels.data.records import DataError, Record
from cpo_kernels.data.rows import source_files
from cpo_kernels.data.sources import (
    check_rated,
    count_bad_line,
    load_records,
    overall_objective,
    split_by_prompt,
)
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.hub import check_exists
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.keys import Config, DataConfig, TrainingConfig


def check_sources(data: DataConfig, records: Any = None, eval_records: Any = None) -> None:
    """Raise ValueError or FileNotFoundError if a source that the run will read does not exist. Sources whose records
    are given as objects are not checked."""
    if records is None and not data.train:
        raise ValueError("data.train is empty: set what to train on, --data.train FILE (or a folder or hub name)")
    reads = {"train": data.train if records is None else [], "eval": data.eval if eval_records is None else []}
    for split, sources in reads.items():
        for number, source in enumerate(sources):
            for path in source_files(source, f"data.{split}[{number}]"):
                check_exists(path, f"data.{split}[{number}]", "dataset")


def load_data(
    config: Config,
    records: Sequence[Record] | None,
    eval_records: Sequence[Record] | None,
    report: dict[str, Any],
    quiet: bool = True,
) -> tuple[Sequence[Record], Sequence[Record], list[Objective]]:
    """(records to train on, held-out records, objectives)."""
    data = config.data
    objectives = [Objective(o.name, o.low, o.high, o.weight, o.strength) for o in config.objectives]
    if records is None:
        records = load_records(data.train, data, objectives, report, quiet)
    if eval_records is None and data.eval:
        eval_records = load_records(data.eval, data, objectives, report, quiet)
    elif eval_records is None:
        records, eval_records = split_by_prompt(records, data.eval_share, data.split_seed)
    layouts = {source.layout or data.layout for source in [*data.train, *data.eval]} or {data.layout}
    if not objectives and layouts <= {"pairs", "hh_rlhf", "helpsteer3"}:
        objectives = [overall_objective([*records, *eval_records])]
    elif not objectives and config.stage != "sft":
        raise ValueError(f"objectives: stage {config.stage} needs at least one, with name, low and high")
    if config.stage != "sft":  # which may train on unrated responses
        check_rated([*records, *eval_records], objectives, "the data")
    return records, eval_records, objectives


def encodable(
    data: DataConfig,
    records: Sequence[Record],
    template: PromptTemplate,
    report: dict[str, Any],
    may_be_empty: bool = False,
) -> Sequence[Record]:
    """With `data.on_bad_line: skip`, the records without those on which the chat template or tokenizer fails, which the
    report counts. Otherwise all of them: encoding such a row raises later."""
    if data.on_bad_line != "skip":
        return records
    kept, bad = [], dict[str, DataError]()
    for record in records:
        try:
            template.encode(record.prompt, None, record.responses, record.place)
            kept.append(record)
            continue
        except DataError:
            responses = []
        for response in record.responses:
            try:
                template.encode(record.prompt, None, [response], record.place)
                responses.append(response)
            except DataError as error:
                bad.setdefault(response.place or str(error), error)
        if responses or not record.responses:
            kept.append(replace(record, responses=tuple(responses)))
    for failure in bad.values():
        count_bad_line(report, failure)
    if bad and not kept and not may_be_empty:
        raise ValueError(f"the chat template or tokenizer fails on every row; the first: {next(iter(bad.values()))}")
    return kept


def units_of(
    split: str,
    config: Config,
    records: Sequence[Record],
    objectives: Sequence[Objective],
    template: PromptTemplate,
    report: dict[str, Any],
    epoch: int = 0,
) -> list[Unit]:
    """Draw conditions, responses and pairs and tokenize them; report[split] counts what was left out. Held-out units
    may be empty (few prompts, all ties or too long)."""
    draws = draws_of(config, records, objectives, epoch, split == "eval")
    if split == "eval" and 0 < config.training.eval_size < len(draws.units):
        draws.units = random.Random(config.seed).sample(draws.units, config.training.eval_size)
    limits = config.data.max_prompt_tokens, config.data.max_tokens
    units = encode(draws, template, objectives, *limits, may_be_empty=split == "eval")
    report[split] = {"prompts": len({record.prompt for record in records}), "units": len(units)} | draws.counts
    return units


def epochs_of(
    config: Config,
    records: Sequence[Record],
    objectives: Sequence[Objective],
    template: PromptTemplate,
    report: dict[str, Any],
) -> list[list[Unit]]:
    """The training units: one list per epoch that the run reaches with `conditions.anew`, otherwise a single list for
    all. `report` counts the first epoch."""
    training = config.training
    epochs = [units_of("train", config, records, objectives, template, report)]
    if not config.conditions.anew:
        return epochs
    steps = epoch_length(epochs[0], training)
    while steps < training.max_steps if training.max_steps else len(epochs) < training.epochs:
        epochs.append(units_of("train", config, records, objectives, template, {}, len(epochs)))
        steps += epoch_length(epochs[-1], training)
    report["train"]["epochs_drawn"] = len(epochs)
    return epochs


def epoch_length(units: Sequence[Unit], training: TrainingConfig) -> int:
    """Number of optimizer steps of an epoch."""
    return math.ceil(len(units) / training.batch_size)


def draws_of(
    config: Config,
    records: Sequence[Record],
    objectives: Sequence[Objective],
    epoch: int = 0,
    may_be_empty: bool = False,
) -> Draws:
    """Conditions, responses and pairs, drawn for the stage, seed and epoch."""
    tie_margin = config.loss.options.get("tie_margin", 1e-6)
    seed = config.seed + (epoch << 32)  # no seed of another run
    return prepare(config.stage, records, objectives, config.conditions, seed, tie_margin, may_be_empty)
