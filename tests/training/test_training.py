"""The loop: what it optimises, that it can stop and go on, what it writes."""

import json
import math
import os
import resource
import shutil
import types
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from cpo_kernels.data.packing import collate
from cpo_kernels.data.preparation import load_data, units_of
from cpo_kernels.data.records import Record, Response
from cpo_kernels.objectives import value_gap
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import ModelConfig
from cpo_kernels.training import loop as loop_module
from cpo_kernels.training import losses as losses_module
from cpo_kernels.training.checkpoints import atomic_folder, checkpoints
from cpo_kernels.training.loop import train
from cpo_kernels.training.losses import StageLoss, StepTotal
from cpo_kernels.training.models import fingerprint, load_model, select_trainable
from cpo_kernels.training.optim import schedule
from tests.support import tiny

RECORDS = tiny.records()
TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")


def run(stage="cdpo", **sections):
    return train(tiny.config(stage, **sections), tokenizer=tiny.tokenizer(), records=RECORDS)


def curve(result):
    return [{name: x for name, x in row.items() if name not in TIMES} for row in result.metrics]


def values(result, name):
    return [row[name] for row in result.metrics if name in row]


# -------------------------------------------------------------------- what is optimised


def loss_and_groups(stage, **sections):
    config = read_config(tiny.config(stage, **sections))
    model, tokenizer = load_model(config.model, None, tiny.tokenizer())
    records, _, objectives = load_data(config, RECORDS, None, {})
    template = loop_module.PromptTemplate(tokenizer, config.template, objectives)
    groups = [g for unit in units_of("train", config, records, objectives, template, {}) for g in unit]
    return model, StageLoss(model, config, objectives, torch.device("cpu")), groups


def naive_seq_logps(model, group):
    """One response at a time, through the model's own forward."""
    found = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt, *response]])
        logps = model(ids).logits[0, :-1].double().log_softmax(-1)
        found.append(logps[len(group.prompt) - 1 :].gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("rows", ["shared", "packed", "padded"])
def test_log_probs_are_those_of_each_response_alone(rows):
    model, loss, groups = loss_and_groups("cdpo", training={"rows": rows})
    with torch.no_grad():
        expected = torch.cat([naive_seq_logps(model, g) for g in groups[:3]])
    torch.testing.assert_close(loss.seq_logps(loss.collate(groups[:3])).double(), expected, atol=1e-4, rtol=1e-5)


def test_cdpo_loss_is_the_papers():
    """-log sigmoid(beta d) of the response that is closer to the condition, mean over non-tie pairs; gradients too."""
    model, loss, groups = loss_and_groups("cdpo")
    groups = groups[:3]
    references = [torch.randn(len(g.responses)).tolist() for g in groups]
    groups = [replace(g, ref_logps=tuple(r)) for g, r in zip(groups, references, strict=True)]
    terms = []
    for g, reference in zip(groups, references, strict=True):
        ratios = naive_seq_logps(model, g) - torch.tensor(reference)
        distance = (torch.tensor(g.scores) - torch.tensor(g.condition)).abs().sum(1)
        for a, b in g.pairs:
            won, lost = (a, b) if distance[a] < distance[b] else (b, a)
            terms.append(-torch.nn.functional.logsigmoid(0.1 * (ratios[won] - ratios[lost])))
    expected = torch.stack(terms).mean()
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got, metrics = loss(loss.collate(groups), StepTotal.of(groups))
    got.backward()
    assert got.item() == pytest.approx(expected.item(), abs=1e-5) == metrics[0].item()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)


def test_cpsft_loss_is_the_mean_nll_of_the_responses():
    model, loss, groups = loss_and_groups("cpsft")
    groups = groups[:5]
    total = -sum(naive_seq_logps(model, g).sum() for g in groups) / sum(len(g.responses[0]) for g in groups)
    assert loss(loss.collate(groups), StepTotal.of(groups))[0].item() == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.parametrize("stage", ["cpsft", "cdpo", "sft", "dpo"])
