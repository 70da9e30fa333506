"""CPO and the methods it is compared with, as recipes on the data of a `Lab`.

    sft      the best answers of every question, no tags; or all of them, as a start for others
    cpsft    every answer after the tags of its own ratings, or of a part of them (CPO's first stage)
    cpo      CPSFT, then CDPO in two rounds: the model after the first is the reference of the second
    ric      after Rewards-in-Context, Yang et al. 2024 (arXiv 2402.10207): CPSFT, then a stage on its own rated answers
    dpo      pairs ordered by weighted ratings, no tags: by their sum, or by only one objective
    modpo    Zhou et al. 2023 (arXiv 2310.03708): one model for each weight vector
    soup     Rewarded Soups, Ramé et al. 2023 (arXiv 2306.04488): single-objective models, their weights averaged

After `supervised_steps` (sft, cpsft) cpo, ric and every model of dpo and modpo take `preference_steps`, or cpo as many
as all models of another method together; a step on pairs has `groups` of (prompt, condition), without conditions as
many prompts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.claims.lab import Lab, Setting, State
from cpo_kernels.data.packing import Unit
from cpo_kernels.data.preparation import units_of
from cpo_kernels.data.records import Record, Response
from cpo_kernels.evaluation.pareto import pareto_front
from cpo_kernels.objectives import Objective
from cpo_kernels.recipe.config import read_config
from cpo_kernels.training.loop import Loop
from cpo_kernels.training.losses import StageLoss
from cpo_kernels.training.models import fingerprint
from cpo_kernels.training.reference import with_reference
from cpo_kernels.training.rundir import RunDir

# ------------------------------------------------------------------------------------------------------ without pairs


def sft(lab: Lab, setting: Setting, responses: str = "best") -> State:
    config = lab.config("sft", setting, conditions={"sft_responses": responses})
    return lab.kept(f"sft-{responses}-{setting}", lambda: lab.train(config, None))


def cpsft(lab: Lab, setting: Setting) -> State:
    config = lab.config("cpsft", setting, conditions=lab.own_ratings)
    return lab.kept(f"cpsft-{setting}", lambda: lab.train(config, None))


def ric(lab: Lab, start: State, setting: Setting) -> State:
    """CPSFT goes on, on its own answers at desired scores under the ratings that they received, mixed with data.

    Kept of Rewards-in-Context: goals with the best of everything but one objective, of a random level; sampling at
    temperature 0.7 and top-p 0.9; training on what lies near the Pareto front, generated answers and half as many old
    ones; a constant learning rate. Different: the ratings are whole numbers in CPSFT's tags, some of which show a part
    of the objectives; near the front means on the front of all rated answers to the question (a quantile of each
    objective, as in their code, keeps nearly everything where most answers are harmless); and the world itself rates
    the answers.
    """

    def make() -> State:
        rng = random.Random(f"ric {lab.seed}")
        goals = [{o.name: float(o.high) for o in lab.objectives} for _ in lab.records]
        for goal in goals:
            o = rng.choice(lab.objectives)
            goal[o.name] = rng.choice(lab.levels[o.name])
        rated = [Response(text, lab.rate(i, text)) for i, text in enumerate(lab.sampled(start, goals))]
        fresh, old = list[Record](), list[Record]()
        for record, response in zip(lab.records, rated, strict=True):
            *kept, own = on_front([*record.responses, response], lab.objectives)
            old += [Record(record.prompt, (r,)) for r, keep in zip(record.responses, kept, strict=True) if keep]
            fresh += [Record(record.prompt, (response,))] * own
        old = rng.sample(old, min(len(old), len(fresh) // 2))
        training = {"max_steps": lab.budget.preference_steps, "schedule": "constant"}
        # Nearly all of the front is of one class: equally many of each would be the same few answers again and again.
        conditions = lab.own_ratings | {"balance": False, "class_weights": []}
        config = lab.config("cpsft", setting, conditions=conditions, training=training)
        return lab.train(config, start, fresh + old)

    return lab.kept(f"ric-{setting}", make)


def on_front(responses: Sequence[Response], objectives: Sequence[Objective]) -> list[bool]:
    return pareto_front([[r.ratings[o.name] for o in objectives] for r in responses]).tolist()


# ----------------------------------------------------------------------------------------------------------- on pairs


def cpo(lab: Lab, start: State, setting: Setting, models: int = 1) -> State:
    """CDPO with the steps on pairs of so many models, in two rounds or more: a round sees a prompt at most once, under
    conditions of its own.
    """

    def make() -> State:
        state, budget = start, lab.budget
        prompts, steps = budget.groups // budget.conditions, models * budget.preference_steps
        rounds = max(2, math.ceil(steps * prompts / len(lab.records)))
        conditions = lab.asked_for | {"per_prompt": budget.conditions}
        # In CPO's R a level that is asked for counts twice what an open objective of equal weight counts (lambda).
        first, *others = [replace(o, strength=2.0) for o in lab.objectives]
        objectives = [replace(first, weight=first.weight * setting.weight), *others]
        for number in range(rounds):
            length = steps * (number + 1) // rounds - steps * number // rounds
            drawn = random.Random(f"round {number} {lab.seed}").sample(lab.records, len(lab.records))
            training = {"batch_size": prompts, "max_steps": length}
            config = lab.config("cdpo", setting, objectives, conditions, training, draw=number)
            state = lab.train(config, state, drawn[: prompts * length])
        return state

    return lab.kept(f"cpo-{setting}" + (f"-steps-of-{models}" if models > 1 else ""), make)


def dpo(lab: Lab, start: State, weights: Sequence[float], setting: Setting) -> State:
    """Pairs ordered by the ratings times `weights`; ties are dropped."""
    config = _dpo_config(lab, weights, setting)
    return lab.kept(f"dpo-{numbers(weights)}-{setting}", lambda: lab.train(config, start))


def modpo(lab: Lab, start: State, weights: Sequence[float], setting: Setting) -> State:
    """Minimises -log sigmoid((beta (r_w - r_l) - (m_w - m_l)) / w_k) over the pairs of objective k, where
    r = log pi / pi_ref and the margin is m = sum over i != k of w_i beta log pi_i / pi_ref, with pi_i the model of
    `dpo` on only objective i: the reward models of Zhou et al.'s code.

    That is DPO at beta / w_k with log pi_ref + m / beta for the reference's log-probs (a test compares it with the
    library's loss "modpo"). k is the first objective that has weight: helpfulness and honesty order pairs of every
    question, harmlessness only those of harmful ones. All weight on k: `dpo` itself.
    """
    k, *others = [i for i, w in enumerate(weights) if w]
    if not others:
        return dpo(lab, start, weights, setting)
    margins = [(weights[i], single(lab, start, i, setting)) for i in others]
    config = _dpo_config(lab, one_hot(k, len(weights)), setting)
    config["loss"]["beta"] /= weights[k]
    return lab.kept(f"modpo-{numbers(weights)}-{setting}", lambda: _dpo_with_margins(lab, start, margins, config))


def _dpo_config(lab: Lab, weights: Sequence[float], setting: Setting) -> dict[str, Any]:
    objectives = [replace(o, weight=w) for o, w in zip(lab.objectives, weights, strict=True)]
    training = {"batch_size": lab.budget.groups, "max_steps": lab.budget.preference_steps}
    return lab.config("dpo", setting, objectives, lab.on_pairs, training)


def _dpo_with_margins(lab: Lab, start: State, margins: Sequence[tuple[float, State]], tree: dict[str, Any]) -> State:
    config, accelerator = read_config(tree), Accelerator()
    objectives = [replace(o, weight=c.weight) for o, c in zip(lab.objectives, config.objectives, strict=True)]
    units = units_of("train", config, lab.records, objectives, lab.template, {})

    model = lab.model(start)
    loss = StageLoss(model, config, objectives, accelerator.device)
    loop = Loop(config, accelerator, RunDir(config, True), model, loss, {"initial_model": fingerprint(model)})
    ([reference], _), used = loop.with_reference([units], [], {}), loop.used([units], [])

    def scored(state: State) -> list[Unit]:
        loss = StageLoss(lab.model(state), config, objectives, accelerator.device)
        return with_reference([units], loss, None, accelerator, True, used)[0][0]

    loop.run_epochs([shifted(reference, [(w, scored(state)) for w, state in margins])], [])
    lab.spend(loop.run.metrics)
    return model.state_dict()


def shifted(reference: Sequence[Unit], margins: Sequence[tuple[float, Sequence[Unit]]]) -> list[Unit]:
    """Units whose reference log-probs are ref + sum of w (ref_i - ref), from the same units under other models."""
    moved = []
    for i, unit in enumerate(reference):
        groups = []
        for j, group in enumerate(unit):
            ref = torch.tensor(group.ref_logps, dtype=torch.float64)
            total = ref.clone()
            for w, units in margins:
                total += w * (torch.tensor(units[i][j].ref_logps, dtype=torch.float64) - ref)
            groups.append(replace(group, ref_logps=tuple(total.tolist())))
        moved.append(tuple(groups))
    return moved


def soup(lab: Lab, start: State, weights: Sequence[float], setting: Setting) -> State:
    """Parameters theta = sum of w_i theta_i of the single-objective models."""
    parts = [(w, single(lab, start, i, setting)) for i, w in enumerate(weights) if w]
    return {key: torch.stack([w * state[key] for w, state in parts]).sum(0) for key in parts[0][1]}


def single(lab: Lab, start: State, i: int, setting: Setting) -> State:
    """DPO on only objective i."""
    return dpo(lab, start, one_hot(i, len(lab.objectives)), setting)


def one_hot(i: int, count: int) -> tuple[float, ...]:
    return tuple(float(i == j) for j in range(count))


def numbers(weights: Sequence[float]) -> str:
    return ",".join(f"{w:.3g}" for w in weights)
