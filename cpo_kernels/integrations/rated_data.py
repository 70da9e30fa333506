"""Controllable Preference Optimization inside TRL: rated responses as rows for its trainers.

    data = RatedData(dataset, tokenizer, objectives)
    trainer = FusedSFTTrainer(model, args, train_dataset=data.cpsft(), processing_class=tokenizer)         # stage one
    trainer.train()
    data.save(trainer, "runs/cpsft")
    args = FusedDPOConfig("runs/cdpo", objectives=objectives)                                              # stage two
    trainer = FusedDPOTrainer("runs/cpsft/model", None, args, train_dataset=data.cdpo(), processing_class=tokenizer)

Conditions, pairs, texts and token ids are made by the code that runs recipes. Rows hold token ids, because TRL would
encode a conversation differently: with what the chat template writes after the end of a turn, and without an end token
where the template writes none.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cpo_kernels.extras import explained

try:
    import yaml
    from datasets import Dataset, Features, List, Value
except ModuleNotFoundError as error:
    raise explained(error, __name__) from error

from cpo_kernels.data.chat_template import level_template
from cpo_kernels.data.packing import Encoded
from cpo_kernels.data.preparation import units_of
from cpo_kernels.data.rows import rows_of
from cpo_kernels.data.sources import Table, check_rated, notes, records_of
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.files import atomic_text
from cpo_kernels.integrations.trl import NAMES_COLUMN, objective_list
from cpo_kernels.objectives import Objective, value_gap
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import ConditionsConfig, Config

NAME = "the dataset"
LAYOUT_OF_COLUMN = {"responses": "records", "response": "answers", "chosen_scores": "rated_pairs", "chosen": "pairs"}
TEXT, IDS, LEVELS = Value("string"), List(Value("int64")), List(Value("float64"))


class RatedData:
    """Rated responses as rows for TRL: `cpsft()` for `FusedSFTTrainer`, `cdpo()` for `FusedDPOTrainer`.

    Args:
        dataset: a `datasets.Dataset`, a stream, or a list of dicts, with one of these sets of columns:

            - `prompt`, `responses`, a list of `{text, ratings: {objective: number}}`
            - `prompt`, `response`, `ratings`: the rows of a prompt are grouped
            - `prompt`, `chosen`, `rejected`, `chosen_scores`, `rejected_scores`, with a number for each objective: the
              rows of a prompt are grouped
            - `prompt`, `chosen`, `rejected`, and optionally `score_chosen` and `score_rejected`: one objective

            Prompts and responses are texts or messages; a missing rating is null.
        tokenizer: of the model that is trained; the conversation's form is its chat template.
        objectives: what the responses are rated on: `Objective`s or dicts of their fields.
        template: keys of a recipe's `template`. `prompt` is `chat` by default if the rows hold messages, else
            `{tags}{prompt}`.
        layout, fields: a recipe's `data.layout` and `data.fields`, for other columns and for published data sets.
        max_prompt_tokens, max_tokens: longer prompts are left out and longer responses cut, with a warning.
        seed: of all draws.

    Attributes:
        objectives, template, records: what was read.
        report: counts of the last draw: units, pairs, ties, unrated, long_prompts, cut_responses, ...

    Raises:
        ValueError, TypeError: a row (with its number), column, key or number that cannot be used.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        tokenizer: Any,
        objectives: Sequence[Objective | Mapping[str, Any]],
        *,
        template: Mapping[str, Any] | None = None,
        layout: str | None = None,
        fields: Mapping[str, Any] | None = None,
        max_prompt_tokens: int = 512,
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        self.objectives = [o if isinstance(o, Objective) else Objective(**o) for o in objective_list(objectives)]
        if not self.objectives:
            raise ValueError("objectives is empty: name at least one that the responses are rated on")
        rows = list(rows_of(dataset, NAME))
        if not rows:
            raise ValueError(f"{NAME} is empty")
        first: Any = rows[0][1]
        said = first.get("prompt", first.get("chosen"))
        chat = {"prompt": "chat"} if isinstance(said, list) else {}
        data: dict[str, Any] = {"layout": layout or _layout_of(first), "fields": dict(fields or {})}
        data |= {"max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
        named = [asdict(o) for o in self.objectives]
        self._keys = {"objectives": named, "data": data, "template": chat | dict(template or {}), "seed": seed}
        self.config = self._config("cpsft", None)
        self.report: dict[str, Any] = {}
        table = Table(NAME, self.config.data.layout, rows)
        self.records = records_of([table], self.config.data, self.objectives, self.report)
        self.template = PromptTemplate(tokenizer, self.config.template, self.objectives)
        check_rated(self.records, self.objectives, NAME)
        for note in notes(self.report):
            warnings.warn(note, stacklevel=2)

    def cpsft(self, conditions: Mapping[str, Any] | ConditionsConfig | None = None) -> Dataset:
        """Stage one: a response with its prompt under the tags of its own ratings a row, each rated response once.

        Columns: `prompt`, `completion`, and their tokens, `input_ids` with `completion_mask`. `conditions` are the keys
        of a recipe's section of that name, such as `{"mixture": [{"sampler": "attained"}], "strip_best": 0.5}`.
        """
        features = {"prompt": TEXT, "completion": TEXT, "input_ids": IDS, "completion_mask": IDS}
        rows = []
        text = self._decoder()
        for group in self._draw("cpsft", conditions):
            prompt, (response,) = group.prompt, group.responses
            mask = [0] * len(prompt) + [1] * len(response)
            rows.append((text(prompt), text(response), prompt + response, mask))
        return _dataset(rows, features)

    def cdpo(self, conditions: Mapping[str, Any] | ConditionsConfig | None = None) -> Dataset:
        """Stage two: a pair of responses with its prompt under the tags of a drawn condition a row; ties are left out.

        Columns: `prompt`, `chosen`, `rejected`, their tokens, `prompt_ids`, `chosen_ids` and `rejected_ids`, and the
        numbers of the loss, `chosen_scores`, `rejected_scores` and `condition`, of the objectives named in
        `objectives`. `chosen` has the higher value under the condition. `conditions` as in `cpsft`; `per_prompt`,
        `responses`, `pairs` and `draws` say how many pairs.
        """
        features = {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}
        features |= {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
        features |= {"chosen_scores": LEVELS, "rejected_scores": LEVELS, "condition": LEVELS, NAMES_COLUMN: List(TEXT)}
        names = [o.name for o in self.objectives]
        pairs = [(group, *pair) for group in self._draw("cdpo", conditions) for pair in group.pairs]
        first, second, asked = (
            torch.tensor(rows, dtype=torch.float64)
            for rows in zip(*((g.scores[a], g.scores[b], g.condition) for g, a, b in pairs), strict=True)
        )
        gaps = value_gap(first, second, asked, self.objectives).tolist()
        rows = []
        text = self._decoder()
        for (group, a, b), gap in zip(pairs, gaps, strict=True):
            order = (a, b) if gap > 0 else (b, a)
            responses = [group.responses[i] for i in order]
            levels = [_with_nulls(row) for row in (*(group.scores[i] for i in order), group.condition)]
            rows.append((text(group.prompt), *map(text, responses), group.prompt, *responses, *levels, names))
        return _dataset(rows, features)

    def save(self, trainer: Any, folder: str | Path | None = None) -> Path:
        """Save the trained model for `cpo-kernels eval` and `play`, and return its folder.

        `folder` (default: the trainer's `output_dir`) gets config.yaml, which has the objectives, the template and the
        last conditions, and model/, for `from_pretrained`. Its chat template takes levels,
        `apply_chat_template(messages, honesty=5)`, and generation ends where the responses ended in training. Call it
        on all processes.
        """
        folder = Path(trainer.args.output_dir if folder is None else folder)
        self.template.set_end(trainer.accelerator.unwrap_model(trainer.model))
        trainer.save_model(str(folder / "model"))
        if trainer.is_world_process_zero():
            self.template.tokenizer.save_pretrained(folder / "model")
            source = level_template(self.template, self.objectives)
            atomic_text(source, folder / "model" / "chat_template.jinja")
            keys = self._keys | {"stage": self.config.stage, "conditions": asdict(self.config.conditions)}
            atomic_text(yaml.safe_dump(keys, sort_keys=False, allow_unicode=True), folder / "config.yaml")
        return folder

    def _config(self, stage: str, conditions: Any) -> Config:
        config = read_config(self._keys | {"stage": stage, "conditions": conditions or {}})
        if config.conditions.anew:
            raise ValueError("conditions.anew: rows are drawn once here; set conditions.draws to draw a prompt again")
        return config

    def _draw(self, stage: str, conditions: Any) -> list[Encoded]:
        self.config = self._config(stage, conditions)
        report: dict[str, Any] = {}
        units = units_of("train", self.config, self.records, self.objectives, self.template, report)
        self.report = counts = report["train"]
        for note in notes(report):
            warnings.warn(note, stacklevel=3)
        limits = f"max_prompt_tokens {self.config.data.max_prompt_tokens}, max_tokens {self.config.data.max_tokens}"
        for name, what in {"long_prompts": "prompts left out", "cut_responses": "responses cut"}.items():
            if counts[name]:
                warnings.warn(f"{counts[name]} {what}: {limits}", stacklevel=3)
        return list(itertools.chain.from_iterable(units))

    def _decoder(self) -> Any:
        """Token ids to text; a prompt that many rows share is decoded once."""
        decode = self.template.tokenizer.decode
        return functools.cache(lambda ids: decode(list(ids), clean_up_tokenization_spaces=False))


def _layout_of(row: Any) -> str:
    """The layout that a row's columns show."""
    layouts = [layout for column, layout in LAYOUT_OF_COLUMN.items() if column in row]
    if not layouts:
        raise ValueError(
            f"{NAME} has the columns {', '.join(row)}, but none of {', '.join(LAYOUT_OF_COLUMN)}: rename them, or say "
            "with layout and fields what they hold"
        )
    return layouts[0]


def _with_nulls(levels: Sequence[float]) -> list[float | None]:
    return [None if level != level else level for level in levels]


def _dataset(rows: Sequence[tuple[Any, ...]], features: Mapping[str, Any]) -> Dataset:
    columns = dict(zip(features, map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict(columns, features=Features(features))