def test_every_stage_learns(stage):
    preferring = stage in ("cdpo", "dpo")
    result = run(stage, training={"max_steps": 30, "lr": 3e-3 if preferring else 1e-2, "batch_size": 8})
    losses = values(result, "loss")
    if preferring:
        assert losses[0] == pytest.approx(math.log(2))
        # The reference has batches of its own: with only AVX2, products of other shapes are rounded otherwise (5e-8).
        assert values(result, "margin")[0] == pytest.approx(0, abs=1e-6)
        assert losses[-1] < 0.62 and values(result, "accuracy")[-1] > 0.6
        assert values(result, "chosen_rewards")[-1] - values(result, "rejected_rewards")[-1] == pytest.approx(
            values(result, "margin")[-1], abs=1e-6
        )
    else:
        assert losses[-1] < losses[0] - 1
    assert [row["step"] for row in result.metrics if "eval_loss" in row] == [0, 30]
    if stage == "cdpo":  # ten prompts teach nothing but this about the two held out
        assert values(result, "eval_loss")[1] < math.log(2)


@pytest.mark.parametrize("stage", ["cpsft", "cdpo"])
def test_accumulation_equals_one_big_batch(stage, monkeypatch):
    batches = []
    monkeypatch.setattr(losses_module, "collate", lambda *args: batches.append(args) or collate(*args))
    settings = {"max_steps": 2, "lr": 1e-2, "batch_size": 6, "warmup": 0}
    one = run(stage, training={**settings, "tokens_per_microbatch": 10**6})
    assert len(batches) == 2 + 2 + (stage == "cdpo")  # two steps, two evaluations, the reference
    many = run(stage, training={**settings, "tokens_per_microbatch": 1})
    for name in ("loss", "grad_norm"):
        assert values(one, name) == pytest.approx(values(many, name), rel=1e-4)
    assert len(batches) >= 4 + 2 * 6 + 2


def test_seed_decides_the_run():
    first, again, other = run(), run(), run(seed=1)
    assert curve(first) == curve(again) != curve(other)
    assert fingerprint(first.model) == fingerprint(again.model) != fingerprint(other.model)


def test_last_k_trains_only_the_last_layers_and_the_norm():
    config = read_config(tiny.config("cdpo", training={"train": "last_k", "k": 1}))
    model, tokenizer = load_model(config.model, None, tiny.tokenizer())
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = {name for name, _ in select_trainable(model, config.training)}
    assert names == {n for n in before if n.startswith("model.layers.1.") or n == "model.norm.weight"}
    train(config, model=model, tokenizer=tokenizer, records=RECORDS)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names
    body = select_trainable(model, read_config({"training": {"train": "body"}}).training)
    assert {name for name, _ in body} == before.keys() - {"model.embed_tokens.weight"}
    config.training.k = 3
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\].*got 3"):
        train(config, model=model, tokenizer=tokenizer, records=RECORDS)


def test_bf16_keeps_float32_parameters():
    result = run(training={"precision": "bf16"})
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert values(result, "loss")[0] == pytest.approx(math.log(2), abs=0.02)
    with pytest.raises(TypeError, match="must be float32; .* is torch.bfloat16"):
        half = load_model(read_config(tiny.config()).model, None, tiny.tokenizer())[0].bfloat16()
        train(tiny.config(), model=half, tokenizer=tiny.tokenizer(), records=RECORDS)


def test_bf16_on_a_cpu_without_it_is_said_to_be_slow(monkeypatch, recwarn):
    # the one that warns last: Python shows a warning of a line once
    for has, precision, said in ((True, "bf16", False), (False, "fp32", False), (False, "bf16", True)):
        monkeypatch.setattr(losses_module, "cpu_multiplies", lambda dtype, has=has: has)
        loss_and_groups("cdpo", training={"precision": precision})
        assert ["set training.precision: fp32" in str(w.message) for w in recwarn.list] == [True] * said
        recwarn.clear()


def test_loss_types_and_what_they_need():
    mixed = run(loss={"type": ["sigmoid", "sft"], "weights": [1.0, 0.5]}, training={"max_steps": 1})
    assert values(mixed, "loss")[0] > 1.5  # log 2 and half the NLL of an untrained model
    free = run(loss={"type": "simpo", "beta": 2.0}, training={"max_steps": 1})
    assert "reference" not in free.report
    with pytest.raises(ValueError, match="aot sorts all pairs of a step"):
        run(loss={"type": "aot"}, training={"tokens_per_microbatch": 50})
    with pytest.raises(TypeError, match="did you mean 'label_smoothing'"):
        run(loss={"options": {"label_smooth": 0.1}})


