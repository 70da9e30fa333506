"""`FusedDPOTrainer` with objectives: rated pairs, oriented by their value under the condition.

The truth is TRL's own trainer on data that was relabelled and stripped of ties beforehand, and `preference_loss`.
"""

import math

import pytest
import torch

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import cpo_kernels as cpo  # noqa: E402
from cpo_kernels.integrations.trl import FusedDPOConfig, RatedPreferences  # noqa: E402
from tests.integrations.test_trl_trainer import SMOOTHED, TYPES, run, trainer_of  # noqa: E402
from tests.support.tiny import one_thread  # noqa: E402, F401
from tests.support.trl_runs import DATA, assert_same_run, lora, make, quiet, without_trls_head  # noqa: E402, F401

OBJECTIVES = (cpo.Objective("honesty", 1, 5), cpo.Objective("helpfulness", 1, 5, weight=2.0, strength=1.5))
NONE = None
# (ratings of the chosen column, of the rejected one, condition); R by hand: weights 1 and 2, strengths 1 and 1.5
RATED = [
    ([5, 5], [1, 1], [5, 5]),  # 0 > (-4 - 12) / 3: chosen
    ([5, 5], [1, 1], [1, 1]),  # rejected is nearer
    ([2, 4], [4, 2], [NONE, NONE]),  # (2 + 8) / 3 > (4 + 4) / 3: chosen
    ([2, 4], [4, 2], [NONE, 1]),  # (2 - 9) / 3 < (4 - 3) / 3: rejected
    ([NONE, 1], [3, 2], [3, NONE]),  # honesty is out on both sides: 1 < 2, rejected
    ([3, 1], [3, 2], [3, 1]),  # chosen
]
CHOSEN_COLUMN_WINS = [True, False, True, False, False, True]
SCORES = {"chosen_scores": 0, "rejected_scores": 1, "condition": 2}


def rated(rows=RATED, data=DATA):
    return {**data, **{name: [row[i] for row in rows] for name, i in SCORES.items()}}


def relabelled(wins=CHOSEN_COLUMN_WINS, data=DATA):
    """`data` as TRL wants it: the preferred response in the chosen column; ties (None) left out."""
    keep = [i for i, win in enumerate(wins) if win is not None]
    sides = {"chosen": ("chosen", "rejected"), "rejected": ("rejected", "chosen")}
    out = {"prompt": [data["prompt"][i] for i in keep]}
    return out | {name: [data[a if wins[i] else b][i] for i in keep] for name, (a, b) in sides.items()}


def assert_as_relabelled(tmp_path, options, rows=RATED, wins=CHOSEN_COLUMN_WINS, keys=None, **kwargs):
    theirs = run(False, tmp_path, options, data=relabelled(wins), **kwargs)
    ours = run(True, tmp_path, {**options, "objectives": OBJECTIVES}, data=rated(rows), **kwargs)
    extra = {"value_gap", "ties", "unrated"}
    assert all(extra <= log.keys() for log in ours[0][:3])
    logs = [{k: v for k, v in log.items() if k not in extra} for log in ours[0]]
    assert_same_run(theirs, (logs, ours[1]), keys=keys)
    return ours[0]


def test_the_rows_are_what_their_comments_say():
    nan = [[[math.nan if v is None else v for v in part] for part in row] for row in RATED]
    gaps = [cpo.objectives.value_gap(a, b, c, OBJECTIVES) for a, b, c in nan]
    assert [bool(gap > 0) for gap in gaps] == CHOSEN_COLUMN_WINS


@pytest.mark.parametrize("name", TYPES)
def test_orientation(tmp_path, name):
    # sft has no reference here: its rewards are beta L, TRL's are beta (L - ref)
    keys = {"loss", "grad_norm", "logps/chosen", "entropy", "logits/chosen"} if name == "sft" else None
    assert_as_relabelled(tmp_path, {"loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0)}, keys=keys)


@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.4},
        {"use_weighting": True},
        {"precompute_ref_log_probs": True, "ld_alpha": 0.3},
        {"f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"max_length": 12},
        {"torch_compile": True, "torch_compile_backend": "eager"},  # the wrapped reference has no truth value
    ],
    ids=lambda options: "-".join(options),
)
def test_options(tmp_path, options):
    assert_as_relabelled(tmp_path, options)


