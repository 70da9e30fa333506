"""`FusedDPOTrainer` against TRL's own `DPOTrainer`: losses, logged metrics and gradients of every step (SGD).

Our runs are made without TRL's chunked head, so that it cannot stand in for ours.
"""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trl.trainer import dpo_trainer  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

import cpo_kernels as cpo  # noqa: E402
from cpo_kernels.integrations import fused_head  # noqa: E402
from cpo_kernels.integrations.trl import NOT_IN_TRL, FusedDPOConfig, FusedDPOTrainer  # noqa: E402
from tests.support.heads import relative_error  # noqa: E402
from tests.support.tiny import one_thread  # noqa: E402, F401
from tests.support.trl_runs import (  # noqa: E402
    DATA,
    SETTINGS,
    TIMING,
    TOKENIZER,
    Gradients,
    assert_same_run,
    lora,
    make,
    quiet,  # noqa: F401
    unknown,
    without_trls_head,
)

TYPES = [name for name in cpo.LOSS_TYPES if name not in NOT_IN_TRL]
SMOOTHED = {"exo_pair": 0.07, "robust": 0.07, "aot": 0.07, "aot_unpaired": 0.07}


def trainer_of(fused, tmp_path, options, model=None, ref_model=None, data=None, eval_data=None, **kwargs):
    kind, config = (FusedDPOTrainer, FusedDPOConfig) if fused else (trl.DPOTrainer, trl.DPOConfig)
    settings = {**SETTINGS, "beta": 0.3, **options}
    data, eval_data = (datasets.Dataset.from_dict(d) if isinstance(d, dict) else d for d in (data or DATA, eval_data))
    return kind(
        make() if model is None else model(),
        make(seed=1) if ref_model is None else ref_model(),
        args=config(str(tmp_path / ("ours" if fused else "theirs")), **settings),
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=TOKENIZER,
        **kwargs,
    )


def run(fused, tmp_path, options, **kwargs):
    """(log history, gradients of each step) of a short training."""
    seen = Gradients()
    with without_trls_head() if fused else contextlib.nullcontext():
        trainer = trainer_of(fused, tmp_path, options, callbacks=[seen], **kwargs)
        trainer.train()
    return trainer.state.log_history, seen.steps


def assert_parity(tmp_path, options, **kwargs):
    theirs = run(False, tmp_path, options, **kwargs)
    assert_same_run(theirs, run(True, tmp_path, options, **kwargs))
    return theirs


# ---------------------------------------------------------------- TRL's losses