HEADS = {"gemma2": {"final_logit_softcapping": 5.0}, "granite": {"logits_scaling": 4.0}}


@pytest.mark.parametrize("kind", HEADS)
def test_softcap_and_scale_of_the_head_are_honoured(kind):
    options = {**tiny.MODEL, "model_type": kind, "head_dim": 16, "initializer_range": 0.3, **HEADS[kind]}
    model, loss, groups = loss_and_groups("cdpo", model={"config": options})
    with torch.no_grad():
        expected = torch.cat([naive_seq_logps(model, g) for g in groups[:2]])
    torch.testing.assert_close(loss.seq_logps(loss.collate(groups[:2])).double(), expected, atol=1e-3, rtol=1e-5)
    assert (loss.head.softcap, loss.head.scale) != (None, 1.0)


def test_schedule():
    def lrs(**keys):
        training = read_config({"training": keys}).training
        return [round(schedule(step, 10, training), 4) for step in range(10)]

    assert lrs(warmup=2) == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert lrs(warmup=0.2) == lrs(warmup=2)
    assert lrs(warmup=0, schedule="constant") == [1.0] * 10
    cosine = lrs(warmup=0, schedule="cosine")
    assert cosine[0] == 1 and cosine[5] == 0.5 and cosine[9] == pytest.approx(0.0245, abs=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match=r"at step \d: lower training.lr \(now"):
        run("cpsft", training={"lr": 1e30, "clip": 0, "warmup": 0})


# -------------------------------------------------------------------- stop and go on


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["cpsft", "cdpo"])
def test_resumed_run_has_the_curve_of_an_unbroken_one(tmp_path, monkeypatch, stage):
    def settings(name, **keys):
        training = {"max_steps": 9, "checkpoint_every": 3, "eval_every": 4, "batch_size": 6, **keys}
        return {"run_dir": str(tmp_path / name), "training": training}

    whole = run(stage, **settings("whole"))
    update = loop_module.update
    calls = iter(range(100))

    def stopping(*args):
        if next(calls) == 7:
            raise Stop
        return update(*args)

    monkeypatch.setattr(loop_module, "update", stopping)
    with pytest.raises(Stop):
        run(stage, **settings("broken"))
    monkeypatch.setattr(loop_module, "update", update)
    assert [p.name for p in checkpoints(tmp_path / "broken/checkpoints")] == ["step-000003", "step-000006"]
    (tmp_path / "broken/checkpoints/step-000009.tmp").mkdir()  # what a crash while saving leaves
    resumed = run(stage, **settings("broken", resume=True))
    assert curve(resumed) == curve(whole) and len(resumed.metrics) == 9 + 4
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    rows = [json.loads(line) for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    assert rows == resumed.metrics
    with pytest.raises(ValueError, match=r"cannot resume .*: training.lr was 0.003 and is now 0.1"):
        run(stage, **settings("broken", resume=True, lr=0.1))
    with pytest.raises(ValueError, match="holds a run: give --resume .*, --overwrite or another run_dir"):
        run(stage, **settings("broken"))


def test_a_run_is_resumed_or_overwritten_not_both(tmp_path):
    """Given both, `overwrite` was ignored."""
    with pytest.raises(ValueError, match="resume continues the run in run_dir and training.overwrite deletes it"):
        run(run_dir=str(tmp_path / "run"), training={"resume": True, "overwrite": True})
    assert not (tmp_path / "run").exists()


def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path):
    """It was trained anew from its first step, in place of the model that it had."""
    settings = {"run_dir": str(tmp_path / "run"), "training": {"max_steps": 2, "checkpoint_every": 0}}
    before = fingerprint(run(**settings).model)
    settings["training"]["resume"] = True
    with pytest.raises(ValueError, match="is finished and has no checkpoint to resume from: .*--overwrite"):
        run(**settings)
    assert fingerprint(load_model(ModelConfig(str(tmp_path / "run" / "model")))[0]) == before


