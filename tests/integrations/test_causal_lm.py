"""`causal_lm_logps` against the model's own full logits, for every class of the table, on tiny random models."""

import copy
import inspect

import pytest
import torch
import transformers
from torch import nn

from cpo_kernels import FusedLinearCPOLoss, preference_loss
from cpo_kernels.integrations.fused_head import add_fused_head
from cpo_kernels.integrations.transformers import HEADS, CausalLMLogps, causal_lm_inputs, causal_lm_logps, lm_head
from tests.support.heads import relative_error
from tests.support.tiny import one_thread  # noqa: F401

VOCAB, LENGTH = 67, 11
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "lm_head_bias": True,  # Phimoe
    # What the table is about, far from 1 and small enough to bend these models' logits.
    "final_logit_softcapping": 1.5,
    "logits_soft_cap": 1.5,
    "logit_scale": 2.5,
    "logits_scaling": 0.4,
    "lm_head_multiplier": 2.5,
    "dim_model_base": 80,  # MiniCPM3: logits_scaling = hidden_size / dim_model_base
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"num_hidden_layers": 4, "shared_expert_intermediate_size": 16}
OWN = {
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "Glm4MoeLiteForCausalLM": LATENT,
    "MiniCPM3ForCausalLM": {**LATENT, "head_dim": 16, "logits_scaling": None},
    "FalconForCausalLM": {"head_dim": None},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_state": 4, "mamba_d_head": 8},
    "Gemma4ForCausalLM": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Qwen2MoeForCausalLM": {"shared_expert_intermediate_size": 16},
    "Qwen3NextForCausalLM": LINEAR,
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5MoeForCausalLM": LINEAR,
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3, "lru_width": 32},
}


def make(name, seed=0, **options):
    """A model with every parameter moved away from its initial value, zeros of biases and ones of norms included."""
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    given = {k: v for k, v in {**SIZES, **OWN.get(name, {}), **options}.items() if v is not None}
    model = kind(kind.config_class(**given)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    return model


def make_batch(side="right"):
    """Three sequences of different lengths; half of each is prompt."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([LENGTH, 7, 9])[:, None]
    position = torch.arange(LENGTH) if side == "right" else torch.arange(LENGTH - 1, -1, -1)
    attention_mask = (position < lengths).long()
    rank = position if side == "right" else lengths - 1 - position  # index within the sequence
    ids = torch.randint(3, VOCAB, (3, LENGTH), generator=g) * attention_mask
    completion_mask = (rank >= lengths // 2).long() * attention_mask
    return {"input_ids": ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def upstream(batch):
    return torch.randn(3, LENGTH - 1, generator=torch.Generator().manual_seed(2))


def own_logps(model, batch):
    """From the model's full logits, in float64."""
    mask = batch["completion_mask"][:, 1:]
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    logits = model(**inputs, use_cache=False).logits.double()
    return logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask


def grads(model, logps, batch):
    model.zero_grad()
    (logps * upstream(batch)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch, fused=causal_lm_logps, **options):
    truth = own_logps(model, batch)
    their_grads = grads(model, truth, batch)
    seen = fused(model, batch, **options)
    assert seen.shape == truth.shape and seen.dtype == torch.float32
    assert relative_error(seen, truth) < 2e-6
    our_grads = grads(model, seen, batch)
    assert our_grads.keys() == their_grads.keys()
    top = max(float(g.abs().max()) for g in their_grads.values())
    for name, grad in their_grads.items():
        assert float((our_grads[name] - grad).abs().max()) < 2e-5 * float(grad.abs().max()) + 1e-6 * top, name
    return seen


@pytest.mark.parametrize("name", HEADS)
def test_every_model_of_the_table(name):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model, batch = make(name, tie_word_embeddings=False), make_batch()
    seen = assert_same(model, batch)
    bent = lm_head(model)
    if (bent.softcap, bent.scale) != (None, 1.0):
        with torch.no_grad():
            plain = causal_lm_logps(model, batch, scale=1.0)
        assert relative_error(plain, seen) > 1e-2


def test_the_table_has_rows_of_every_kind():
    rules = {rule.__name__ for rule in HEADS.values()}
    assert len(rules) == 7
    assert make("PhiForCausalLM").lm_head.bias.abs().max() > 0.1  # a bias of zero would not be noticed
    assert lm_head(make("PhimoeForCausalLM")).bias is not None


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "CohereForCausalLM"])
def test_tied(name):
    model = make(name, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same(model, make_batch())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM"])
def test_left_padding(name):
    assert_same(make(name), make_batch("left"))


def test_labels_are_a_completion_mask():
    model, batch = make("LlamaForCausalLM"), make_batch()
    truth = causal_lm_logps(model, batch)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -7)
    torch.testing.assert_close(causal_lm_logps(model, {**batch, "labels": labels}, ignore_index=-7), truth)


