"""Scorers of generated text: `(prompts, responses) -> [n, K]`, a score per objective, NaN for none.

python:my_scorer:score          a Python function of two lists of texts; my/scorer.py:score names a file
honesty=model:FOLDER            a transformers sequence classifier or reward model for one objective
judge:http://host/v1            a language model behind an OpenAI-compatible server (`llm_judge`)
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cpo_kernels.data.tokenizer import load_tokenizer
from cpo_kernels.hub import check_model_path
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.keys import ModelConfig

Texts = Sequence[str]
Scorer = Callable[[Texts, Texts], Any]  # whatever `checked` takes


def make_scorer(
    specs: Sequence[str], objectives: Sequence[Objective], judge: Callable[[str, list[Objective]], Scorer]
) -> Scorer:
    """The scorer made of all `[OBJECTIVE[,OBJECTIVE]=]KIND:...` specs; every objective has exactly one.

    A spec without names scores all objectives. `judge(url, its objectives)` makes the scorer of a `judge:` spec.
    """
    parts: list[tuple[list[int], Scorer]] = []
    places = {o.name: i for i, o in enumerate(objectives)}
    for spec in specs:
        names, kind, rest = _split(spec)
        for name in names:
            if name not in places:
                raise ValueError(f"--scorer {spec!r}: unknown objective {name!r}; known: {', '.join(places)}")
        columns = [places[name] for name in names] or list(places.values())
        chosen = [objectives[i] for i in columns]
        if kind == "python":
            parts.append((columns, python_scorer(rest)))
        elif kind == "judge":
            parts.append((columns, judge(rest, chosen)))
        elif len(chosen) == 1:
            parts.append((columns, ModelScorer(rest, chosen[0])))
        else:
            raise ValueError(f"--scorer {spec!r}: a reward model scores one objective; write OBJECTIVE=model:FOLDER")
    covered = sorted(column for columns, _ in parts for column in columns)
    if covered != list(places.values()):
        names = [o.name for i, o in enumerate(objectives) if covered.count(i) != 1]
        raise ValueError(f"--scorer: each objective needs exactly one scorer; wrong for {', '.join(names)}")

    def score(prompts: Texts, responses: Texts) -> Tensor:
        scores = torch.full((len(responses), len(objectives)), torch.nan, dtype=torch.float64)
        for columns, scorer in parts:
            scores[:, columns] = checked(scorer(prompts, responses), len(responses), len(columns), scorer)
        return scores

    return score


def _split(spec: str) -> tuple[list[str], str, str]:
    """(objectives, kind, the rest)."""
    for kind in ("python", "model", "judge"):
        before, mark, rest = spec.partition(f"{kind}:")
        if mark and rest and (not before or before.endswith("=")):
            return [name.strip() for name in before[:-1].split(",") if name.strip()], kind, rest
    raise ValueError(f"--scorer {spec!r}: write python:module:function, OBJECTIVE=model:FOLDER or judge:URL")


def checked(scores: Any, rows: int, columns: int, scorer: Any) -> Tensor:
    """A scorer's result as float64 `[rows, columns]`; `[rows]` is accepted for one objective."""
    try:
        tensor = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{scorer} must return numbers [{rows}, {columns}], got {scores!r:.100}: {error}") from None
    if columns == 1 and tensor.shape == (rows,):
        tensor = tensor[:, None]
    if tensor.shape != (rows, columns):
        raise ValueError(
            f"{scorer} must return a score per text and objective, [{rows}, {columns}]; got {[*tensor.shape]}"
        )
    if tensor.isinf().any():
        raise ValueError(f"{scorer} returned an infinite score; NaN means none")
    return tensor


def python_scorer(spec: str) -> Scorer:
    """The function of `module:function` or `path/to/file.py:function`; modules in the working directory are found."""
    place, _, name = spec.rpartition(":")
    if not place:
        raise ValueError(f"python scorer {spec!r}: write module:function or path/to/file.py:function")
    if place.endswith(".py"):
        module_spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if not Path(place).is_file() or module_spec is None or module_spec.loader is None:
            raise FileNotFoundError(f"python scorer {spec!r}: the file {place} does not exist")
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    else:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"python scorer {spec!r}: {error}") from None
    function: Callable[[Sequence[str], Sequence[str]], Any] | None = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"python scorer {spec!r}: {place} has no function {name!r}")
    return function


class ModelScorer:
    """A sequence classifier as the scorer of one objective.

    One output: its value as is. n outputs, taken as steps of the scale from worst to best: their expectation,
    low + (high - low) * sum_i p_i i / (n - 1). Input: the tokenizer's chat template if it has one, else prompt and
    response as a pair of texts; inputs that are too long are truncated at the beginning.
    """

    def __init__(self, folder: str, objective: Objective, batch_size: int = 16):
        from transformers import AutoModelForSequenceClassification

        check_model_path(folder, f"--scorer {objective.name}=model:{folder}")
        self.objective, self.batch_size, self.folder = objective, batch_size, folder
        self.tokenizer = load_tokenizer(ModelConfig(folder), "its save_pretrained, into that folder")
        self.tokenizer.truncation_side = "left"
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = self.tokenizer
        pad_id = self.model.config.pad_token_id  # decoders score the last token other than this one
        if pad_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
        elif tokenizer.pad_token_id is None:  # not the end token, which counts
            others = (tokenizer.unk_token, tokenizer.bos_token)
            tokenizer.pad_token = next((t for t in others if t and t != tokenizer.eos_token), None)
        self.model.config.pad_token_id = tokenizer.pad_token_id
        if tokenizer.pad_token_id is None:
            self.batch_size = 1
        limits = [self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None)]
        self.max_length = min([limit for limit in limits if limit] or [512])

    def __repr__(self) -> str:
        return f"model {self.folder}"

    @torch.no_grad()
    def __call__(self, prompts: Texts, responses: Texts) -> Tensor:
        order = sorted(range(len(responses)), key=lambda i: len(prompts[i]) + len(responses[i]))
        scores = torch.zeros(len(responses), dtype=torch.float64)
        for start in tqdm(range(0, len(order), self.batch_size), f"score {self.objective.name}", leave=False):
            part = order[start : start + self.batch_size]
            batch = self._encode([prompts[i] for i in part], [responses[i] for i in part]).to(self.model.device)
            logits = self.model(**batch).logits.double().cpu()
            scores[part] = self._score(logits)
        return scores

    def _encode(self, prompts: Texts, responses: Texts) -> Any:
        options = {
            "padding": len(prompts) > 1,
            "truncation": True,
            "max_length": self.max_length,
            "return_tensors": "pt",
        }
        if not self.tokenizer.chat_template:
            return self.tokenizer(list(prompts), list(responses), **options)
        chats = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        texts = [self.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        return self.tokenizer(texts, add_special_tokens=False, **options)

    def _score(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            return logits[:, 0]
        steps = torch.linspace(self.objective.low, self.objective.high, logits.shape[1], dtype=torch.float64)
        return logits.softmax(-1) @ steps