def test_resume_refuses_another_model(tmp_path):
    settings = {"run_dir": str(tmp_path / "run"), "training": {"checkpoint_every": 2, "max_steps": 2}}
    run(**settings)
    settings["training"]["resume"] = True
    other = load_model(read_config(tiny.config()).model, None, tiny.tokenizer(), seed=9)[0]
    with pytest.raises(ValueError, match="initial_model was .* resume with the same one"):
        train(tiny.config(**settings), model=other, tokenizer=tiny.tokenizer(), records=RECORDS)


def test_resume_refuses_other_data(tmp_path):
    """The same tokens, pairs and number of steps, with other ratings; and another question."""
    settings = {"run_dir": str(tmp_path / "run"), "training": {"checkpoint_every": 2, "max_steps": 2}}
    run("dpo", **settings)
    settings["training"]["resume"] = True

    def between(response):
        levels = {name: 3.5 if level == 3 else level for name, level in response.ratings.items()}
        return replace(response, ratings=levels)

    changed = [replace(record, responses=tuple(map(between, record.responses))) for record in RECORDS]
    for records in (changed, tiny.records(13)):
        with pytest.raises(ValueError, match="data was .* resume with the same one"):
            train(tiny.config("dpo", **settings), tokenizer=tiny.tokenizer(), records=records)
    run("dpo", **settings)


def test_a_run_that_cannot_start_leaves_nothing_and_deletes_nothing(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="gamma"):
        run(run_dir=str(folder), template={"prompt": "{gamma}"})
    assert not folder.exists()
    run(run_dir=str(folder))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="gamma"):
        run(run_dir=str(folder), template={"prompt": "{gamma}"}, training={"overwrite": True})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", ["run_dir", "cache_dir"])
