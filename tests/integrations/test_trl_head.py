"""SFT, KTO, GRPO and RLOO with our head against TRL's own: losses, logged metrics and gradients of every step (SGD).

Our runs are made without TRL's chunked head, so that it cannot stand in for ours.
"""

import contextlib
import importlib
import inspect
import sys

import pytest
import torch
import transformers

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trl.trainer import utils as trl_utils  # noqa: E402

import cpo_kernels as cpo  # noqa: E402
from cpo_kernels.integrations import (  # noqa: E402
    causal_lm_inputs,
    causal_lm_logps,
    fuse,
    fused_head,
    lm_head,
    trl_head,
)
from cpo_kernels.integrations import trl as ours  # noqa: E402
from tests.support.tiny import one_thread  # noqa: E402, F401
from tests.support.trl_runs import (  # noqa: E402
    DATA,
    SETTINGS,
    TOKENIZER,
    Gradients,
    assert_same_run,
    lora,
    make,
    quiet,  # noqa: F401
    unknown,
    without_trls_head,
)

THEIRS = trl_utils.add_fused_lm_head
COMPLETED = {"prompt": DATA["prompt"], "completion": DATA["chosen"]}
LABELLED = {**COMPLETED, "label": [True, False, True, True, False, True]}
PROMPTS = {"prompt": DATA["prompt"]}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "options, match",
    [
        ({"softcap": -1.0}, "softcap must be a positive number.*-1"),
        ({"softcap": "x"}, "softcap must be a number"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0"),
        ({"scale": float("nan")}, "scale must be positive and finite, got nan"),
        ({"memory_budget": -5}, "memory_budget must be a positive number of bytes, got -5"),
        ({"memory_budget": 2.5}, "memory_budget must be an integer"),
    ],
)
def test_wrong_numbers_are_refused_before_a_trainer_is_built(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        fuse(**options)


def reward(completions, **_):
    return [float(sum(map(ord, c)) % 7) for c in completions]


SAMPLED = {"num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4, "temperature": 0.7}
TRAINERS = {
    "SFT": (COMPLETED, {}, {}),
    "KTO": (LABELLED, {"beta": 0.3, "per_device_train_batch_size": 3}, {}),
    "GRPO": (PROMPTS, SAMPLED, {"reward_funcs": reward}),
    "RLOO": (PROMPTS, {**SAMPLED, "beta": 0.0}, {"reward_funcs": reward}),
}


def trainer_of(name, folder, options=None, model=make, fused=False, by_class=False, data=None, **kwargs):
    """fused: by `fuse` with these options, True for none; by_class: by the class of ours."""
    rows, settings, arguments = TRAINERS[name]
    kind = getattr(ours, f"Fused{name}Trainer") if by_class else getattr(trl, f"{name}Trainer")
    head = fused if isinstance(fused, dict) else {}
    if by_class:
        kwargs["head_options"] = head
    if name == "KTO" and "peft_config" not in kwargs:
        kwargs.setdefault("ref_model", make(seed=1))
    with fuse(**head) if fused and not by_class else contextlib.nullcontext():
        return kind(
            model=model(),
            args=getattr(trl, f"{name}Config")(str(folder), **{**SETTINGS, **settings, **(options or {})}),
            train_dataset=datasets.Dataset.from_dict(data or rows),
            processing_class=TOKENIZER,
            **{**arguments, **kwargs},
        )


def run(name, folder, options, **kwargs):
    """(log history, gradients of each step) of a short training."""
    fused, gradients = kwargs.get("fused") or kwargs.get("by_class"), Gradients()
    with without_trls_head() if fused else contextlib.nullcontext():
        trainer = trainer_of(name, folder, options, callbacks=[gradients], **kwargs)
        trainer.train()
    return trainer.state.log_history, gradients.steps


def assert_parity(name, folder, options, **kwargs):
    theirs = run(name, folder, options, **kwargs)
    assert_same_run(theirs, run(name, folder, options, fused=True, **kwargs))
    return theirs


# ---------------------------------------------------------------- by name and by class


@pytest.mark.parametrize("name", TRAINERS)
def test_the_class_and_the_one_line(tmp_path, name):
    theirs = run(name, tmp_path, {})
    assert_same_run(theirs, run(name, tmp_path, {}, fused=True))
    assert_same_run(theirs, run(name, tmp_path, {}, by_class=True))
    assert trl_utils.add_fused_lm_head is THEIRS


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_every_trainer(tmp_path, name, options):
    assert_parity(name, tmp_path, options)


@pytest.mark.parametrize("name", TRAINERS)
def test_bfloat16_autocast(tmp_path, name):
    """At a learning rate that leaves the sampled completions as they are.

    floor: RLOO's loss is 0 up to the rounding of log-probs, here 1e-2, which differs between two batches of a token.
    """
    options = {"bf16": True, "learning_rate": 1e-6}
    theirs, fused = (run(name, tmp_path, options, fused=f) for f in (False, True))
    assert_same_run(theirs, fused, rel=0.05, floor=2e-3)


@pytest.mark.parametrize("name", TRAINERS)
def test_lora(tmp_path, name):
    """With beta the adapter's base model is the reference."""
    options = {} if name == "SFT" else {"beta": 0.2}
    _, steps = assert_parity(name, tmp_path, options, peft_config=lora())
    assert all("lora_" in parameter for parameter in steps[0])


@pytest.mark.parametrize("name", TRAINERS)
def test_router_aux_loss(tmp_path, name):
    log, _ = assert_parity(name, tmp_path, {"router_aux_loss_coef": 0.5}, model=lambda: make("Mixtral", **ROUTED))
    assert log[0]["aux_loss"] > 0.1


@pytest.mark.parametrize("name", TRAINERS)
def test_softcap(tmp_path, name):
    """Under a temperature of 0.7 for GRPO and RLOO."""
    assert_parity(name, tmp_path, {}, model=lambda: make("Gemma2", final_logit_softcapping=1.5))


@pytest.mark.parametrize("name", TRAINERS)
def test_evaluation(tmp_path, name):
    both = []
    for fused in (False, True):
        with without_trls_head() if fused else contextlib.nullcontext():
            data = datasets.Dataset.from_dict(TRAINERS[name][0]).select(range(4))
            options = {"per_device_eval_batch_size": 4}
            trainer = trainer_of(name, tmp_path, options, fused=fused, eval_dataset=data)
            torch.manual_seed(0)
            both.append(trainer.evaluate())
    timing = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}
    for metric in both[0].keys() - timing:
        assert both[1][metric] == pytest.approx(both[0][metric], rel=1e-4, abs=2e-5), metric


# ---------------------------------------------------------------- SFT


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dft"},
        {"completion_only_loss": False},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 24},
        {"label_smoothing_factor": 0.1},
        {"pad_to_multiple_of": 16},
        {"max_length": 6},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_sft_options(tmp_path, options):
    assert_parity("SFT", tmp_path, options)


