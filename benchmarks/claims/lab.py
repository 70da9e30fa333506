"""What every method of a comparison shares on one seed: data, budget, requests, trained models."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpo_kernels.data.records import Record
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.files import atomic_text
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.keys import TemplateConfig
from cpo_kernels.training.loop import train

State = dict[str, Tensor]
SEARCH_SEED = 100


class Setting(NamedTuple):
    """What is chosen for each method on a seed of its own."""

    lr: float
    nll: float = 0.0  # on pairs: weight of the chosen answers' mean NLL, added to the loss
    start: str = ""  # without conditions: the SFT to go on from, "best" or "all"
    beta: float = 0.0  # 0: the budget's
    weight: float = 1.0  # CPO: of the first objective, relative to the others

    def __str__(self) -> str:
        parts = [f"{self.lr:g}", f"{self.nll:g}" if self.nll else "", self.start]
        parts += [f"beta{self.beta:g}" if self.beta else "", f"weight{self.weight:g}" if self.weight != 1 else ""]
        return "-".join(filter(None, parts))


class Cost(NamedTuple):
    """What a training took."""

    steps: int
    tokens: int  # prompts included, padding not; a prompt that several answers share counts once
    seconds: float  # processor time of one thread


class Lab(ABC):
    """Data and finished models of one seed; models are kept in `folder` and not trained again.

    A subclass is one comparison: it sets the attributes below, loads the data, and rates answers.
    """

    objectives: ClassVar[list[Objective]]
    requests: ClassVar[list[dict[str, float]]]  # the operating points of a model that reads tags
    weights: ClassVar[list[tuple[float, ...]]]  # as many, of the methods that read none
    settings: ClassVar[dict[str, list[Setting]]]  # method -> what is tried
    levels: ClassVar[dict[str, list[float]]]  # objective -> what can be asked for
    own_ratings: ClassVar[dict[str, Any]]  # the trainer's `conditions` of CPSFT
    asked_for: ClassVar[dict[str, Any]]  # of CDPO
    on_pairs: ClassVar[dict[str, Any]] = {}  # of DPO
    template_config: ClassVar[TemplateConfig] = TemplateConfig(answer_prefix=" ")  # the answer begins a word
    training: dict[str, Any]  # keys of the trainer beside those that every comparison has
    max_new_tokens: ClassVar[int]
    batch_size: ClassVar[int]  # of generation
    tokenizer: Any
    records: Sequence[Record]
    held_out: Sequence[Record]

    def __init__(self, seed: int, budget: Any, folder: Path):
        self.seed, self.budget, self.folder = seed, budget, folder
        self.used: dict[str, Cost] = {}  # the models that `kept` gave since this was cleared
        self._steps, self._tokens = 0, 0
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def template(self) -> PromptTemplate:
        return PromptTemplate(self.tokenizer, self.template_config, self.objectives)

    @abstractmethod
    def new_model(self) -> Any:
        """The model that every method starts from."""

    @abstractmethod
    def rate(self, number: int, text: str) -> dict[str, float]:
        """Ratings of a text as an answer to training record `number`."""

    @abstractmethod
    def scores(self, answers: Sequence[str]) -> list[list[float]]:
        """`[questions][K]`: ratings of one answer to each held-out question, NaN where an objective does not count."""

    @abstractmethod
    def extras(self, answers: Sequence[str], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
        """What else an operating point's row says of these answers."""

    @abstractmethod
    def control(self, model: Any, scores: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
        """How far a model does what its tags request, for the method's row: `correlation` is Spearman's, per objective,
        of what is requested and achieved; `scores` as above, of every request."""

    def judges(self) -> dict[str, Any]:
        """How far `rate`, `scores` and `extras` can be trusted; nothing where they are exact."""
        return {}

    def model(self, state: State | None = None) -> Any:
        model = self.new_model()
        if state is not None:
            model.load_state_dict(state)
        return model.eval()

    def config(
        self,
        stage: str,
        setting: Setting,
        objectives: Sequence[Objective] | None = None,
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
            "objectives": [asdict(o) for o in objectives or self.objectives],
            "data": {"eval_share": 0.0},
            "conditions": conditions or {},
            "template": asdict(self.template_config),
            "loss": {"beta": setting.beta or self.budget.beta} | (both if setting.nll else {}),
            "training": {
                "lr": setting.lr,
                "betas": [0.9, 0.98],
                "tokens_per_microbatch": 8192,  # the mean NLL needs a step in one piece
                "progress": False,
            }
            | self.training
            | steps,
        }

    def train(self, config: dict[str, Any], start: State | None, records: Sequence[Record] | None = None) -> State:
        """The weights after `config`, from those of `start` or from where every method starts."""
        model = self.model(start)
        records = self.records if records is None else records
        self.spend(train(config, model=model, tokenizer=self.tokenizer, records=records, eval_records=[]).metrics)
        return model.state_dict()

    def spend(self, metrics: Sequence[dict[str, Any]]) -> None:
        """Count a finished run of the trainer, `metrics` are its rows, for the model that `kept` is making."""
        self._steps += metrics[-1]["step"]
        self._tokens += metrics[-1]["tokens"]

    def kept(self, name: str, make: Callable[[], State]) -> State:
        """The model of that name, made once, and what its training took."""
        path, cost = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        if not path.exists():
            self._steps, self._tokens, started = 0, 0, time.process_time()
            state = {key: tensor.detach().clone().contiguous() for key, tensor in make().items()}
            spent = Cost(self._steps, self._tokens, round(time.process_time() - started, 3))
            atomic_text(json.dumps(spent._asdict()), cost)
            save_file(state, path.with_name(f"{name}.part"))
            os.replace(path.with_name(f"{name}.part"), path)
        self.used[name] = Cost(**json.loads(cost.read_text()))
        return load_file(path)

    @torch.no_grad()
    def sampled(self, state: State, goals: Sequence[dict[str, float]]) -> list[str]:
        """An answer to every training question under its goal's tags, at temperature 0.7 and top-p 0.9."""
        model, answers = self.model(state), list[str]()
        torch.manual_seed(self.seed)
        texts = [self.template.text(record.prompt, goal) for record, goal in zip(self.records, goals, strict=True)]
        for i in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[i : i + self.batch_size], return_tensors="pt", padding=True, padding_side="left"
            )
            output = model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                top_k=0,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            made = output[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in self.tokenizer.batch_decode(made, skip_special_tokens=True)]
        return answers


def models_of(study: type[Lab], method: str) -> int:
    """Number of models that a method trains from SFT or CPSFT for its operating points.

    `study.weights` hold every vector with all weight on one objective, whose models are those of `dpo_single`.
    """
    several = {"dpo_single": len(study.objectives), "soup": len(study.objectives), "modpo": len(study.weights)}
    return several.get(method, 1)