def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch, key):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(loop_module, "load_model", None)  # the model is not loaded
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(NotADirectoryError, match=f"{key} {folder}: {tmp_path}/file is a file"):
            run(**{key: str(folder)})
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a disk that is mounted read-only, also for root
    with pytest.raises(PermissionError, match=f"{key} {tmp_path}/run: {tmp_path} cannot be written"):
        run(**{key: str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_a_run_deletes_only_what_an_earlier_run_wrote(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/events").write_text("of another program")
    run(run_dir=str(tmp_path))
    assert (tmp_path / "tensorboard/events").exists()


def test_held_out_prompts_may_all_be_ties():
    ties = [Record("say tie", tuple(Response(text, {"honesty": 3.0, "helpfulness": 3.0}) for text in "ab"))]
    made = train(tiny.config(), tokenizer=tiny.tokenizer(), records=RECORDS, eval_records=ties)
    assert made.report["eval"]["units"] == 0 and not any("eval_loss" in row for row in made.metrics)
    with pytest.raises(ValueError, match="stage cdpo: nothing to train on in 1 records"):
        train(tiny.config(), tokenizer=tiny.tokenizer(), records=ties, eval_records=[])


def test_class_weights_that_could_not_act_are_refused():
    weights = [{"honesty": 1, "weight": 0.1}]
    with pytest.raises(ValueError, match="class_weights only matter when conditions.balance or conditions.responses"):
        run("cpsft", conditions={"class_weights": weights, "responses": None})
    run("cpsft", conditions={"class_weights": weights, "responses": None, "balance": True}, training={"max_steps": 1})


def test_an_objective_that_nothing_is_rated_on_is_refused():
    """Its tag would never be shown; sft needs no ratings."""
    objectives = [tiny.OBJECTIVES[0], {"name": "helpfullness", "low": 1, "high": 5}]
    for stage in ("cpsft", "cdpo", "dpo"):
        with pytest.raises(ValueError, match="no rating of 'helpfullness'; it rates helpfulness, honesty"):
            run(stage, objectives=objectives)
    run("sft", objectives=objectives, training={"max_steps": 1})


def test_tokens_and_positions_without_an_embedding_are_named():
    """A tokenizer with added tokens whose model was not resized; learned positions that end before the rows do."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    model = {"model": {"config": {**tiny.MODEL, "vocab_size": len(tokenizer) - 1}}}
    train(tiny.config("cpsft", **model), tokenizer=tokenizer, records=RECORDS)  # it does not write <new>
    for place in ("prompt", "answer"):
        records = [
            Record(r.prompt + "<new>" * (place == "prompt"), (replace(r.responses[0], text="a<new>"), *r.responses[1:]))
            for r in RECORDS
        ]
        with pytest.raises(ValueError, match="token 102 .'<new>'., but the model has 102 embeddings"):
            train(tiny.config("cpsft", **model), tokenizer=tokenizer, records=records)
    for kind, sizes in {
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16},
        "opt": {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "max_position_embeddings": 16, "word_embed_proj_dim": 32},
    }.items():  # fmt: skip
        model = {"model": {"config": {"model_type": kind, **sizes}}, "training": {"max_steps": 1}}
        with pytest.raises(ValueError, match="has embeddings of 16 positions: set data.max_tokens to at most 16"):
            run("cpsft", **model)
        run("sft", **model, data={"max_tokens": 16})


@pytest.mark.parametrize("epochs, steps", [(1.1, 3 + 1), (2.0, 6), (0.5, 2), (2.34, 6 + 2)])
def test_steps_of_parts_of_an_epoch(epochs, steps):
    """Ten questions in steps of four, three an epoch; 1.1 epochs of ten steps are eleven."""
    result = run("cdpo", training={"epochs": epochs, "max_steps": 0, "batch_size": 4})
    assert result.metrics[-1]["step"] == steps
    parts = types.SimpleNamespace(training=read_config({"training": {"epochs": 1.1, "batch_size": 1}}).training)
    assert loop_module.Loop.steps_of(parts, [[None] * 10]) == 11
    parts.training.epochs = 1e-12  # a run without a step would save the model that it began with
    assert loop_module.Loop.steps_of(parts, [[None] * 10]) == 1


def test_atomic_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(Stop), atomic_folder(tmp_path / "x") as temporary:
        (temporary / "half").write_text("1")
        raise Stop
    assert not list(tmp_path.iterdir())


def test_run_directory(tmp_path):
    result = run("cdpo", run_dir=str(tmp_path / "run"), training={"checkpoint_every": 1, "keep": 2})
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "versions.json",
        "data.json",
        "metrics.jsonl",
        "eval_records.jsonl",
        "checkpoints",
        "reference",
        "model",
    }
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step-000003", "step-000004"]
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jinja", ".jsonl", ".yaml", ".safetensors", ".md"}  # nothing that unpickles
    assert json.loads((folder / "data.json").read_text())["train"]["pairs"] > 0
    assert json.loads((folder / "versions.json").read_text())["torch"].startswith(torch.__version__.split("+")[0])
    overrides = ["run_dir=null", "training.checkpoint_every=0"]
    again = train(folder / "config.yaml", tokenizer=tiny.tokenizer(), records=RECORDS, overrides=overrides)
    assert curve(again) == curve(result)  # the config written is the config run ...
    loaded, _ = load_model(read_config({"model": str(folder / "model")}).model)
    assert fingerprint(loaded) == fingerprint(result.model)  # ... and the model saved is the model trained
    held_out = {r.prompt for r in result.eval_records}
    lines = (folder / "eval_records.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} == held_out and len(held_out) == round(0.2 * len(RECORDS))


# -------------------------------------------------------------------- reference log-probs


def test_reference_is_computed_once_and_kept(tmp_path):
    settings = {"cache_dir": str(tmp_path), "training": {"max_steps": 1}}
    first = run(**settings)
    assert first.report["reference"]["cached"] == 0 < first.report["reference"]["scored"]
    again = run(**settings)
    assert again.report["reference"] == {"scored": 0, "cached": first.report["reference"]["scored"]}
    assert curve(first) == curve(again) and len(list(tmp_path.iterdir())) == 1
    other = run(seed=3, **settings)  # other weights: another file
    assert other.report["reference"]["cached"] == 0 and len(list(tmp_path.iterdir())) == 2
    model = load_model(read_config(tiny.config()).model, None, tiny.tokenizer())[0]
    tags = tiny.config(**settings, template={"tags": "[{name}={value}] "})
    retagged = train(tags, model=model, tokenizer=tiny.tokenizer(), records=RECORDS)
    assert retagged.report["reference"]["scored"] > 0  # the same weights and responses, but other tags in the prompt


@pytest.mark.parametrize("steps", [1, 2, None])
def test_reference_is_scored_for_what_the_steps_use(steps, monkeypatch):
    """Filled in is what a step or an evaluation takes, and no more."""
    asked, filled = set(), set()
    monkeypatch.setattr(StageLoss, "collate", lambda self, groups, real=StageLoss.collate: seen(self, groups, real))

    def seen(self, groups, real):
        (asked if groups[0].ref_logps else filled).update((g.prompt, r) for g in groups for r in g.responses)
        return real(self, groups)

    def scored(steps):
        return run(training={"max_steps": steps, "batch_size": 2, "eval_size": 2}).report["reference"]["scored"]

    count = scored(steps)
    assert asked == filled and count == len(filled)
    assert steps is None or count < scored(None)


def test_reference_stays_what_the_model_was_at_the_start(tmp_path):
    model, loss, _ = loss_and_groups("cdpo")
    result = run(cache_dir=str(tmp_path), training={"max_steps": 3})
    (cache,) = tmp_path.iterdir()
    assert cache.name.startswith(fingerprint(model)) and fingerprint(result.model) != fingerprint(model)
    assert values(result, "eval_loss")[0] == pytest.approx(math.log(2))


# -------------------------------------------------------------------- conditions drawn anew


def epochs_seen(monkeypatch, **sections):
    """The conditions, pairs and metrics of a run of three epochs, by epoch."""
    seen = []
    real = loop_module.Loop.run_epochs

    def run_epochs(self, epochs, eval_set):
        seen.append([sorted((g.prompt, g.pairs) for unit in units for g in unit) for units in epochs])
        return real(self, epochs, eval_set)

    monkeypatch.setattr(loop_module.Loop, "run_epochs", run_epochs)
    result = run(**sections)
    monkeypatch.setattr(loop_module.Loop, "run_epochs", real)
    return seen[0], result


def test_conditions_drawn_anew_differ_by_epoch_and_follow_from_the_seed(monkeypatch):
    training = {"max_steps": None, "epochs": 2.5}
    anew, result = epochs_seen(monkeypatch, conditions={"anew": True}, training=training)
    again, _ = epochs_seen(monkeypatch, conditions={"anew": True}, training=training)
    once, plain = epochs_seen(monkeypatch, training=training)
    assert anew == again and len(anew) == 3 and len({str(epoch) for epoch in anew}) == 3
    assert once == anew[:1] and result.report["train"]["epochs_drawn"] == 3
    assert [row["epoch"] for row in result.metrics if "loss" in row] == pytest.approx(
        [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 7 / 3, 8 / 3]
    )
    close = [abs(x - y) < 1e-6 for x, y in zip(values(result, "loss"), values(plain, "loss"), strict=True)]
    assert all(close[:3]) and not any(close[3:])
    other, _ = epochs_seen(monkeypatch, conditions={"anew": True}, training=training, seed=1)
    assert not {str(epoch) for epoch in anew} & {str(epoch) for epoch in other}
    by_steps, _ = epochs_seen(monkeypatch, conditions={"anew": True}, training={"max_steps": 7})
    assert by_steps == anew  # seven steps reach into the third epoch


def test_a_run_with_conditions_drawn_anew_resumes_in_any_epoch(tmp_path, monkeypatch):
    def settings(name, **keys):
        training = {"max_steps": 8, "checkpoint_every": 1, "keep": 9, **keys}
        return {"run_dir": str(tmp_path / name), "conditions": {"anew": True}, "training": training}

    whole = run(**settings("whole"))
    for step in (2, 3, 5):
        shutil.copytree(tmp_path / "whole", tmp_path / f"{step}")
        for later in checkpoints(tmp_path / f"{step}/checkpoints")[step:]:
            shutil.rmtree(later)
        resumed = run(**settings(f"{step}", resume=True))
        assert curve(resumed) == curve(whole) and fingerprint(resumed.model) == fingerprint(whole.model)


# -------------------------------------------------------------------- what a row of metrics holds


def test_every_metric_is_what_it_says(monkeypatch):
    """Against log-probs from the model's own logits, with a reference that is not the model."""
    model, loss, groups = loss_and_groups("cdpo", conditions={"responses": 3, "per_prompt": 2, "strip_best": 0.5})
    groups = groups[:6]
    references = [torch.randn(len(g.responses)).sub(30).tolist() for g in groups]
    groups = [replace(g, ref_logps=tuple(r)) for g, r in zip(groups, references, strict=True)]
    chosen, rejected, ratios, tokens = [], [], [], 0
    for g in groups:
        with torch.no_grad():
            ratio = (naive_seq_logps(model, g) - torch.tensor(g.ref_logps)).tolist()
        ratios += ratio
        tokens += sum(map(len, g.responses))
        for a, b in g.pairs:
            gap = float(value_gap([g.scores[a]], [g.scores[b]], [g.condition], loss.objectives))
            chosen.append(0.1 * ratio[a if gap > 0 else b])
            rejected.append(0.1 * ratio[b if gap > 0 else a])
    margins = [w - other for w, other in zip(chosen, rejected, strict=True)]
    expected = {
        "loss": sum(math.log1p(math.exp(-m)) for m in margins) / len(margins),
        "chosen_rewards": sum(chosen) / len(chosen),
        "rejected_rewards": sum(rejected) / len(rejected),
        "accuracy": sum(m > 0 for m in margins) / len(margins),
        "margin": sum(margins) / len(margins),
        "ties": 0,
        "log_ratio": sum(ratios) / tokens,
        "pairs": len(margins),
        "labels": tokens,
        "tokens": sum(loss.collate([g]).tokens for g in groups),
        "lr": 0.25,
        **loss.asked(groups),
    }
    config = read_config(tiny.config("cdpo", training={"tokens_per_microbatch": 200, "clip": 0.01}))
    loss.budget = 200  # several micro-batches
    run_dir = loop_module.RunDir(config, True)
    row = loop_module.Loop(config, Accelerator(), run_dir, model, loss, "").step(0, groups, 0.25)
    for name, x in expected.items():
        assert row[name] == pytest.approx(x, rel=1e-4, abs=1e-5), name
    times = {"seconds", "tokens_per_second", "peak_memory_gib"}
    assert row.keys() == expected.keys() | times | {"grad_norm", "padding"}
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert 0.9 * held <= row["peak_memory_gib"] <= held

    model, loss, _ = loss_and_groups("cdpo", conditions={"responses": 3, "per_prompt": 2, "strip_best": 0.5})
    loss(loss.collate(groups), loss.total(groups))[0].backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)  # before clipping
    asked = {name: count for name, count in row.items() if name.startswith("asked_")}
    assert asked["asked_nothing"] == 0 and sum(asked.values()) == 12 and len(asked) > 3  # two objectives, six groups


@pytest.mark.parametrize("kind", ["sft", "orpo", "contrastive_cpo"])
def test_losses_that_average_chosen_tokens_accumulate(kind):
    """float64: one micro-batch against one a group, loss and gradients."""
    found = []
    for budget in (10**6, 1):
        types = {"type": ["sigmoid", "sft"]} if kind == "sft" else {"type": kind}
        model, loss, groups = loss_and_groups("cdpo", loss=types, training={"tokens_per_microbatch": budget})
        model.double()
        groups = [replace(g, ref_logps=(-30.0,) * len(g.responses) if kind == "sft" else ()) for g in groups[:6]]
        total, parts, value = loss.total(groups), loss.parts(groups), 0.0
        for part in parts:
            each, _ = loss(loss.collate(part), total)
            each.backward()
            value += each.item()
        found.append((len(parts), value, [p.grad for p in model.parameters()]))
    (one, value, gradients), (many, other, others) = found
    assert (one, many) == (1, 6)
    assert other == pytest.approx(value, rel=1e-6)  # Llama's norms compute in float32
    for gradient, expected in zip(others, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------- filtered gradients

FILTERED = {"filter_eps": 0.05, "filter_head_grad": True}


@pytest.mark.parametrize("stage", ["cpsft", "cdpo"])
def test_filtered_gradients_reach_the_loss(stage):
    """Losses are exact at the first step; the update is that of the filtered gradients."""
    exact, filtered = (run(stage, training={"max_steps": 2}, loss=loss) for loss in ({}, FILTERED))
    first, second = zip(values(exact, "loss"), values(filtered, "loss"), strict=True)
    assert first[0] == pytest.approx(first[1], rel=1e-6) and second[0] != second[1]
    names = [{name for row in result.metrics for name in row} for result in (exact, filtered)]
    assert "eval_loss" in names[1]
    assert names[1] - names[0] == set(losses_module.FILTER_METRICS)  # none of the evaluation: no gradients


def filter_means(loss, batches, eps):
    """FILTER_METRICS over the labelled tokens of all batches, by the definition: sets of 128 rows of a batch."""
    sums, rows = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        with torch.no_grad():
            p = torch.softmax(loss.module.hidden(batch) @ loss.head.weight.t(), -1).double()
        for part, labels in zip(p.split(128), batch.labels.split(128), strict=True):
            live = (part >= eps).any(0)
            live[labels] = True
            exact = float(live.double().mean() > 0.5)
            means = [live.double().mean(), part[:, ~live].sum(1).mean(), 0.0]
            sums += len(part) * torch.tensor([1.0, 0.0, 1.0] if exact else means)
            rows += len(part)
    return dict(zip(losses_module.FILTER_METRICS, (sums / rows).tolist(), strict=True))


@pytest.mark.parametrize("filter_head_grad", [True, False])
@pytest.mark.parametrize("stage", ["sft", "cpsft", "dpo", "cdpo"])
def test_metrics_of_the_filter_are_means_over_the_step(stage, filter_head_grad):
    """Over micro-batches, weighted by their tokens; whole sets that are exact in float32 under auto."""
    for eps, budget in ((0.05, 10_000), (0.05, 200), ("auto", 200)):
        model, loss, groups = loss_and_groups(stage, loss={"filter_eps": eps, "filter_head_grad": filter_head_grad})
        loss.budget = budget
        groups = [replace(g, ref_logps=(-30.0,) * len(g.responses)) for g in groups[:6]]
        total = loss.total(groups)
        batches = [loss.collate(part) for part in loss.parts(groups)]
        parts = [dict(zip(loss.metrics, loss(batch, total)[1].tolist(), strict=True)) for batch in batches]
        got = {name: sum(part[name] for part in parts) for name in losses_module.FILTER_METRICS}
        if eps == "auto":
            assert got == pytest.approx({"live_share": 1.0, "tail_mass": 0.0, "exact_share": 1.0})
            continue
        assert len(batches) == 1 or budget == 200
        assert got == pytest.approx(filter_means(loss, batches, eps), rel=1e-4, abs=1e-6)
        assert got["live_share"] < 1 and got["tail_mass"] > 0


@pytest.mark.parametrize("stage", ["sft", "cpsft"])
def test_a_row_of_a_supervised_stage_has_the_shares_of_its_filter(stage):
    """A step of several micro-batches."""
    sections = {"loss": FILTERED, "training": {"tokens_per_microbatch": 100}}
    model, loss, groups = loss_and_groups(stage, **sections)
    batches = [loss.collate(part) for part in loss.parts(groups)]
    want = filter_means(loss, batches, FILTERED["filter_eps"])
    config = read_config(tiny.config(stage, **sections))
    run_dir = loop_module.RunDir(config, True)
    row = loop_module.Loop(config, Accelerator(), run_dir, model, loss, "").step(0, groups, 0.1)
    assert len(batches) > 1 and 0 < want["live_share"] < 1 and want["tail_mass"] > 0
    assert {name: row[name] for name in want} == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    "loss, message",
    [
        ({"filter_eps": "high"}, "loss.filter_eps: expected auto or a number in \\(0, 1\\), got 'high'"),
        ({"filter_eps": 1.5}, "loss.filter_eps: 1.5 is not in \\(0, 1\\)"),
        ({"filter_head_grad": True}, "loss: filter_head_grad=True requires filter_eps"),
        ({"options": {"filter_eps": 0.1}}, "filter_eps comes from loss.filter_eps"),
    ],
)
def test_wrong_filters_of_a_recipe(loss, message):
    with pytest.raises(ValueError, match=message):
        read_config(tiny.config("cdpo", loss=loss))


@pytest.mark.parametrize("given, read", [("auto", "auto"), ("1e-4", 1e-4), (0.01, 0.01), (None, None)])
def test_filters_of_a_recipe_are_read(given, read):
    assert read_config(tiny.config("cdpo", loss={"filter_eps": given})).loss.filter_eps == read