def test_extras_and_padded_vocabulary():
    model, batch = make("Gemma2ForCausalLM"), make_batch()
    batch["input_ids"].clamp_(max=59)
    logps, extras = causal_lm_logps(model, batch, extras=True, vocab_size=60)
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    truth = model(**inputs).logits[:, :-1, :60].log_softmax(-1)
    mask = batch["completion_mask"][:, 1:]
    assert relative_error(logps, truth.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask) < 1e-5
    assert relative_error(extras.entropy, -(truth.exp() * truth).sum(-1) * mask) < 1e-5


def test_gradient_checkpointing():
    model, batch = make("LlamaForCausalLM"), make_batch()
    truth = grads(model, causal_lm_logps(model, batch), batch)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    seen = grads(model.train(), causal_lm_logps(model, batch), batch)
    assert len(calls) == 2  # the layer ran again in backward
    for name, grad in truth.items():
        assert relative_error(seen[name], grad) < 1e-5, name


def test_autocast():
    """float32 weights, bfloat16 products: the same as the model's own under autocast, to bfloat16's rounding."""
    model, batch = make("LlamaForCausalLM"), make_batch()
    truth = own_logps(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        seen, naive = causal_lm_logps(model, batch), own_logps(model, batch)
    assert relative_error(seen, truth) <= relative_error(naive, truth) + 1e-3


def test_fused_loss_from_the_parts():
    """`FusedLinearCPOLoss` (3 products) over the parts of a scaled head: the loss of the model's own logits."""
    model, reference = make("CohereForCausalLM"), make("CohereForCausalLM", seed=5)
    batch = {k: v[:2] for k, v in make_batch().items()}
    with torch.no_grad():
        ref_logps = causal_lm_logps(reference, batch).sum(1)
    seq_logps = own_logps(model, batch).float().sum(1)
    truth = preference_loss(seq_logps, ref_logps=ref_logps, beta=0.3)
    truth.loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss_fn = FusedLinearCPOLoss(beta=0.3, **lm_head(model).options)
    out = loss_fn(*causal_lm_inputs(model, batch), ref_logps=ref_logps)
    out.loss.backward()
    assert relative_error(out.loss, truth.loss) < 1e-5
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected[name]) < 5e-5, name


# ---------------------------------------------------------------- refused, or said by hand


class Shifted(transformers.LlamaForCausalLM):
    def forward(self, **kwargs):
        out = super().forward(**kwargs)
        out.logits = out.logits * 3
        return out


def refused(model, match, error=ValueError, batch=None, **options):
    with pytest.raises(error, match=match):
        causal_lm_logps(model, make_batch() if batch is None else batch, **options)


def test_unknown_models_are_refused():
    torch.manual_seed(0)
    shifted = Shifted(transformers.LlamaConfig(**SIZES)).eval()
    refused(shifted, "replaces the forward of LlamaForCausalLM")
    assert_same(shifted, make_batch(), scale=3.0)
    kind = transformers.ModernBertDecoderForCausalLM
    refused(kind(kind.config_class(**SIZES)), "ModernBertDecoderForCausalLM .* is not in the table")
    refused(make("LlamaForCausalLM").model, "plain nn.Linear", TypeError)
    refused(nn.Linear(2, 2), "expected a transformers causal LM", TypeError)


