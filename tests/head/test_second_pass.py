"""Gradients by vocab tiles: every column once, labels on the borders, memory without a second dW."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import cpo_kernels as cpo
from cpo_kernels import reference
from cpo_kernels.backends import dispatch
from cpo_kernels.head import grads, inputs, live_backward
from cpo_kernels.head.matmul import cpu_multiplies
from cpo_kernels.head.recompute import ALIGN, second_pass, vocab_tiles
from cpo_kernels.ops.token_logps import HeadOptions
from tests.support.heads import BACKENDS, LOW_PRECISION, relative_error


@given(st.integers(0, 10_000), st.integers(0, 300_000), st.integers(0, 2**28))
def test_vocab_tiles_take_every_column_once(num_rows, num_columns, elements):
    parts = vocab_tiles(num_rows, num_columns, elements)
    if len(parts) > 10_000:  # a budget of a few elements
        return
    assert [c for part in parts for c in (part.start, part.stop)] == sorted(
        c for part in parts for c in (part.start, part.stop)
    )
    assert sum(part.stop - part.start for part in parts) == num_columns
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    widest = max((part.stop - part.start for part in parts), default=0)
    assert widest <= 1 or num_rows * widest <= elements
    if len(parts) > 1 and widest >= ALIGN:
        assert all(part.start % ALIGN == 0 for part in parts)


def test_padded_rows_stay_in_the_buffer(monkeypatch):
    """Rows of V = 777 are padded to 832 elements, as on a GPU: 65 rows fit a buffer of 64 without their padding."""
    monkeypatch.setattr(inputs, "row_stride", lambda width, dtype, device: -(-width // ALIGN) * ALIGN)
    options, none = HeadOptions(-100, 1.0, 0.0, 777), torch.empty(0)
    made = inputs.Head(torch.randn(777, 12), none, none.long(), options, 64, dispatch.kernels("cpu", none))
    starts = []
    columns = made.columns
    made.columns = lambda *args: starts.append((g := columns(*args)).data_ptr()) or g
    x, labels = torch.randn(65, 12), torch.arange(65)
    lse = (x @ made.weight.t()).logsumexp(1)
    second_pass(made, x, labels, lse, torch.empty(0), torch.ones(65), inputs.Needs(True, True, False))
    assert {*starts} == {made.buffer.data_ptr()}


def gradients(hidden, weight, labels, bias, upstream, **options):
    logp = cpo.linear_token_logps(hidden, weight, labels, bias, **options)
    return torch.autograd.grad(logp, [t for t in (hidden, weight, bias) if t is not None and t.requires_grad], upstream)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 2.0, "scale": 0.5}, {"vocab_size": 700}, {"vocab_size": 130}], ids=str
)
@pytest.mark.parametrize("rows", [37, 300])
def test_labels_on_the_borders_of_tiles(impl, head, rows):
    """V = 777 in tiles of 192 (300 rows) and of 777 (37 rows); of vocab_size 130 whole tiles are padding."""
    g = torch.Generator().manual_seed(rows)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((rows, 12), (777, 12), (777,)))
    bias[::5] = -torch.inf  # masked words, among them stand-ins of labels elsewhere
    last = head.get("vocab_size", 777) - 1
    labels = torch.tensor([1, 63, 64, 191, 192, 193, 383, 384, 576, last]).clamp(max=last).repeat(rows // 10 + 1)[:rows]
    labels[labels % 5 == 0] += 1
    labels[::7] = -100
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    upstream = torch.randn(rows, generator=g, dtype=torch.float64)
    want = torch.autograd.grad(reference.linear_token_logps(hidden, weight, labels, bias, **head), leaves, upstream)
    budget = 8 * 777 * 80  # 80 rows
    got = gradients(hidden, weight, labels, bias, upstream, memory_budget=budget, impl=impl, **head)
    for seen, truth in zip(got, want, strict=True):
        assert relative_error(seen, truth.nan_to_num()) < 1e-11
    for k, name in enumerate(("hidden", "weight", "bias")):
        alone = [t if n == name else t.detach() for t, n in zip(leaves, ("hidden", "weight", "bias"), strict=True)]
        if name == "hidden":  # frozen head: another strategy
            continue
        (seen,) = gradients(alone[0], alone[1], labels, alone[2], upstream, memory_budget=budget, impl=impl, **head)
        assert torch.equal(seen, got[k])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_sixteen_bit_is_no_worse_than_naive(dtype):
    """12 tiles: partial dX are rounded to 16 bit before they are added. Root mean square over 4 batches."""
    errors = {"dx": [0.0, 0.0], "dw": [0.0, 0.0]}
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(96, 64, generator=g).to(dtype).requires_grad_()
        weight = (torch.randn(3001, 64, generator=g) * 0.3).to(dtype).requires_grad_()
        labels = torch.randint(3001, (96,), generator=g)
        upstream = torch.randn(96, generator=g)
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        truth = torch.autograd.grad(reference.linear_token_logps(*exact, labels), exact, upstream.double())
        ours = gradients(hidden, weight, labels, None, upstream, memory_budget=8 * 3001 * 2)
        logps = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, labels[:, None]).squeeze(1)
        naive = torch.autograd.grad(logps, (hidden, weight), upstream)
        for name, t, a, b in zip(errors, truth, ours, naive, strict=True):
            for k, seen in enumerate((a, b)):
                errors[name][k] += float((seen.double() - t).norm() / t.norm()) ** 2 / 4
    for name, (ours, naive) in errors.items():
        assert ours**0.5 <= naive**0.5 + 1e-3, (name, ours**0.5, naive**0.5)


class Largest(TorchDispatchMode):
    """The bytes of the largest float32 tensor that an operator makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