def test_sft_with_a_loss_of_the_callers(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)

    assert_parity("SFT", tmp_path, {}, compute_loss_func=loss)


def test_sft_of_text(tmp_path):
    texts = [p + c for p, c in zip(DATA["prompt"], DATA["chosen"], strict=True)]
    assert_parity("SFT", tmp_path, {}, data={"text": texts})


# ---------------------------------------------------------------- KTO


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "apo_zero_unpaired"},
        {"precompute_ref_log_probs": True},
        {"desirable_weight": 1.4, "undesirable_weight": 0.6},
    ],
    ids=lambda options: next(iter(options)),
)
def test_kto_options(tmp_path, options):
    assert_parity("KTO", tmp_path, options, ref_model=make(seed=1))


def test_kto_lora_with_precomputed_references(tmp_path):
    assert_parity("KTO", tmp_path, {"precompute_ref_log_probs": True}, peft_config=lora())


@pytest.mark.parametrize("options", [{"beta": 0.3}, {"desirable_weight": 1.4, "undesirable_weight": 0.6, "beta": 0.5},
                                     {"loss_type": "apo_zero_unpaired", "beta": 0.2}], ids=str)  # fmt: skip
def test_the_fused_kto_loss_is_the_trainers(tmp_path, options):
    """`FusedLinearKTOLoss` on the batches of TRL's trainer, whose reference point it makes from the same rows."""
    trainer = trainer_of("KTO", tmp_path, options)
    policy, reference = make(), make(seed=1)
    loss_fn, points = cpo.FusedLinearKTOLoss(**options, **lm_head(policy).options), []
    for inputs in trainer.get_train_dataloader():
        trainer.model.zero_grad()
        theirs = trainer.compute_loss(trainer.model, inputs)
        theirs.backward()
        want = {name: p.grad for name, p in trainer.model.named_parameters()}

        def batch(prefix, inputs=inputs):
            return {name: inputs[prefix + name] for name in ("input_ids", "attention_mask", "completion_mask")}

        given = {"desirable": torch.as_tensor(inputs["label"]).bool()}
        with torch.no_grad():
            given["ref_logps"] = causal_lm_logps(reference, batch("")).sum(1)
            if loss_fn.loss_type == "kto":
                ref_logps = causal_lm_logps(reference, batch("KL_")).sum(1)
                given["kl"] = loss_fn.kl(*causal_lm_inputs(policy, batch("KL_")), ref_logps=ref_logps)
        out = loss_fn(*causal_lm_inputs(policy, batch("")), **given)
        points.append(out.kl.item())
        policy.zero_grad()
        out.loss.backward()
        assert out.loss.item() == pytest.approx(theirs.item(), rel=1e-5)
        top = max(float(g.abs().max()) for g in want.values())
        for name, p in policy.named_parameters():
            assert float((p.grad - want[name]).abs().max()) < 1e-4 * top, name
        logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        assert out.kl.item() == pytest.approx(logged["kl"], rel=1e-4, abs=1e-6)
        for name, value in (("chosen", out.desirable_reward), ("rejected", out.undesirable_reward)):
            if not value.isnan():
                assert value.item() == pytest.approx(logged[f"rewards/{name}"], rel=1e-4)
    assert len(points) == 2 and (max(points) > 0) == (loss_fn.loss_type == "kto")