def test_lora(tmp_path):
    assert_as_relabelled(tmp_path, {}, ref_model=lambda: None, peft_config=lora())


def test_router_aux_loss(tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    models = {"model": lambda: make("Mixtral", **sizes), "ref_model": lambda: make("Mixtral", seed=1, **sizes)}
    log = assert_as_relabelled(tmp_path, {"router_aux_loss_coef": 0.5}, **models)
    assert log[0]["aux_loss"] > 0.1


def test_ties_and_unrated_pairs_give_nothing(tmp_path):
    """The whole data in one batch: the loss is the mean over the four pairs that are left."""
    rows = list(RATED)
    rows[1] = ([2, 2], [4, 4], [3, 3])  # both 1 away from the condition
    rows[4] = ([NONE, 1], [3, NONE], [3, NONE])  # no objective is rated on both sides
    wins = [True, None, True, False, None, True]
    keys = {"loss", "grad_norm", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"}
    keys |= {"logits/chosen", "logits/rejected", "mean_token_accuracy"}
    options = {"per_device_train_batch_size": 6}
    logs = assert_as_relabelled(tmp_path, options, rows, wins, keys)
    assert logs[0]["ties"] == pytest.approx(2 / 6) and logs[0]["unrated"] == pytest.approx(1 / 6)


def test_a_batch_of_ties_learns_nothing(tmp_path):
    rows = [([2, 2], [2, 2], [3, NONE])] * 6
    logs, steps = run(True, tmp_path, {"objectives": OBJECTIVES}, data=rated(rows))
    assert logs[0]["loss"] == 0 and logs[0]["ties"] == 1 and "rewards/chosen" not in logs[0]
    assert all(float(g.abs().max()) == 0 for g in steps[0].values())


def test_without_conditions_more_is_better(tmp_path):
    data = {k: v for k, v in rated([([1, 1], [2, 2], NONE)] * 6).items() if k != "condition"}
    theirs = run(False, tmp_path, {}, data=relabelled([False] * 6))
    ours = run(True, tmp_path, {"objectives": OBJECTIVES}, data=data)
    assert_same_run(theirs, ours, keys={"loss", "grad_norm", "rewards/margins"})
    assert ours[0][0]["value_gap"] == pytest.approx(1.0)


@pytest.mark.parametrize("options", [{"tau": 0.7}, {"margin": 0.4, "tau": 2.0}, {"label_smoothing": 0.2}])
def test_soft_targets_and_margins(tmp_path, options):
    """Against `preference_loss` on the sequence log-probs of the models' own logits."""
    settings = {"objectives": OBJECTIVES, "per_device_train_batch_size": 6, **options}
    with without_trls_head():
        trainer = trainer_of(True, tmp_path, settings, data=rated())
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch)

    def seq_logps(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logps = logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (logps * batch["completion_mask"][:, 1:]).sum(1)

    scores, conditions = batch["scores"], batch["conditions"]
    truth = cpo.preference_loss(
        seq_logps(make()),
        ref_logps=seq_logps(make(seed=1)).detach(),
        scores=scores,
        conditions=conditions,
        objectives=OBJECTIVES,
        beta=0.3,
        **options,
    )
    assert loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    plain = trainer_of(True, tmp_path, {**settings, "tau": None, "margin": 0.0, "label_smoothing": 0.0}, data=rated())
    assert abs(plain.compute_loss(plain.model, batch).item() - loss.item()) > 1e-3


def test_evaluation(tmp_path):
    part = {k: v[:4] for k, v in rated().items()}
    ours = trainer_of(True, tmp_path, {"objectives": OBJECTIVES}, data=rated(), eval_data=part)
    theirs = trainer_of(False, tmp_path, {}, eval_data={k: v[:4] for k, v in relabelled().items()})
    seen, truth = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_logits/chosen", "eval_mean_token_accuracy"):
        assert seen[name] == pytest.approx(truth[name], rel=1e-4, abs=2e-5), name
    assert seen["eval_ties"] == 0
    again = ours.evaluate(ours.eval_dataset.select([0, 1]))
    assert again["eval_value_gap"] == pytest.approx(16 / 3)


# ---------------------------------------------------------------- refused


def test_objectives_and_columns_go_together(tmp_path):
    with pytest.raises(
        ValueError, match="train dataset has chosen_scores, condition, rejected_scores, which need objec"
    ):
        trainer_of(True, tmp_path, {}, data=rated())
    data = {k: v for k, v in rated().items() if k != "rejected_scores"}
    with pytest.raises(ValueError, match="train dataset has no column rejected_scores"):
        trainer_of(True, tmp_path, {"objectives": OBJECTIVES}, data=data)
    with pytest.raises(ValueError, match="eval dataset has no column chosen_scores, rejected_scores"):
        trainer_of(True, tmp_path, {"objectives": OBJECTIVES}, data=rated(), eval_data=DATA)


@pytest.mark.parametrize(
    "row, match",
    [
        (([5], [1, 1], [5, 5]), "chosen_scores must hold one number .* for each of honesty, helpfulness, got"),
        (([5, 5], [1, 6], [5, 5]), "rejected_scores: helpfulness is 6.0, outside"),
        (([5, 5], [1, 1], [0, 5]), "condition: honesty is 0.0, outside"),
        ((5.0, [1, 1], [5, 5]), "chosen_scores must hold one number .*, got 5.0"),
        (([5, 5], {"honesty": 1, "helpfulness": 1}, NONE), "rejected_scores must hold one number .*, got {'honesty'"),
        (("55", [1, 1], NONE), "chosen_scores must hold one number .*, got '55'"),
        ((NONE, [1, 1], NONE), "chosen_scores must hold one number .*, got None"),
        (([5, 5], [1, 1], 5), "condition must hold one number .*, got 5"),
        ((torch.tensor(5.0), [1, 1], NONE), "chosen_scores must hold one number"),
        (([[5, 5]], [1, 1], NONE), "chosen_scores must hold one number"),
        (([5, "good"], [1, 1], NONE), "chosen_scores: helpfulness is 'good', not a number"),
        (([5, True], [1, 1], NONE), "chosen_scores: helpfulness is True, not a number"),
        (([5, [4]], [1, 1], NONE), r"chosen_scores: helpfulness is \[4\], not a number"),
        (([5, {}], [1, 1], NONE), "chosen_scores: helpfulness is {}, not a number"),
        (([5, math.inf], [1, 1], NONE), "chosen_scores: helpfulness is inf, outside"),
    ],
)
def test_ratings_are_checked(row, match):
    collate = RatedPreferences(lambda examples: {}, OBJECTIVES)
    with pytest.raises(ValueError, match=match):
        collate([{name: row[i] for name, i in SCORES.items()}])


def test_a_stream_of_objectives_in_another_order_is_refused(tmp_path):
    """The column reaches the collator; by name it is that of the config."""
    named = {"objectives": [["honesty", "helpfulness"]] * 6}
    collate = RatedPreferences(lambda examples: {}, OBJECTIVES)
    row = {name: values[0] for name, values in (rated() | named).items()}
    assert collate([row])["scores"].tolist() == [list(RATED[0][0]), list(RATED[0][1])]
    other = {"objectives": [["helpfulness", "honesty"]] * 6}
    stream = datasets.Dataset.from_dict(rated() | other).to_iterable_dataset()
    trainer = trainer_of(True, tmp_path, {"objectives": OBJECTIVES, "max_steps": 1}, data=stream)
    with pytest.raises(ValueError, match="the numbers are of helpfulness, honesty"):
        trainer.train()


def test_ratings_may_be_arrays_and_numbers_as_text():
    collate = RatedPreferences(lambda examples: {}, OBJECTIVES)
    rows = ([5, 4], torch.tensor([5.0, 4.0]), torch.tensor([5, 4]).numpy(), (5, 4.0), ["5", "4"])
    for scores in rows:
        batch = collate([{"chosen_scores": scores, "rejected_scores": [1, None]}])
        assert batch["scores"][0].tolist() == [5, 4] and batch["scores"][1].isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    "column, value, match",
    [
        ("chosen_scores", [[5, 5]] * 4 + [[5, 9]] * 2, "row 4: chosen_scores: helpfulness is 9.0, outside"),
        ("condition", [[5, 5]] * 5 + [[0, 5]], "row 5: condition: honesty is 0.0, outside"),
        ("rejected_scores", [5.0] * 6, "row 0: rejected_scores must hold one number"),
        ("rejected_scores", ["5, 4"] * 6, "row 0: rejected_scores must hold one number"),
        ("chosen_scores", [{"honesty": 5, "helpfulness": 5}] * 6, "row 0: chosen_scores must hold one number"),
        (
            "objectives",
            [["honesty", "helpfulness"]] * 2 + [["helpfulness", "honesty"]] * 4,
            "row 2: the numbers are of helpfulness, honesty, but objectives of FusedDPOConfig are honesty, helpfulness",
        ),
    ],
)
def test_the_ratings_of_a_dataset_are_checked_before_training(tmp_path, column, value, match):
    with pytest.raises(ValueError, match=f"the train dataset, {match}"):
        trainer_of(True, tmp_path, {"objectives": OBJECTIVES}, data={**rated(), column: value})
    with pytest.raises(ValueError, match=f"the eval dataset, {match}"):
        trainer_of(True, tmp_path, {"objectives": OBJECTIVES}, data=rated(), eval_data={**rated(), column: value})


@pytest.mark.parametrize(
    "objectives, match",
    [
        (1.0, "must be a list of Objectives or of dicts of their fields, got 1.0"),
        (OBJECTIVES[0], "must be a list of Objectives or of dicts"),
        ({"name": "a", "low": 1, "high": 5}, "must be a list of Objectives or of dicts"),
        (["honesty"], r"must be a list of Objectives or of dicts of their fields, got \['honesty'\]"),
        ('{"name": "a"}', "must be a list of Objectives or of dicts"),
        ("honesty", "objectives 'honesty' are no JSON"),
        ([{"name": "a", "low": 1}], "an objective has name, low, high, .*; got {'name': 'a', 'low': 1}"),
        ([{"name": "a", "low": 1, "high": 5, "wieght": 2}], "an objective has .* weight, strength; got"),
        ([{"name": "a", "low": "1", "high": 5}], "low must be a finite number, got '1'"),
        ([], "objectives is empty"),
    ],
)
def test_objectives_are_checked(tmp_path, objectives, match):
    with pytest.raises((TypeError, ValueError), match=match):
        FusedDPOConfig(str(tmp_path), bf16=False, use_cpu=True, objectives=objectives)


@pytest.mark.parametrize("name, match", [("dpo", "'sigmoid'"), (["ipo", "kto_pair"], "kto_loss"), (None, "got None")])
def test_loss_types_are_checked(tmp_path, name, match):
    with pytest.raises((TypeError, ValueError), match=match):
        FusedDPOConfig(str(tmp_path), bf16=False, use_cpu=True, loss_type=name)


def test_a_collator_that_drops_the_ratings_is_refused(tmp_path):
    trainer = trainer_of(True, tmp_path, {"objectives": OBJECTIVES}, data=rated())
    batch = trainer.data_collator.collator(list(trainer.train_dataset))
    with pytest.raises(ValueError, match="the batch has no conditions, scores"):
        trainer.compute_loss(trainer.model, batch)


def test_objectives_may_be_json(tmp_path):
    text = '[{"name": "honesty", "low": 1, "high": 5, "strength": 2.0}]'
    config = FusedDPOConfig(str(tmp_path), bf16=False, use_cpu=True, objectives=text)
    assert config.objectives == [{"name": "honesty", "low": 1, "high": 5, "strength": 2.0}]
    assert isinstance(config.to_json_string(), str)
    with pytest.raises(ValueError, match="tau and label_smoothing"):
        FusedDPOConfig(str(tmp_path), bf16=False, objectives=text, tau=1.0, label_smoothing=0.1)


def test_columns_reach_the_collator_and_nothing_else(tmp_path):
    trainer = trainer_of(True, tmp_path, {"objectives": OBJECTIVES}, data=rated())
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["scores"].shape == (4, 2) and batch["conditions"].shape == (2, 2)
    assert batch["scores"].dtype == torch.float64