def test_dw_has_no_float32_copy():
    hidden = torch.randn(64, 16).bfloat16().requires_grad_()
    weight = torch.randn(4001, 16).bfloat16().requires_grad_()
    labels = torch.randint(4001, (64,))
    loss_fn = cpo.FusedLinearCPOLoss(loss_type="ipo", memory_budget=10 * 4001 * 2, impl="cpu")
    with Largest() as seen:
        loss_fn(hidden.view(2, 32, 16), weight, labels.view(2, 32), ref_logps=torch.zeros(2)).loss.backward()
    assert 0 < seen.bytes < 4001 * 16 * 4


@pytest.mark.parametrize("factor_of", ["all", "row"])
@pytest.mark.parametrize("shape", [(0, 7), (1700, 0), (1700, 7), (700, 3001), (2, 2**20 + 3)])
def test_a_cpu_multiplies_in_blocks_of_rows(shape, factor_of, monkeypatch):
    """To the same numbers. torch holds the products of a block in float32. A row may be longer than a block."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).bfloat16()
    factor = torch.rand(shape[0], 1, generator=generator) if factor_of == "row" else torch.tensor(0.3)
    multiply, blocks = torch.mul, [0]

    def watched(block, *rest, out):
        blocks.append(block.numel())
        return multiply(block, *rest, out=out)

    monkeypatch.setattr(torch, "mul", watched)
    made = grads.multiply(values, factor)
    assert torch.equal(made, (values * factor.view(-1, 1)).to(values.dtype))
    assert sum(blocks) == values.numel() and max(blocks) <= max(grads.BLOCK, shape[1])


def test_only_a_row_without_log_sum_exp_is_nan():
    """On a GPU a label out of range leaves its row's log-sum-exp NaN: so is its dX, and no other row's."""
    from cpo_kernels.backends.vocab_parallel import columns_bwd_

    logits = torch.randn(3, 40)
    lse = torch.logsumexp(logits, 1)
    lse[1] = torch.nan
    for first in (0, 40):
        z = logits.clone()
        columns_bwd_(reference, z, torch.tensor([5, 99, -100]), lse, torch.ones(3), -100, 1.0, 0.0, first, 40)
        assert z[1].isnan().all() and z[0].isfinite().all() and not z[2].any()
        assert z[0].sum().isclose(torch.tensor(-1.0 if first else 0.0), atol=1e-5)  # only softmax, or 1 - softmax


@pytest.mark.parametrize("options", [{"memory_budget": 40 * 5000 * 2}, {"filter_eps": 1e-3, "filter_head_grad": True}])
def test_a_direction_that_all_rows_of_the_weight_share(monkeypatch, options):
    """It cancels over the whole vocabulary, but not within a tile: sums of tiles must not be rounded one by one."""
    monkeypatch.setattr(live_backward, "TILE_ELEMENTS", 2**16)
    if not dispatch.cpu_multiplies_bf16() and cpu_multiplies(torch.bfloat16):
        pytest.skip("this processor's bfloat16 matmuls cannot add to float32")
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=g)
    labels = torch.randint(5000, (256,), generator=g)
    near = torch.nn.functional.normalize(weight[labels], dim=1)
    hidden = (0.3 * near + 0.1 * torch.randn(256, 64, generator=g)).bfloat16().requires_grad_()
    weight = (weight + 8 * torch.randn(64, generator=g)).bfloat16().requires_grad_()
    upstream = torch.rand(256, generator=g) + 0.5
    truth = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = torch.autograd.grad(reference.linear_token_logps(*truth, labels), truth, upstream.double())
    kept, tiles = (gradients(hidden, weight, labels, None, upstream, **o) for o in ({}, options))
    for exact, ours, by_tiles in zip(want, kept, tiles, strict=True):
        assert relative_error(by_tiles, exact) < 1.1 * relative_error(ours, exact) < 5e-3


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"memory_budget": 10 * 77 * 4}, {"filter_eps": 0.1}, {"filter_eps": 0.1, "filter_head_grad": True}]
)
def test_padded_rows_of_the_weight_may_hold_anything(impl, dtype, options):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 12, generator=g).to(dtype), torch.randn(77, 12, generator=g).to(dtype)
    labels, upstream = torch.randint(70, (40,), generator=g), torch.randn(40, generator=g)
    results = []
    for padding in (0.0, torch.nan):
        weight[70:] = padding
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        results.append(gradients(*leaves, labels, None, upstream, vocab_size=70, impl=impl, **options))
        leaves[1].requires_grad_(False)
        results[-1] += gradients(*leaves, labels, None, upstream, vocab_size=70, impl=impl)
    for finite, nan in zip(*results, strict=True):
        torch.testing.assert_close(nan, finite, rtol=0, atol=0)