def test_a_class_of_the_same_name_is_refused():
    """Remote code may call its class LlamaForCausalLM."""
    impostor = type("LlamaForCausalLM", (transformers.GPT2LMHeadModel,), {})
    model = impostor(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB))
    assert lm_head(model).scale == 1.0  # its forward is GPT-2's own, and only that is known
    other = type("LlamaForCausalLM", (transformers.ModernBertDecoderForCausalLM,), {})
    refused(other(transformers.ModernBertDecoderConfig(**SIZES)), "is not in the table")


def test_replaced_forwards_and_hooks_are_refused():
    model = make("LlamaForCausalLM")
    model.forward = model.forward
    refused(model, "forward of this LlamaForCausalLM was replaced")
    model = make("LlamaForCausalLM")
    handle = model.lm_head.register_forward_hook(lambda m, i, out: out * 2)
    refused(model, "forward hooks")
    handle.remove()
    model.lm_head = nn.Sequential(model.lm_head)
    refused(model, "plain nn.Linear", TypeError)


def test_a_head_that_a_device_map_has_dispatched():
    """accelerate replaces forwards to move inputs to a device. One that brings weights from elsewhere is refused."""
    from accelerate import dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    batch, own, model = make_batch(), make("LlamaForCausalLM"), make("LlamaForCausalLM")
    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model.lm_head)
    add_fused_head(model)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: tensor for name, tensor in batch.items() if name != "completion_mask"}
    seen = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    assert relative_error(seen * (labels[:, 1:] != -100), own_logps(own, batch)) < 2e-6
    add_hook_to_module(own.lm_head, AlignDevicesHook(offload=True))
    with pytest.raises(TypeError, match="Linear with another forward, but a plain nn.Linear is needed"):
        add_fused_head(own)


def test_a_copy_of_a_model_with_our_head_is_a_model_of_its_own():
    """As a reference model is made: with and without `fused_lm_head` it runs its own weights."""
    batch, model = make_batch(), make("LlamaForCausalLM")
    mask = batch.pop("completion_mask")
    batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
    add_fused_head(model)
    add_fused_head(model, ("log_probs", "entropy"))  # again, with other outputs
    copied, want = copy.deepcopy(model), [model(**batch).logits, model(**batch, fused_lm_head=True).log_probs]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = [copied(**batch).logits, copied(**batch, fused_lm_head=True).log_probs]
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(found, want, strict=True))
    assert model(**batch).logits.abs().max() == 0


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "PhiForCausalLM", "CohereForCausalLM", "Gemma2ForCausalLM"])
def test_the_mean_logit_of_every_position(name):
    """A plain head, one with a bias, with a scale, with a softcap; positions without a label count as well."""
    batch, model = make_batch(), make(name)
    mask = batch.pop("completion_mask")
    want = model(**batch).logits.double().mean((1, 2))
    add_fused_head(model, ("sequence_mean_logits",))
    out = model(**batch, labels=batch["input_ids"].masked_fill(mask == 0, -100), fused_lm_head=True)
    assert not out.sequence_mean_logits.requires_grad and out.log_probs.requires_grad
    assert relative_error(out.sequence_mean_logits, want) < 2e-6


def test_batches_are_checked():
    model, batch = make("LlamaForCausalLM"), make_batch()
    refused(model, "got both", batch={**batch, "labels": batch["input_ids"]})
    refused(model, "got neither", batch={"input_ids": batch["input_ids"]})
    refused(model, "batch has scores", batch={**batch, "scores": torch.zeros(3)})
    refused(
        model,
        r"completion_mask must have the shape of input_ids, \[3, 11\]",
        batch={**batch, "completion_mask": torch.ones(3, 10)},
    )
    assert "attention_mask" in inspect.signature(model.model.forward).parameters


# ---------------------------------------------------------------- wrappers


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(torch.randn_like(p), alpha=0.2)
    return wrapped


def test_lora():
    model = lora(make("LlamaForCausalLM"))
    on = assert_same(model, make_batch())
    with model.disable_adapter(), torch.no_grad():
        off = causal_lm_logps(model, make_batch())
        assert relative_error(off, own_logps(model, make_batch())) < 1e-5
    assert relative_error(off, on) > 1e-2


def test_lora_with_gradient_checkpointing():
    model = lora(make("LlamaForCausalLM")).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_same(model, make_batch())


