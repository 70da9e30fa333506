"""Causal LMs whose head is sharded over two processes, by a plan of transformers or torch's ColwiseParallel."""

import os

import pytest
import torch

from tests.support.heads import relative_error
from tests.support.processes import run_processes

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl")
pytest.importorskip("transformers.distributed.tensor_parallel")  # DTensor plans

from cpo_kernels import FusedLinearCPOLoss  # noqa: E402
from cpo_kernels.integrations.fused_head import add_fused_head  # noqa: E402
from cpo_kernels.integrations.transformers import causal_lm_inputs, causal_lm_logps  # noqa: E402
from tests.integrations.test_causal_lm import make, make_batch, upstream  # noqa: E402

pytestmark = pytest.mark.distributed

PAIRS, REF = torch.tensor([[0, 1], [2, 0]]), torch.tensor([-30.0, -20.0, -25.0])


def shard(model, how, mesh):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    if how == "plan":
        rules = {}
        for name in (n for named in (model.named_modules(), model.named_parameters()) for n, _ in named):
            general = replace_layer_number_by_wildcard(name)
            rules[name] = model.tp_plan.get(general, model.tp_plan.get(general.removesuffix(".weight")))
        apply_tensor_parallelism(model, mesh, {name: rule for name, rule in rules.items() if rule})
    else:
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return model


def grads(model):
    whole = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return whole


def step(model):
    """Log-probs, their gradients, those of the loss, and log-probs in the model's own forward as TRL asks for them."""
    batch = make_batch()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logps = causal_lm_logps(model, batch)
    (logps * upstream(batch)).sum().backward()
    seen = {"logps": logps.detach(), "logps grads": grads(model)}
    with torch.no_grad():
        seen["no_grad"] = causal_lm_logps(model, batch)
    loss = FusedLinearCPOLoss()(*causal_lm_inputs(model, batch), pairs=PAIRS, ref_logps=REF).loss
    loss.backward()
    seen |= {"loss": loss.detach(), "loss grads": grads(model)}
    add_fused_head(model, ("log_probs", "sequence_mean_logits"))
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
    (out.log_probs * upstream(batch)).sum().backward()
    seen["means"] = out.sequence_mean_logits
    return seen | {"fused": out.log_probs.detach(), "fused grads": grads(model)}


def every_way(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    seen = {how: step(shard(make("LlamaForCausalLM"), how, mesh)) for how in ("plan", "colwise")}
    refused = {
        "halves of the width": parallelize_module(make("LlamaForCausalLM"), mesh, {"lm_head": RowwiseParallel()}),
        "a hook beside": shard(make("LlamaForCausalLM"), "colwise", mesh),
        "FSDP2": fully_shard(make("LlamaForCausalLM"), mesh=mesh),
    }
    refused["a hook beside"].lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    for name, model in refused.items():
        with pytest.raises(ValueError) as error:
            causal_lm_logps(model, make_batch())
        seen[name] = str(error.value)
    return seen


@pytest.fixture(scope="module")
def ranks():
    return run_processes(every_way, 2)


@pytest.fixture(scope="module")
def truth():
    return step(make("LlamaForCausalLM"))


@pytest.mark.parametrize("how", ["plan", "colwise"])
def test_a_spread_head_gives_what_the_whole_model_gives(how, ranks, truth):
    for seen in ranks:
        for name, want in truth.items():
            if name.endswith("grads"):
                assert seen[how][name].keys() == want.keys()
                for n, grad in want.items():
                    assert relative_error(seen[how][name][n], grad) < 1e-4, (name, n)
            else:
                assert relative_error(seen[how][name], want) < 1e-5, name


def test_what_is_not_understood_is_refused(ranks):
    for seen in ranks:
        assert "must be Shard(0)" in seen["halves of the width"]
        assert "sharded" in seen["a hook beside"] and "FSDP2" in seen["FSDP2"]
