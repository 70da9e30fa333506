"""What rows hold changes the work, not the numbers: shared prompts, packed and padded rows, every attention."""

from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cpo_kernels.data.packing import ROWS, collate
from cpo_kernels.recipe.config import read_config
from cpo_kernels.training import attention
from cpo_kernels.training.attention import attention_inputs, dense_mask
from cpo_kernels.training.loop import train
from cpo_kernels.training.losses import StepTotal
from cpo_kernels.training.models import load_model
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401
from tests.training.test_training import RECORDS, loss_and_groups, run, values

EVERY = [("shared", "sdpa"), ("packed", "sdpa"), ("shared", "segments"), ("packed", "segments")]


def prepared(rows, attention, dtype, stage):
    """A model, its loss and a batch of four prompts, with references that are not the model's own log-probs."""
    training = {"rows": rows, "tokens_per_microbatch": 10**6}
    model, loss, groups = loss_and_groups(stage, training=training, model={"attention": attention})
    model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    references = [torch.randn(len(g.responses), generator=generator).tolist() for g in groups[:4]]
    return model, loss, [replace(g, ref_logps=tuple(r)) for g, r in zip(groups, references, strict=False)]


@pytest.fixture
def norms_in_full_precision(monkeypatch):
    """Llama's norm computes in float32, float64 models too; a prompt's gradients from several responses meet there."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def close(found, expected, tolerance):
    scale = max(float(tensor.abs().max()) for tensor in expected)
    assert all(float((a - b).abs().max()) <= tolerance * scale for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_shared_and_packed_prompts_give_the_hidden_states_of_padded_rows(dtype, tolerance, norms_in_full_precision):
    """And the gradients of all parameters, under random upstream gradients."""

    def hidden_and_gradients(rows, attention):
        model, loss, groups = prepared(rows, attention, dtype, "cdpo")
        hidden = loss.module.hidden(loss.collate(groups))
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
        hidden.backward(upstream)
        return [hidden.detach()], [p.grad for p in model.parameters()]

    hidden, gradients = hidden_and_gradients("padded", "sdpa")
    for rows, kind in EVERY:
        other, others = hidden_and_gradients(rows, kind)
        close(other, hidden, tolerance)
        close(others, gradients, 10 * tolerance)  # sums over 2,000 tokens in another order


@pytest.mark.parametrize("stage", ["cdpo", "cpsft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shared_and_packed_prompts_give_the_loss_and_gradients_of_padded_rows(stage, dtype, norms_in_full_precision):
    """Sequence log-probs are float32 of up to 64 nats: beta times two of them moves a coefficient by 2 * 0.1 * 4e-6."""
    tolerance = 1e-12 if (stage, dtype) == ("cpsft", torch.float64) else 2e-6 if dtype == torch.float64 else 2e-5

    def loss_and_gradients(rows, attention):
        model, loss, groups = prepared(rows, attention, dtype, stage)
        value, _ = loss(loss.collate(groups), StepTotal.of(groups))
        value.backward(torch.tensor(1.7, dtype=value.dtype))
        return [value.detach()], [p.grad for p in model.parameters()]

    value, gradients = loss_and_gradients("padded", "sdpa")
    for rows, kind in EVERY:
        other, others = loss_and_gradients(rows, kind)
        close(other, value, tolerance)
        close(others, gradients, tolerance)


def test_rows_change_nothing_but_the_work():
    padded = run(training={"rows": "padded"})
    for rows in ("shared", "packed"):
        other = run(training={"rows": rows})
        for name in ("loss", "grad_norm", "eval_loss"):
            assert values(other, name) == pytest.approx(values(padded, name), rel=1e-3)
    assert values(run(), "tokens")[-1] < 0.7 * values(padded, "tokens")[-1]


@pytest.mark.parametrize("rows", ["shared", "packed"])
def test_flex_attention_gives_the_same_log_probs(rows):
    """Forward only: torch has no backward of it on the CPU."""
    _, sdpa, groups = loss_and_groups("cdpo", training={"rows": rows})
    _, flex, _ = loss_and_groups("cdpo", training={"rows": rows}, model={"attention": "flex_attention"})
    batch = flex.collate(groups[:3])
    assert batch.input_ids.shape == (1, batch.tokens)  # one row, no padding
    torch.testing.assert_close(flex.seq_logps(batch), sdpa.seq_logps(sdpa.collate(groups[:3])), atol=1e-4, rtol=1e-5)


def test_flash_attention_gets_the_lengths_of_packed_sequences(monkeypatch):
    """The varlen arguments, checked by attention made from only them; flash-attn itself needs a GPU."""
    model, loss, groups = loss_and_groups("cdpo", training={"rows": "packed"})
    monkeypatch.setattr(attention, "_name", lambda model: "flash_attention_2")
    batch = collate(groups[:3], "packed", attention.row_tokens(model))
    given = attention_inputs(model, batch)
    starts = given["cu_seq_lens_q"].tolist()
    assert given["cu_seq_lens_q"].dtype == torch.int32 and starts == given["cu_seq_lens_k"].tolist()
    assert given["attention_mask"] is None
    assert given["max_length_q"] == given["max_length_k"] == max(max(g.rows("packed")) for g in groups[:3])
    mask = torch.zeros(1, 1, batch.tokens, batch.tokens, dtype=torch.bool)
    for start, end in zip(starts, starts[1:], strict=False):
        mask[..., start:end, start:end] = torch.ones(end - start, end - start).tril()
    assert torch.equal(mask, dense_mask(batch.tree, batch.branch))
    assert starts[-1] == batch.tokens and batch.position_ids[0, starts[1:-1]].eq(0).all()


@pytest.mark.parametrize("rows", ["shared", "packed"])
def test_eager_attention_gives_the_same_log_probs(rows):
    _, sdpa, groups = loss_and_groups("cdpo", training={"rows": rows})
    _, eager, _ = loss_and_groups("cdpo", training={"rows": rows}, model={"attention": "eager"})
    found, expected = (loss.seq_logps(loss.collate(groups[:3])) for loss in (eager, sdpa))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_segments_fill_one_row_and_leave_generation_as_it_is():
    model, loss, groups = loss_and_groups("cdpo", model={"attention": "segments"})
    assert model.config._attn_implementation == "segments"
    batch = loss.collate(groups[:3])
    assert batch.input_ids.shape == (1, batch.tokens) and batch.segments[0][0] == len(groups[0].prompt)
    plain, _, _ = loss_and_groups("cdpo")
    assert plain.config._attn_implementation == "sdpa"
    plain.load_state_dict(model.state_dict())
    tokens, mask = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    answers = [m.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (model, plain)]
    assert torch.equal(*answers)
    logits = [m(tokens, attention_mask=mask).logits[mask == 1] for m in (model, plain)]  # padding stays unseen
    assert torch.equal(*logits)
    assert "segments" not in str(model.config.to_dict())  # neither what is saved nor what names a reference


def test_a_response_of_one_token_is_an_empty_segment():
    for rows in ("shared", "packed"):
        model, loss, groups = prepared(rows, "segments", torch.float64, "cdpo")
        short = replace(groups[0], responses=(groups[0].responses[0][:1], *groups[0].responses[1:]))
        _, dense, _ = prepared(rows, "sdpa", torch.float64, "cdpo")
        found, expected = (part.seq_logps(part.collate([groups[1], short])) for part in (loss, dense))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)


def test_a_model_that_passes_no_segments_on_is_refused(monkeypatch):
    _, loss, groups = loss_and_groups("cdpo", model={"attention": "segments"})
    given = attention_inputs(loss.model, loss.collate(groups[:1]))
    given.pop("segments")
    monkeypatch.setattr("cpo_kernels.training.losses.attention_inputs", lambda model, batch: given)
    with pytest.raises(ValueError, match="LlamaAttention gets no segments: .* Set model.attention: sdpa"):
        loss.seq_logps(loss.collate(groups[:1]))


def test_attention_that_cannot_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="flash_attention_2 needs flash-attn, which is not installed: use sdpa"):
        run(model={"attention": "flash_attention_2"})
    with pytest.raises(ValueError, match="model.attention: 'flash' is not one of sdpa, segments, flex_attention"):
        read_config({"model": {"attention": "flash"}})
    with pytest.raises(ValueError, match="segments would recompile for every batch: set"):
        loss_and_groups("cdpo", model={"attention": "segments"}, training={"compile": True})
    monkeypatch.setattr(attention, "_name", lambda model: "flash_attention_2")
    with pytest.raises(ValueError, match="shared needs sdpa or .* has 'flash_attention_2'.* training.rows: padded"):
        loss_and_groups("cdpo", training={"rows": "shared"})
    loss_and_groups("cdpo", training={"rows": "packed"})


def test_windows_shorter_than_a_prompt_are_refused():
    config = read_config(
        tiny.config("cdpo", model={"config": {**tiny.MODEL, "model_type": "mistral", "sliding_window": 64}})
    )
    model = load_model(config.model, None, tiny.tokenizer())[0]
    with pytest.raises(ValueError, match="at least data.max_tokens 1024; .* window 64"):
        train(config, model=model, tokenizer=tiny.tokenizer(), records=RECORDS)
    config.data.max_tokens, config.training.max_steps = 64, 1
    train(config, model=model, tokenizer=tiny.tokenizer(), records=RECORDS)


@pytest.mark.parametrize("rows", ["shared", "packed"])
def test_attention_by_place_in_the_row_needs_padded_rows(rows):
    """GPT-Neo's windows go by the index in a row: two sequences in one would hide the first tokens of the second."""
    options = {"model_type": "gpt_neo", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 8}
    model = {"config": {**options, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 1024}}
    with pytest.raises(ValueError, match="attention of gpt_neo uses a token's index in its row.*rows: padded"):
        run(model=model, training={"rows": rows})
    run(model=model, training={"rows": "padded", "max_steps": 1})


def test_rows_are_named():
    assert set(ROWS) == {"shared", "packed", "padded"}
    with pytest.raises(ValueError, match="training.rows: 'tree' is not one of shared, packed, padded"):
        read_config({"training": {"rows": "tree"}})