def test_a_saved_head_is_the_active_adapters():
    model = lora(make("LlamaForCausalLM"), modules_to_save=["lm_head"])
    on = assert_same(model, make_batch())
    with model.disable_adapter(), torch.no_grad():
        off = causal_lm_logps(model, make_batch())
        assert relative_error(off, own_logps(model, make_batch())) < 1e-5
    assert relative_error(off, on) > 1e-2


def test_adapters_that_the_base_model_would_drop_are_refused():
    peft = pytest.importorskip("peft")
    head = peft.get_peft_model(make("LlamaForCausalLM"), peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    refused(head, "Remove 'lm_head' from target_modules")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    refused(peft.get_peft_model(make("LlamaForCausalLM"), prompt), "PROMPT_TUNING adapter adds virtual tokens")


def test_trained_rows_of_the_head_are_refused_for_what_they_are():
    """With the advice that holds for a tied head, where peft puts them by itself."""
    for tied, indices in ((True, [3, 4]), (False, {"lm_head": [3, 4]})):
        model = make("LlamaForCausalLM", tie_word_embeddings=tied)
        refused(
            lora(model, trainable_token_indices=indices),
            r"by its own, .* Omit trainable_token_indices; modules_to_save=\['lm_head'\] trains the head",
        )
    lora_only = lora(make("LlamaForCausalLM", tie_word_embeddings=False), trainable_token_indices=[3, 4])
    assert_same(lora_only, make_batch())  # only of the embeddings
    assert_same(lora(make("LlamaForCausalLM", tie_word_embeddings=True), modules_to_save=["lm_head"]), make_batch())


def test_wrappers():
    model, batch = make("LlamaForCausalLM"), make_batch()
    refused(nn.DataParallel(model), "DataParallel gathers the weights")
    refused(torch.compile(model, backend="eager"), "compile its backbone in place")
    compiled = make("LlamaForCausalLM")
    compiled.base_model.compile(backend="eager")
    torch.testing.assert_close(causal_lm_logps(compiled, batch), causal_lm_logps(model, batch))


@pytest.fixture
def group(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel(group):
    model, batch = make("LlamaForCausalLM"), make_batch()
    ddp = nn.parallel.DistributedDataParallel(model)
    refused(ddp, r"DistributedDataParallel\(CausalLMLogps\(model\)\)")
    with torch.no_grad():
        torch.testing.assert_close(causal_lm_logps(ddp, batch), causal_lm_logps(model, batch))
    module = nn.parallel.DistributedDataParallel(CausalLMLogps(make("LlamaForCausalLM")))
    hooks = []
    module.register_comm_hook(None, lambda _, bucket: hooks.append(1) or _done(bucket))
    (module(**batch) * upstream(batch)).sum().backward()
    assert hooks  # gradients went through the reducer
    truth = grads(model, own_logps(model, batch), batch)
    for name, p in module.module.model.named_parameters():
        assert relative_error(p.grad, truth[name]) < 1e-4, name


def _done(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_sharded_weights(group):
    """FSDP2: refused from outside, right where the log-probs are the sharded module."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, batch = init_device_mesh("cpu", (1,)), make_batch()
    refused(fully_shard(make("LlamaForCausalLM"), mesh=mesh), "weight is sharded")
    model = make("LlamaForCausalLM")
    truth = grads(model, own_logps(model, batch), batch)
    module = CausalLMLogps(make("LlamaForCausalLM"))
    for layer in module.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    (module(**batch) * upstream(batch)).sum().backward()
    for name, p in module.model.named_parameters():
        assert relative_error(p.grad.full_tensor(), truth[name]) < 1e-4, name


def test_filtered_gradients():
    """filter_eps reaches the head: log-probs as ever, gradients of its own. At 0.02 this flat model is exact."""
    model, batch = make("LlamaForCausalLM"), make_batch()
    exact, filtered = (causal_lm_logps(model, batch, filter_eps=eps, filter_head_grad=bool(eps)) for eps in (None, 0.2))
    torch.testing.assert_close(exact, filtered)
    a, b = (grads(model, logps, batch) for logps in (exact, filtered))
    differences = [float((x - b[name]).norm() / x.norm()) for name, x in a.items() if x.norm() > 0]
    assert 1e-4 < max(differences) < 1.0