@pytest.mark.parametrize("by_class", [False, True])
def test_precomputed_references_of_another_scale_are_not_taken(tmp_path, by_class):
    """TRL names its cache by the model's weights and the data."""
    datasets.Dataset.from_dict(LABELLED).save_to_disk(str(tmp_path / "data"))

    def reference(**head):
        data, options = datasets.load_from_disk(str(tmp_path / "data")), {"precompute_ref_log_probs": True}
        options = {**SETTINGS, **options, "max_length": None}
        kwargs = {"args": trl.KTOConfig(str(tmp_path), **options), "train_dataset": data, "processing_class": TOKENIZER}
        if by_class:
            trainer = ours.FusedKTOTrainer(model=unknown(), ref_model=make(seed=1), head_options=head, **kwargs)
        else:
            with fuse(**head):
                trainer = trl.KTOTrainer(model=unknown(), ref_model=make(seed=1), **kwargs)
        return torch.tensor(trainer.train_dataset["ref_logps"])

    first, second = reference(scale=1.0), reference(scale=0.5)
    assert (first - second).abs().max() > 0.1
    assert torch.equal(reference(scale=1.0), first)


# ---------------------------------------------------------------- GRPO and RLOO


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": name} for name in ("grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")),
        {"top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence"},
        {"num_iterations": 2},
        {"cast_lm_head_to_fp32": True},
        {"scale_rewards": "batch", "delta": 1.5},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_grpo_options(tmp_path, options):
    assert_parity("GRPO", tmp_path, options)


