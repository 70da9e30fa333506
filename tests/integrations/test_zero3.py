"""DeepSpeed ZeRO-3 on two CPU processes against one process. Runs where deepspeed is installed (CI has none)."""

import os

import pytest

from tests.support.heads import relative_error
from tests.support.processes import run_processes

pytest.importorskip("deepspeed")
pytest.importorskip("trl")

from cpo_kernels.integrations import fused_head  # noqa: E402
from cpo_kernels.integrations.transformers import CausalLMLogps  # noqa: E402
from tests.integrations.test_causal_lm import make  # noqa: E402
from tests.integrations.test_distributed import batch_of, dpo  # noqa: E402

pytestmark = pytest.mark.distributed


def zero3(rank):
    """By whether the head is frozen: the loss, and whole gradients of what trains."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "zero_optimization": zero}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    kept = HfDeepSpeedConfig(config)  # transformers asks whether one is alive
    seen, batch = {}, batch_of(rank)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    for frozen in (False, True):
        model = make("LlamaForCausalLM")
        model.lm_head.weight.requires_grad_(not frozen)
        fused_head.add_fused_head(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=config)
        assert model.lm_head.weight.numel() == 0  # partitioned, until it is gathered
        loss = dpo(engine(**batch, labels=labels, fused_lm_head=True).log_probs)
        engine.backward(loss)
        assert model.lm_head.weight.numel() == 0
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        seen[frozen] = loss.detach(), {n: safe_get_full_grad(p).clone() for n, p in named}
    del kept
    return seen


def test_zero3_gathers_the_head_and_averages_the_gradients():
    ranks, want = run_processes(zero3, 2), {}
    for rank, seen in enumerate(ranks):
        model = make("LlamaForCausalLM")
        loss = dpo(CausalLMLogps(model)(**batch_of(rank)))
        loss.backward()
        for n, p in model.named_parameters():
            want[n] = want.get(n, 0) + p.grad / 2
        for value, _ in seen.values():
            assert relative_error(value, loss) < 1e-5
    for seen in ranks:
        for frozen, (_, grads) in seen.items():
            assert want.keys() - grads.keys() == ({"lm_head.weight"} if frozen else set())
            for n, grad in grads.items():
                assert relative_error(grad, want[n]) < 1e-5, n