@pytest.mark.parametrize("name", TYPES)
def test_every_loss_type(tmp_path, name):
    assert_parity(tmp_path, {"loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0)})


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["exo_pair", "sigmoid"], "loss_weights": [0.5, 2.0], "label_smoothing": 0.1},
        {"ld_alpha": 0.4},
        {"ld_alpha": 0.0, "loss_type": "ipo"},
        {"use_weighting": True},
        {"use_weighting": True, "loss_type": ["nca_pair", "sigmoid_norm"]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence", "loss_type": "ipo"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7, "loss_type": "hinge"},
        {"discopop_tau": 0.2, "loss_type": "discopop"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"max_length": 12},
        {"max_length": 10, "truncation_mode": "keep_end"},
        {"pad_to_multiple_of": 16},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_options(tmp_path, options):
    assert_parity(tmp_path, options)


def test_precomputed_reference(tmp_path):
    options = {"precompute_ref_log_probs": True, "ld_alpha": 0.5}
    theirs = assert_parity(tmp_path, options, eval_data={k: v[:3] for k, v in DATA.items()})
    live = run(True, tmp_path, {"ld_alpha": 0.5})
    assert_same_run(theirs, live)


KEEP_END = {"max_length": 8, "truncation_mode": "keep_end"}  # no filter on the data


@pytest.mark.parametrize(
    "one, other, least",
    [
        ({"ld_alpha": 0.5}, {}, 0.1),
        ({"head_scale": 0.5}, {}, 0.1),
        (KEEP_END, {}, 0.1),
        (KEEP_END, KEEP_END | {"max_length": 9}, 0.1),
        ({"bf16": True}, {}, 1e-4),
    ],
    ids=["ld_alpha", "head_scale", "keep_end", "max_length", "bf16"],
)
def test_precomputed_references_of_other_options_are_not_taken(tmp_path, monkeypatch, one, other, least):
    """TRL names its cache by parameters and data; with keep_start its filter on the data holds all options."""
    datasets.Dataset.from_dict(DATA).save_to_disk(str(tmp_path / "data"))

    def reference(given):
        data = datasets.load_from_disk(str(tmp_path / "data"))
        options = {"precompute_ref_log_probs": True, "max_length": None, "head_scale": 1.0} | given
        trainer = trainer_of(True, tmp_path, options, ref_model=unknown, data=data)
        return torch.tensor(trainer.train_dataset["ref_chosen_logps"])

    first, second = map(reference, (one, other))
    assert (first - second).abs().max() > least
    monkeypatch.setattr(FusedDPOTrainer, "compute_ref_log_probs", None)
    assert torch.equal(reference(one), first)  # from the cache


@pytest.mark.parametrize(
    "name, options",
    [
        ("Gemma2", {"final_logit_softcapping": 1.5}),
        ("Cohere", {"logit_scale": 2.5}),
        ("Granite", {"logits_scaling": 0.4, "tie_word_embeddings": True}),
        ("Phi", {"pad_token_id": None}),  # transformers 5.0 has none for it
    ],
)
def test_heads(tmp_path, name, options):
    assert_parity(
        tmp_path, {}, model=lambda: make(name, **options), ref_model=lambda: make(name, seed=1, **options)
    )  # fmt: skip


def test_router_aux_loss(tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    models = {"model": lambda: make("Mixtral", **sizes), "ref_model": lambda: make("Mixtral", seed=1, **sizes)}
    log, _ = assert_parity(tmp_path, {"router_aux_loss_coef": 0.5}, **models)
    assert log[0]["aux_loss"] > 0.1


def test_evaluation(tmp_path):
    eval_data = {k: v[1:4] for k, v in DATA.items()}
    both = []
    for fused in (False, True):
        with without_trls_head() if fused else contextlib.nullcontext():
            both.append(trainer_of(fused, tmp_path, {}, eval_data=eval_data).evaluate())
    timing = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}
    for name in both[0].keys() - timing:
        assert both[1][name] == pytest.approx(both[0][name], rel=1e-4, abs=2e-5), name


def test_bfloat16_autocast(tmp_path):
    """Mixed precision as TRL runs it by default: near TRL's run, and no further from float32 than the naive logits."""
    theirs, ours = (run(fused, tmp_path, {"bf16": True, "max_grad_norm": 0.1}) for fused in (False, True))
    rewards = {name for log in theirs[0] for name in log if name.startswith("rewards/")}
    others = {name for log in theirs[0] for name in log} - rewards - TIMING
    assert_same_run(theirs, ours, rel=0.05, keys=others)
    assert_same_run(theirs, ours, rel=0.05, keys=rewards, floor=5e-3)  # TRL's hold the rounding of its logits

    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(2, 8)

    def grads(dtype, fused):
        model = make()
        fused_head.add_fused_head(model)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if fused:
                logps = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
            else:
                logps = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        (logps * upstream).sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()])

    truth = grads(torch.float32, False)
    error = {fused: float((grads(torch.bfloat16, fused) - truth).norm() / truth.norm()) for fused in (False, True)}
    assert 1e-4 < error[True] <= error[False] + 1e-3


def test_torch_compile(tmp_path):
    theirs = run(False, tmp_path, {})
    ours = run(True, tmp_path, {"torch_compile": True, "torch_compile_backend": "eager"})
    assert_same_run(theirs, ours)
    torch._dynamo.reset()


def test_reference_from_the_models_own_files(tmp_path):
    make().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    from_files = {"model": lambda: str(tmp_path / "model"), "ref_model": lambda: None}
    assert_parity(tmp_path, {"model_init_kwargs": {"dtype": "float32"}}, **from_files)


def test_plain_config_generation_and_cleanup(tmp_path):
    model = make()
    config = trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[], max_steps=1)
    data = datasets.Dataset.from_dict(DATA)
    kwargs = {"args": config, "train_dataset": data, "processing_class": TOKENIZER}
    before = make().generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    with without_trls_head():
        FusedDPOTrainer(model, make(seed=1), **kwargs)
    after = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(before, after)
    assert dpo_trainer.add_fused_lm_head is trl_utils.add_fused_lm_head
    with pytest.raises(ValueError, match="cannot be the same object"):
        FusedDPOTrainer(model, model, **kwargs)
    assert dpo_trainer.add_fused_lm_head is trl_utils.add_fused_lm_head


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}])
def test_lora(tmp_path, options):
    """The adapter is the policy, the base model the reference; nothing but the adapter learns."""
    _, steps = assert_parity(tmp_path, options, ref_model=lambda: None, peft_config=lora())
    assert all("lora_" in name for name in steps[0])


def test_lora_with_a_saved_head(tmp_path):
    config = lora(modules_to_save=["lm_head"])
    _, steps = assert_parity(tmp_path, {}, ref_model=lambda: None, peft_config=config)
    assert any("lm_head" in name for name in steps[0])


