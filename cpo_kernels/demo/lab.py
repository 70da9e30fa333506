"""The generated world of one seed, with what every method of the comparison shares: data, budget, trained models."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpo_kernels.data.records import Record
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.demo.judge import MAX_NEW_TOKENS, held_out
from cpo_kernels.demo.model import build_model, build_tokenizer
from cpo_kernels.demo.run import Size, make_data
from cpo_kernels.demo.world import OBJECTIVES, World
from cpo_kernels.objectives import Objective
from cpo_kernels.training.keys import TemplateConfig
from cpo_kernels.training.loop import train

State = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """World, model and steps: smaller than the demo's, so that every method trains on five seeds."""

    people: int = 4
    places: int = 2
    prompts: int = 1200
    hidden_size: int = 96
    num_layers: int = 2
    supervised_steps: int = 1000
    responses: int = 32  # of a supervised step
    preference_steps: int = 100
    groups: int = 24  # (prompt, condition) of a step on pairs
    conditions: int = 3  # of one prompt, in CPO
    beta: float = 0.3
    questions: int = 240  # held out, as the training data has them
    swept: int = 40  # held out of each kind, for rank correlations


class Setting(NamedTuple):
    """What is chosen for each method on a seed of its own."""

    lr: float
    nll: float = 0.0  # on pairs: weight of the chosen answers' mean NLL, added to the loss
    start: str = ""  # without conditions: the SFT to go on from, "best" or "all"

    def __str__(self) -> str:
        return "-".join([f"{self.lr:g}", *([f"{self.nll:g}"] if self.nll else []), *filter(None, [self.start])])


class Lab:
    """World, data and finished models of one seed; models are kept in `folder` and not trained again."""

    def __init__(self, seed: int, budget: Budget, folder: Path):
        self.seed, self.budget, self.folder = seed, budget, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.world = World(seed, budget.people, budget.places)
        self.records, asked = make_data(self.world, Size(prompts=budget.prompts), seed)
        self.asked = [q for q, _ in self.world.rated_questions(budget.prompts, seed)]  # in the order of the records
        held = self.world.rated_questions(budget.questions, seed + 1, exclude=asked)
        self.questions = [question for question, _ in held]
        self.swept = held_out(self.world, budget.swept, seed, asked)
        self.tokenizer = build_tokenizer()
        self.template = PromptTemplate(self.tokenizer, TemplateConfig(), OBJECTIVES)

    def model(self, state: State | None = None) -> Any:
        model = build_model(self.tokenizer, self.budget.hidden_size, self.budget.num_layers, self.seed)
        if state is not None:
            model.load_state_dict(state)
        return model.eval()

    def config(
        self,
        stage: str,
        setting: Setting,
        objectives: Sequence[Objective] = OBJECTIVES,
        conditions: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        draw: int = 0,
    ) -> dict[str, Any]:
        """The trainer's config; another `draw` has other conditions. Without `training` the supervised budget."""
        both = {"type": ["sigmoid", "sft"], "weights": [1.0, setting.nll]}
        steps = {"batch_size": self.budget.responses, "max_steps": self.budget.supervised_steps} | (training or {})
        return {
            "stage": stage,
            "seed": self.seed + 1000 * draw,
            "cache_dir": str(self.folder / "reference"),
            "objectives": [asdict(o) for o in objectives],
            "data": {"eval_share": 0.0},
            "conditions": conditions or {},
            "loss": {"beta": self.budget.beta} | (both if setting.nll else {}),
            "training": {
                "lr": setting.lr,
                "betas": [0.9, 0.98],
                "tokens_per_microbatch": 8192,  # the mean NLL needs a step in one piece
                "precision": "fp32",
                "progress": False,
            }
            | steps,
        }

    def train(self, config: dict[str, Any], start: State | None, records: Sequence[Record] | None = None) -> State:
        """The weights after `config`, from those of `start` or from random ones."""
        model = self.model(start)
        records = self.records if records is None else records
        train(config, model=model, tokenizer=self.tokenizer, records=records, eval_records=[])
        return model.state_dict()

    def kept(self, name: str, make: Callable[[], State]) -> State:
        """The model of that name, made once."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            state = {key: tensor.detach().clone().contiguous() for key, tensor in make().items()}
            save_file(state, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        return load_file(path)

    @torch.no_grad()
    def sampled(self, state: State, goals: Sequence[dict[str, float]]) -> list[str]:
        """An answer to every training question under its goal's tags, at temperature 0.7 and top-p 0.9."""
        model, answers = self.model(state), list[str]()
        torch.manual_seed(self.seed)
        texts = [self.template.text(record.prompt, goal) for record, goal in zip(self.records, goals, strict=True)]
        for i in range(0, len(texts), 256):
            inputs = self.tokenizer(texts[i : i + 256], return_tensors="pt", padding=True)  # on the left
            output = model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                top_k=0,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            made = output[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in self.tokenizer.batch_decode(made, skip_special_tokens=True)]
        return answers