def test_rloo_iterations(tmp_path):
    assert_parity("RLOO", tmp_path, {"num_iterations": 2})


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_reference_model(tmp_path, name):
    make().save_pretrained(tmp_path / "model")
    log, _ = assert_parity(
        name, tmp_path, {"beta": 0.2, "model_init_kwargs": {"dtype": "float32"}}, model=lambda: str(tmp_path / "model")
    )
    assert "kl" in log[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_float32_head_of_a_bfloat16_model(tmp_path, tied):
    """Its projection stays in float32, as in TRL: under autocast too."""
    options = {"cast_lm_head_to_fp32": True, "bf16": True, "beta": 0.0}

    def model():
        return make(tie_word_embeddings=tied).bfloat16()

    theirs, fused = (run("GRPO", tmp_path, options, model=model, fused=f) for f in (False, True))
    assert_same_run(theirs, fused, rel=1e-2)
    assert theirs[0][0]["entropy"] == pytest.approx(fused[0][0]["entropy"], rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "bonus",
    [
        {"entropy_coef": 0.5},
        {"entropy_coef": 0.5, "top_entropy_quantile": 0.5},
        {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.5, "entropy_coef_max": 2.0},
    ],
    ids=lambda b: "-".join(b),
)
def test_an_entropy_bonus(tmp_path, bonus, frozen):
    given = {"peft_config": lora()} if frozen else {}
    _, steps = assert_parity("GRPO", tmp_path, bonus, **given)
    _, without = run("GRPO", tmp_path, {}, **given)
    k = 2 if "use_adaptive_entropy" in bonus else 0  # it begins after the first step
    name = max(steps[k], key=lambda n: steps[k][n].norm())
    assert (steps[k][name] - without[k][name]).norm() > 1e-3 * without[k][name].norm()


# ---------------------------------------------------------------- the protocol


def both_heads(ids, name="Llama", call=None, config=None, **protocol):
    """(TRL's output, gradients), (ours, gradients) of the same weights and upstream gradients."""
    results = []
    for add in (trl_utils.add_fused_lm_head, lambda m, **kw: fused_head.add_fused_head(m, **kw)):
        model = make(name, **(config or {}))
        add(model, **protocol)
        out = model(input_ids=ids, fused_lm_head=True, **call)
        upstream = torch.linspace(-1, 1, out.log_probs.numel()).view(out.log_probs.shape)
        loss = out.loss + (out.log_probs * upstream).sum()
        loss = loss if out.entropy is None else loss + (out.entropy * upstream.flip(0)).sum()
        loss.backward()
        results.append((out, [p.grad for p in model.parameters()]))
    return results


@pytest.mark.parametrize(
    "name, config", [("Llama", {}), ("Gemma2", {"final_logit_softcapping": 1.5}), ("Cohere", {"logit_scale": 2.5}),
                     ("Phi", {"pad_token_id": None}),  # transformers 5.0 has none for it
                     ("Mixtral", {**ROUTED, "output_router_logits": True, "router_aux_loss_coef": 0.3})]
)  # fmt: skip
@pytest.mark.parametrize("temperature, cast, items", [(1.0, False, None), (0.6, True, 5)])
def test_every_field(name, config, temperature, cast, items):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (3, 9), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.4, -100)
    for call in ({"labels": labels}, {"shift_labels": labels}):
        call["num_items_in_batch"] = items
        (one, grads), (other, others) = both_heads(
            ids,
            name,
            call,
            config,
            temperature=temperature,
            cast_lm_head_to_fp32=cast,
            outputs=("log_probs", *fused_head.EXTRAS),
        )
        assert one.keys() == other.keys()
        for field in one:
            torch.testing.assert_close(
                other[field], one[field], rtol=1e-5, atol=1e-5, msg=lambda m, f=field: f"{f} {m}"
            )
        for grad, expected in zip(others, grads, strict=True):
            assert (grad is None) == (expected is None)
            if grad is not None:
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1))


def test_a_batch_without_labels_has_a_differentiable_zero():
    (one, grads), (other, others) = both_heads(
        torch.ones(2, 4, dtype=torch.long), call={"labels": torch.full((2, 4), -100)}
    )
    assert one.loss == other.loss == 0
    assert all(float(a.abs().max()) == float(b.abs().max()) == 0 for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        fused_head.add_fused_head(make(), temperature=temperature)


# ---------------------------------------------------------------- fuse


def holders():
    return {name: m.add_fused_lm_head for name, m in sys.modules.items()
            if name.startswith("trl") and "add_fused_lm_head" in vars(m)}  # fmt: skip


def test_fuse_replaces_the_name_everywhere_and_takes_it_back(monkeypatch):
    before = holders()
    assert len(before) >= 6 and set(before.values()) == {THEIRS}
    first = fuse()
    assert set(holders().values()) == {trl_head._give_head}
    with fuse(impl="reference") as second:
        from trl.trainer.utils import add_fused_lm_head as kept

        late = type(sys)("trl.imported_meanwhile")
        late.add_fused_lm_head = trl_utils.add_fused_lm_head
        monkeypatch.setitem(sys.modules, late.__name__, late)
        first.undo()
        kept(make())
        assert (first.heads, second.heads) == (0, 1)
    assert set(holders().values()) == {THEIRS} and late.add_fused_lm_head is THEIRS
    second.undo()
    model = make()
    kept(model)  # TRL's again
    with without_trls_head(), pytest.raises(AssertionError, match="TRL's chunked head"):
        model(
            input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long), fused_lm_head=True
        )


