"""Two processes, each with its own data of its own length, against one process: FSDP2, and TRL's trainer over DDP."""

import os
import socket

import pytest
import torch

from tests.support.heads import relative_error
from tests.support.processes import run_processes

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import cpo_kernels as cpo  # noqa: E402
from cpo_kernels.integrations import fused_head  # noqa: E402
from cpo_kernels.integrations.transformers import CausalLMLogps  # noqa: E402
from cpo_kernels.integrations.trl import FusedDPOConfig, FusedDPOTrainer  # noqa: E402
from tests.integrations.test_causal_lm import make as make_model  # noqa: E402
from tests.support.trl_runs import DATA, TOKENIZER  # noqa: E402
from tests.support.trl_runs import make as make_policy  # noqa: E402

pytestmark = pytest.mark.distributed

LENGTHS = (5, 12)  # of the sequences of each rank
RATED = {
    **DATA,
    "chosen_scores": [[5.0, 1.0], [2.0, 4.0], [3.0, 3.0], [1.0, 1.0], [4.0, 2.0], [2.0, 5.0]],
    "rejected_scores": [[1.0, 4.0], [4.0, 2.0], [3.0, 1.0], [5.0, 5.0], [1.0, 3.0], [2.0, 2.0]],
    "condition": [[5.0, 1.0], [1.0, 5.0], [2.0, 2.0], [5.0, 5.0], [1.0, 1.0], [3.0, 3.0]],
}
OBJECTIVES = [{"name": "honesty", "low": 1, "high": 5}, {"name": "helpfulness", "low": 1, "high": 5}]


def batch_of(rank):
    g = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 67, (2, LENGTHS[rank]), generator=g)
    mask = torch.ones_like(ids)
    mask[:, : LENGTHS[rank] // 2] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


def dpo(logps):
    """The loss of one pair, from token log-probs [2, T - 1]."""
    return cpo.preference_loss(logps.sum(1), ref_logps=torch.tensor([-9.0, -8.0]), beta=0.3).loss


# ------------------------------------------------------------------------------------------------ what the ranks run


def fsdp(rank):
    """Loss and whole gradients by way of sharding; the head with the root, or sharded by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, batch, seen = init_device_mesh("cpu", (2,)), batch_of(rank), {}

    def shard(model, *more):
        for layer in (*model.model.layers, *more):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)

    def step(name, logps, model):
        loss = dpo(logps)
        loss.backward()
        seen[name] = loss.detach(), {n: p.grad.full_tensor() for n, p in model.named_parameters()}

    module = CausalLMLogps(make_model("LlamaForCausalLM"))
    shard(module.model)
    fully_shard(module, mesh=mesh)
    step("module", module(**batch), module.model)

    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for name in ("root", "own"):
        model = make_model("LlamaForCausalLM")
        fused_head.add_fused_head(model)
        shard(model, *([model.lm_head] if name == "own" else []))
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        step(name, model(**inputs, labels=labels, fused_lm_head=True).log_probs, model)
    return seen


def train(folder, rated, world):
    """(log history, weights) of two steps of one epoch."""
    data = {key: values[:4] for key, values in (RATED if rated else DATA).items()}
    args = FusedDPOConfig(
        str(folder), bf16=False, use_cpu=True, max_steps=2, per_device_train_batch_size=2 // world, logging_steps=1,
        optim="sgd", learning_rate=1e-3, max_grad_norm=1e9, beta=0.3, report_to=[], disable_tqdm=True,
        save_strategy="no", gradient_checkpointing=False, objectives=OBJECTIVES if rated else None,
    )  # fmt: skip
    trainer = FusedDPOTrainer(
        make_policy(),
        make_policy(seed=1),
        args=args,
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=TOKENIZER,
    )
    trainer.train()
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return trainer.state.log_history, {name: p.detach().clone() for name, p in named}


def fsdp_and_ddp(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    return fsdp(rank), {rated: train(f"{folder}/{rated}", rated, 2) for rated in (False, True)}


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_processes(fsdp_and_ddp, 2, str(tmp_path_factory.mktemp("ddp")), port)


@pytest.mark.parametrize("name", ["module", "root", "own"])
def test_fsdp2_averages_the_gradients_of_both_ranks(ranks, name):
    want = {}
    for rank in range(2):
        model = make_model("LlamaForCausalLM")
        module, batch = CausalLMLogps(model), batch_of(rank)
        loss = dpo(module(**batch))
        loss.backward()
        assert relative_error(ranks[rank][0][name][0], loss) < 1e-5
        for n, p in model.named_parameters():
            want[n] = want.get(n, 0) + p.grad / 2
    for seen, _ in ranks:
        grads = seen[name][1]
        assert grads.keys() == want.keys()
        for n, grad in want.items():
            assert relative_error(grads[n], grad) < 2e-5, n


@pytest.mark.parametrize("rated", [False, True])
def test_trainer_over_two_processes_is_the_trainer_over_one(tmp_path, ranks, rated):
    """One pair a process against two in one: the mean of the pairs' losses; the third rated pair is a tie."""
    log, weights = train(tmp_path, rated, 1)
    for other in (rank[rated][1] for _, rank in ranks):
        for name, weight in weights.items():
            assert relative_error(other[name], weight) < 1e-5, name
    for one, both in zip(log[:2], ranks[0][1][rated][0][:2], strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "entropy"):
            assert both[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    start = dict(make_policy().named_parameters())
    assert max(relative_error(weights[name], start[name]) for name in weights) > 1e-3  # something was learnt
