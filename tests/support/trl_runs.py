"""Short trainings with TRL's head and with ours, and what they must share.

TRL's chunked head is made to raise wherever ours runs, so that it cannot stand in for it.
"""

import contextlib
import os
import warnings

import pytest
import torch
import transformers

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trl.trainer import utils as trl_utils  # noqa: E402

from tests.support.tiny import PREFERENCES, tokenizer  # noqa: E402

datasets.disable_progress_bars()
TOKENIZER = tokenizer()
TIMING = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}
DATA = {key: [row[i] for row in PREFERENCES] for i, key in enumerate(("prompt", "chosen", "rejected"))}
SETTINGS = {
    "bf16": False, "use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1,
    "optim": "sgd", "learning_rate": 0.03, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
    "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    monkeypatch.setattr(transformers.trainer_callback.PrinterCallback, "on_log", lambda *_, **__: None)


def make(name="Llama", seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind(kind.config_class(vocab_size=len(TOKENIZER), **sizes, **heads, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def lora(**options):
    peft = pytest.importorskip("peft")
    names = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "r": 4, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**names, **options})


class Mine(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def unknown():
    """A model whose head must be given."""
    model = make()
    model.__class__ = Mine
    return model


class Gradients(transformers.TrainerCallback):
    """The gradients that each step applies."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append(named)


@contextlib.contextmanager
def without_trls_head():
    def fail(*_):
        raise AssertionError("TRL's chunked head ran")

    theirs = trl_utils._ChunkedLogProbFunction.apply
    trl_utils._ChunkedLogProbFunction.apply = fail
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction.apply = theirs


def assert_same_run(theirs, ours, rel=1e-4, keys=None, floor=2e-5):
    """floor: absolute difference that a logged number may have."""
    assert len(ours[0]) == len(theirs[0]) and len(ours[1]) == len(theirs[1]) == 3
    for step, (one, other) in enumerate(zip(theirs[0], ours[0], strict=True)):
        names = one.keys() - TIMING if keys is None else keys & one.keys()
        assert keys is not None or names == other.keys() - TIMING
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=rel, abs=floor), f"{name} at log {step}"
    for step, (one, other) in enumerate(zip(theirs[1], ours[1], strict=True)):
        assert one.keys() == other.keys()
        top = max(float(g.abs().max()) for g in one.values())
        assert top > 1e-4  # a run that learns nothing would agree with anything
        for name, grad in one.items():
            assert float((other[name] - grad).abs().max()) < rel * top, f"{name} at step {step}"
