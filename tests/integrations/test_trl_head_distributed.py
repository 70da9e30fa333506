"""TRL's trainers in two processes, TRL's head against ours: over DDP, and with weights that FSDP2 shards."""

import contextlib

import pytest
import torch

from tests.support.heads import relative_error
from tests.support.processes import as_launched, free_port, run_processes

pytest.importorskip("trl")
pytest.importorskip("datasets")

from tests.integrations.test_trl_head import TRAINERS, run, trainer_of  # noqa: E402
from tests.support.trl_runs import assert_same_run, without_trls_head  # noqa: E402

pytestmark = pytest.mark.distributed
SHARDED = {"KTO": {}, "GRPO": {"entropy_coef": 0.5}}


def sharded_step(name, folder, fused):
    """Loss and whole gradients of one batch. (accelerate shards nothing on a CPU: sharded here, after construction.)"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with without_trls_head() if fused else contextlib.nullcontext():
        trainer = trainer_of(name, folder, {"per_device_train_batch_size": 2, **SHARDED[name]}, fused=fused)
        trainer.current_gradient_accumulation_steps = 1  # what train() sets
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        mesh = init_device_mesh("cpu", (2,))
        for module in (*trainer.model.model.layers, trainer.model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    return loss.detach(), {n: p.grad.full_tensor() for n, p in trainer.model.named_parameters()}


def both_heads(rank, folder, port):
    """By trainer: what `run` gives over DDP, and a sharded step, each of TRL's head and of ours."""
    as_launched(rank, 2, port)
    made = {}
    for name in TRAINERS:
        options = {"per_device_train_batch_size": 2}
        ddp = [run(name, f"{folder}/{name}", options, fused=fused) for fused in (False, True)]
        made[name] = ddp, [sharded_step(name, f"{folder}/{name}", f) for f in (False, True) if name in SHARDED]
    return made


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_processes(both_heads, 2, str(tmp_path_factory.mktemp("two")), free_port())


@pytest.mark.parametrize("name", TRAINERS)
def test_over_ddp(ranks, name):
    for (theirs, ours), _ in (rank[name] for rank in ranks):
        assert_same_run(theirs, ours)
    for one, other in zip(ranks[0][name][0][1][1], ranks[1][name][0][1][1], strict=True):  # ours, the gradients applied
        assert all(torch.equal(one[parameter], other[parameter]) for parameter in one)


@pytest.mark.parametrize("name", SHARDED)
def test_with_fsdp2(ranks, name):
    for _, ((loss, grads), (our_loss, our_grads)) in (rank[name] for rank in ranks):
        assert relative_error(our_loss, loss) < 1e-5 or abs(our_loss - loss) < 1e-6
        assert grads.keys() == our_grads.keys() and float(grads["lm_head.weight"].abs().max()) > 1e-4
        for parameter, grad in grads.items():
            assert relative_error(our_grads[parameter], grad) < 2e-5, parameter