def test_fuse_serves_dpo_too(tmp_path):
    args = trl.DPOConfig(str(tmp_path), **SETTINGS)
    with fuse(), without_trls_head():
        data = datasets.Dataset.from_dict(DATA)
        trl.DPOTrainer(make(), make(seed=1), args, train_dataset=data, processing_class=TOKENIZER).train()


def test_a_constructor_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="Mine replaces the forward"):
        trainer_of("SFT", tmp_path, model=unknown, by_class=True)
    assert set(holders().values()) == {THEIRS}
    with pytest.raises(ValueError, match="Mine replaces the forward"):
        trainer_of("SFT", tmp_path, model=unknown, fused=True)
    assert set(holders().values()) == {THEIRS}
    trainer_of("SFT", tmp_path, model=unknown, fused={"scale": 1.0})


def test_a_trainer_that_asks_for_no_head_is_an_error():
    with pytest.raises(RuntimeError, match="does not call add_fused_lm_head"), trl_head.fused_construction():
        pass
    assert set(holders().values()) == {THEIRS}


def test_options_reach_the_head(tmp_path):
    with pytest.raises(RuntimeError, match="impl='cuda' is not available"):
        trainer_of("KTO", tmp_path, by_class=True, fused={"impl": "cuda"})
    with pytest.raises(TypeError, match="memory_buget"):
        trainer_of("KTO", tmp_path, by_class=True, fused={"memory_buget": 1})
    with pytest.raises(ValueError, match="filter_eps"):
        fuse(filter_eps=2.0)
    assert set(holders().values()) == {THEIRS}
    theirs = run("SFT", tmp_path, {})
    filtered = run("SFT", tmp_path, {}, by_class=True, fused={"filter_eps": 0.02})
    assert filtered[0][0]["loss"] == pytest.approx(theirs[0][0]["loss"], rel=1e-4)
    errors = [float((filtered[1][0][n] - g).norm() / g.norm()) for n, g in theirs[1][0].items()]
    assert 1e-4 < max(errors) < 0.5


def test_lora_on_the_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        trainer_of("SFT", tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]), by_class=True)


# ---------------------------------------------------------------- models with vision


def with_vision():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, **sizes}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    kind = transformers.Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    return kind(kind.config_class(text_config=text, vision_config=vision))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_model_with_vision_needs_its_scale(tmp_path, name):
    """Its class is in no table of ours, so what it does to its logits must be given: nothing."""
    with pytest.raises(ValueError, match=r"Qwen3VLForConditionalGeneration .* is not in the table of models"):
        trainer_of(name, tmp_path, model=with_vision, fused=True)
    theirs = run(name, tmp_path, {}, model=with_vision)
    assert_same_run(theirs, run(name, tmp_path, {}, model=with_vision, fused={"scale": 1.0}))


# ---------------------------------------------------------------- TRL's experimental trainers


def test_what_derives_from_a_trainer_has_its_head(tmp_path):
    """GMPO: a loss of its own over the log-probs of GRPO."""
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    runs = []
    for fused in (False, True):
        gradients, args = Gradients(), GMPOConfig(str(tmp_path), **{**SETTINGS, **SAMPLED})
        with contextlib.ExitStack() as stack:
            if fused:
                stack.enter_context(without_trls_head())
                stack.enter_context(fuse())
            data = datasets.Dataset.from_dict(PROMPTS)
            given = {"train_dataset": data, "processing_class": TOKENIZER, "callbacks": [gradients]}
            trainer = GMPOTrainer(make(), reward_funcs=reward, args=args, **given)
            trainer.train()
        runs.append((trainer.state.log_history, gradients.steps))
    assert_same_run(*runs)


@pytest.mark.parametrize("module", ["orpo.orpo_trainer", "cpo.cpo_trainer", "tpo.tpo_trainer"])
def test_trainers_with_full_logits_do_not_ask_for_a_head(module):
    """What docs/trl.md says of ORPO, CPO (also SimPO and AlphaPO) and TPO."""
    trainer = importlib.import_module(f"trl.experimental.{module}")
    assert not hasattr(trainer, "add_fused_lm_head") and "logits" in inspect.getsource(trainer)