def test_trained_adapter_as_reference(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(2)
        return peft.get_peft_model(make(), lora())

    assert_parity(tmp_path, {}, model=adapted, ref_model=lambda: None)


def test_prompt_tuning(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_parity(tmp_path, {"learning_rate": 1.0}, ref_model=lambda: None, peft_config=config)


def test_lora_on_the_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        config = lora(target_modules=["q_proj", "lm_head"])
        trainer_of(True, tmp_path, {}, ref_model=lambda: None, peft_config=config)


# ---------------------------------------------------------------- sharded weights


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bonus", [0.0, 0.5])
def test_a_partitioned_weight_is_gathered_where_it_is_read(monkeypatch, frozen, bonus):
    """ZeRO-3's behaviour played by one process: the weight is empty outside of the gathering context.

    bonus: of the entropy, whose gradient needs the logits once more.
    """
    model, truth = make(), make()
    labels = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    for m in (model, truth):
        m.lm_head.weight.requires_grad_(not frozen)
        fused_head.add_fused_head(m, ("log_probs", "entropy"))
    upstream = torch.randn(2, 8)

    def loss(out):
        value = (out.log_probs * upstream).sum()
        return value + bonus * (out.entropy * upstream).sum() if bonus else value

    expected = truth(input_ids=labels, labels=labels, fused_lm_head=True)
    loss(expected).backward()

    weight, entered = model.lm_head.weight, []
    full, weight.ds_id, weight.ds_status = weight.data, 0, SimpleNamespace(name="NOT_AVAILABLE")
    weight.data = full[:0]

    @contextlib.contextmanager
    def gather(params):
        entered.append([p is weight for p in params])
        weight.data = full
        yield
        weight.data = full[:0]

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather)))
    out = model(input_ids=labels, labels=labels, fused_lm_head=True)
    assert torch.equal(out.log_probs, expected.log_probs) and weight.numel() == 0
    loss(out).backward()
    assert entered == [[True]] * (1 if frozen and not bonus else 2)
    for (name, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or relative_error(p.grad, q.grad) < 1e-6, name


def test_a_dtensor_weight(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        models, labels = [make(), make()], torch.arange(4, 22).view(2, 9)
        for m in models:
            fused_head.add_fused_head(m, ("log_probs", "entropy"))
        fully_shard(models[1], mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        outs = [m(input_ids=labels, labels=labels, fused_lm_head=True) for m in models]
        torch.testing.assert_close(outs[1].entropy, outs[0].entropy)
        for out in outs:
            (out.log_probs * torch.linspace(-1, 1, 16).view(2, 8)).sum().backward()
        for p, q in zip(models[1].parameters(), models[0].parameters(), strict=True):
            assert relative_error(p.grad.full_tensor(), q.grad) < 1e-6
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "options, match",
    [
        ({"loss_type": "simpo"}, "simpo is not a DPO loss of TRL"),
        ({"loss_type": "nonsense"}, "unknown loss_type 'nonsense'"),
        ({"label_smoothing": 0.1}, "label_smoothing is ignored by TRL for loss_type sigmoid"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing > 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is ignored"),
        ({"padding_free": True}, "padding_free is ignored"),
        ({"use_weighting": True, "loss_type": "hinge"}, "use_weighting with loss_type hinge"),
        ({"use_weighting": True, "loss_type": "sft"}, "use_weighting does not apply to loss_type 'sft'"),
        ({"use_weighting": True, "loss_type": "aot"}, "use_weighting does not apply to loss_type 'aot'"),
        ({"f_divergence_type": "forward_kl", "loss_type": "apo_zero"}, "f_divergence does not apply"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha only applies with"),
        ({"discopop_tau": 0.3}, "discopop_tau does not apply"),
        ({"ld_alpha": 1.5}, "ld_alpha must be in"),
        ({"tau": 0.5}, "tau applies only to rated pairs"),
        ({"margin": 0.5}, "margin applies only to rated pairs"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"objectives": [{"name": "h", "low": 5, "high": 1}]}, "low must be below high"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        FusedDPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_unknown_models_are_refused_unless_their_head_is_given(tmp_path):
    with pytest.raises(ValueError, match="Mine replaces the forward of LlamaForCausalLM"):
        trainer_of(True, tmp_path, {}, model=unknown)
    theirs = run(False, tmp_path, {}, model=unknown)
    assert_same_run(theirs, run(True, tmp_path, {"head_scale": 1.0}, model=unknown))
    with pytest.raises(RuntimeError, match="impl='cuda' is not available"):
        trainer_of(True, tmp_path, {"impl": "cuda"})


@pytest.mark.parametrize("filter_head_grad", [True, False])
def test_filtered_gradients(tmp_path, filter_head_grad):
    """The first step has TRL's loss and metrics to rounding, and gradients near its own."""
    theirs = run(False, tmp_path, {"max_steps": 3})
    ours = run(True, tmp_path, {"max_steps": 3, "filter_eps": "0.02", "filter_head_grad": filter_head_grad})
    assert ours[0][0]["loss"] == pytest.approx(theirs[0][0]["loss"], rel=1e-4)
    errors = [relative_error(ours[1][0][name], g) for name, g in theirs[1][0].items()]
    assert 1e-4 < max(errors) < 0.5


@pytest.mark.parametrize("eps, error", [("high", "got 'high'"), ("2", "got 2.0"), (None, "requires filter_eps")])
def test_wrong_filters(tmp_path, eps, error):
    with pytest.raises(ValueError, match=error):
        FusedDPOConfig(str(tmp_path), filter_eps=eps, filter_head_grad=True, use_cpu=True, bf16=False)
