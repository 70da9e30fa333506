"""The head: every strategy against the float64 oracle, its memory, its products and its misuse."""

import gc
import sys
import threading

import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cpo_kernels as cpo
from cpo_kernels import library, reference
from cpo_kernels.backends.vocab_parallel import Backend
from cpo_kernels.batch_plan import Layout
from cpo_kernels.check.run import poisoned
from cpo_kernels.head import grads, inputs, nll, strategy
from cpo_kernels.head import token_logps as head_token_logps
from cpo_kernels.head.matmul import own_sums, tile_bytes
from cpo_kernels.ops.token_logps import HeadOptions
from tests.support.heads import (
    BACKENDS,
    EVERY_BACKEND,
    LOW_PRECISION,
    count_products,
    limits_of,
    make_batch,
    relative_error,
    true_seq_logps,
)

FLOAT32 = 1e-5  # relative, the project's bound for float32
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)  # of chosen and rejected
ROW = 101 * 8  # bytes of one row of float64 logits of the default batch


def naive_token_logps(hidden, weight, labels, bias=None):
    """What a user writes: logits of every position, log_softmax, gather."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logps = torch.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
    picked = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return picked * (labels != -100)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("budget", [None, 5 * ROW, 1])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"scale": 0.25, "softcap": 5.0}, {"vocab_size": 97}])
def test_token_logps_give_the_true_vjp(impl, budget, head):
    batch = make_batch()
    batch.labels[batch.labels >= 97] = 5  # inside the padded vocabulary
    upstream = torch.randn_like(batch.hidden[..., 0])
    truth = reference.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias, **head)
    want = torch.autograd.grad(truth, batch.leaves, upstream)
    seen = cpo.linear_token_logps(
        batch.hidden, batch.weight, batch.labels, batch.bias, memory_budget=budget, impl=impl, **head
    )
    got = torch.autograd.grad(seen, batch.leaves, upstream)
    assert relative_error(seen, truth) < 1e-12
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-12
    frozen = cpo.linear_token_logps(
        batch.hidden,
        batch.weight.detach(),
        batch.labels,
        batch.bias.detach(),
        memory_budget=budget,
        impl=impl,
        **head,
    )
    assert relative_error(torch.autograd.grad(frozen, batch.hidden, upstream)[0], want[0]) < 1e-12


@pytest.mark.parametrize("impl", EVERY_BACKEND)
def test_gradcheck(impl):
    """In Triton's interpreter along random directions, not for each element."""
    batch, fast = make_batch(2, 4, 5, 11), impl == "triton"

    def run(*leaves):
        return cpo.linear_token_logps(leaves[0], leaves[1], batch.labels, leaves[2], softcap=4.0, impl=impl)

    torch.autograd.gradcheck(run, batch.leaves, fast_mode=fast)

    def nll(hidden, weight, bias):
        return cpo.linear_nll(hidden, weight, batch.labels, bias, impl=impl)

    torch.autograd.gradcheck(nll, batch.leaves, fast_mode=fast)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("budget", [None, 7 * ROW])
@pytest.mark.parametrize("train_head", [True, False])
def test_nll_is_the_mean_over_labels(impl, budget, train_head):
    batch = make_batch()
    weights = torch.rand(batch.labels.shape, dtype=torch.float64)
    logps = reference.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias)
    leaves = batch.leaves if train_head else batch.leaves[:1]
    weight, bias = (t if train_head else t.detach() for t in (batch.weight, batch.bias))
    for kwargs, truth in (
        ({}, -logps.sum() / batch.lengths().sum()),
        ({"token_weights": weights, "num_tokens": 7.0}, -(logps * weights).sum() / 7.0),
    ):
        seen = cpo.linear_nll(batch.hidden, weight, batch.labels, bias, memory_budget=budget, impl=impl, **kwargs)
        assert relative_error(seen, truth) < 1e-12
        want = torch.autograd.grad(truth * -1.7, leaves, retain_graph=True)
        for g, w in zip(torch.autograd.grad(seen * -1.7, leaves), want, strict=True):
            assert relative_error(g, w) < 1e-12


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("budget", [None, 40_000])
@pytest.mark.parametrize("train_head", [True, False])
def test_16_bit_error_is_no_larger_than_naive(dtype, budget, train_head):
    """float64 truth on the same 16-bit values; 501 columns and 40 kB give 3 chunks."""
    truth = make_batch(4, 33, 48, 501, bias=train_head, seed=3)
    upstream = torch.randn(4, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want_logps = reference.linear_token_logps(truth.hidden, truth.weight, truth.labels, truth.bias)
    leaves = 3 if train_head else 1
    want = torch.autograd.grad(want_logps, truth.leaves[:leaves], upstream)

    def errors(function, **kwargs):
        low = truth.to(dtype)
        weight = low.weight if train_head else low.weight.detach()
        logps = function(low.hidden, weight, low.labels, low.bias, **kwargs)
        grads = torch.autograd.grad(logps, low.leaves[:leaves], upstream.float())
        return [relative_error(logps, want_logps), *map(relative_error, grads, want)]

    ours, naive = errors(cpo.linear_token_logps, memory_budget=budget, impl="cpu"), errors(naive_token_logps)
    for mine, theirs in zip(ours, naive, strict=True):
        assert mine <= theirs + 1e-3


@pytest.mark.parametrize("budget", [None, 13 * 501 * 4])
def test_float32_against_float64(budget):
    truth = make_batch(4, 33, 48, 501, seed=5)
    upstream = torch.randn(4, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want_logps = reference.linear_token_logps(truth.hidden, truth.weight, truth.labels, truth.bias)
    want = torch.autograd.grad(want_logps, truth.leaves, upstream)
    low = truth.to(torch.float32)
    logps = cpo.linear_token_logps(low.hidden, low.weight, low.labels, low.bias, memory_budget=budget)
    assert relative_error(logps, want_logps) < FLOAT32
    for g, w in zip(torch.autograd.grad(logps, low.leaves, upstream.float()), want, strict=True):
        assert relative_error(g, w) < FLOAT32


@pytest.mark.parametrize("budget", [None, 40 * 101 * 2], ids=["one_chunk", "chunks"])
def test_float16_coefficients_survive_without_loss_scaling(budget):
    """A mean over 20 million tokens: coefficients of 5e-8 vanish in float16; dW and db must not flush."""
    truth = make_batch(4, 33, 48, 101)
    num_tokens = 2e7

    def grads(batch):
        loss = cpo.linear_nll(
            batch.hidden, batch.weight, batch.labels, batch.bias, num_tokens=num_tokens, memory_budget=budget
        )
        return torch.autograd.grad(loss * num_tokens, batch.leaves)  # what a GradScaler does

    for seen, want in zip(grads(truth.to(torch.float16)), grads(truth), strict=True):
        assert relative_error(seen, want) < 3e-3


@pytest.mark.parametrize("upstream", [1e-45, 1e-42, 1e-30, 0.0])
def test_float16_gradients_of_next_to_nothing_are_zero(upstream):
    """Saturated pairs: coefficients that float32 holds only as subnormals."""
    batch = make_batch().to(torch.float16)
    logps = cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias)
    for grad in torch.autograd.grad(logps, batch.leaves, torch.full_like(logps, upstream)):
        assert not grad.any()


@pytest.mark.parametrize("budget", [None, 5 * ROW])
@pytest.mark.parametrize("train_head", [True, False])
def test_a_label_out_of_range_is_named_by_its_position(train_head, budget):
    """A ValueError before any product, whatever rows are dropped and chunks are made."""
    batch = make_batch()
    weight = batch.weight if train_head else batch.weight.detach()
    batch.labels[2, 7] = 101
    message = r"label 101 is out of range at \[2, 7\]: it must be in \[0, 101\) or equal ignore_index = -100"
    for call in (cpo.linear_token_logps, cpo.linear_nll):
        with pytest.raises(ValueError, match=message):
            call(batch.hidden, weight, batch.labels, memory_budget=budget)
    with pytest.raises(ValueError, match=message):
        cpo.token_logps(torch.zeros(4, 9, 101), batch.labels)


@pytest.mark.parametrize("train_head", [True, False])
def test_weights_of_ignored_tokens_may_be_anything(train_head):
    batch = make_batch()
    weight = batch.weight if train_head else batch.weight.detach()
    weights = torch.rand(4, 9, dtype=torch.float64)
    batch.labels[0, 0] = -100
    want = cpo.linear_nll(batch.hidden, weight, batch.labels, token_weights=weights)
    weights[0, 0] = float("nan")
    seen = cpo.linear_nll(batch.hidden, weight, batch.labels, token_weights=weights)
    grads = (torch.autograd.grad(loss, batch.hidden)[0] for loss in (seen, want))
    assert torch.equal(seen, want) and torch.equal(*grads)


@pytest.mark.parametrize("rows", [2048, 16])
@pytest.mark.parametrize("call", ["nll", "token_logps", "preference"])
def test_float16_sums_over_many_rows_stay_in_range(call, rows):
    """2048 rows of 100 and one label: sums of rows pass 65504 where the gradient of the mean does not."""
    budget = None if rows == 2048 else rows * 8 * 2
    leaves = [torch.full((2, 1024, 4), 100.0), torch.zeros(8, 4), torch.zeros(8)]
    labels = torch.zeros(2, 1024, dtype=torch.int64)
    labels[1] = 1

    def grads(dtype):
        hidden, weight, bias = (t.to(dtype).requires_grad_() for t in leaves)
        if call == "nll":
            loss = cpo.linear_nll(hidden, weight, labels, bias, scale=3.0, memory_budget=budget)
        elif call == "token_logps":
            loss = cpo.linear_token_logps(hidden, weight, labels, bias, scale=3.0, memory_budget=budget).mean()
        else:
            loss_fn = cpo.FusedLinearCPOLoss(beta=1e-3, scale=3.0, memory_budget=budget)
            loss = loss_fn(hidden, weight, labels, bias, ref_logps=torch.zeros(2)).loss
        return torch.autograd.grad(loss, (hidden, weight, bias))

    for seen, want in zip(grads(torch.float16), grads(torch.float64), strict=True):
        assert relative_error(seen, want) < 3e-3


@pytest.mark.parametrize("train_head", [True, False])
def test_positions_without_label_are_never_projected(monkeypatch, train_head):
    """Multiply-adds are counted: 4 products (recompute), 3 (kept, nll) or 2 (frozen) on only the labelled rows."""
    batch = make_batch(dtype=torch.float32, bias=False)
    weight = batch.weight if train_head else batch.weight.detach()
    count = count_products(monkeypatch)
    rows = int(batch.lengths().sum())
    one = rows * 24 * 101
    for budget, products in (((rows - 1) * 101 * 4, 4), (None, 3)):
        cpo.linear_token_logps(batch.hidden, weight, batch.labels, memory_budget=budget).sum().backward()
        assert count[0] == (products if train_head else 2) * one
        count[0] = 0
    cpo.linear_nll(batch.hidden, weight, batch.labels).backward()
    assert count[0] == (3 if train_head else 2) * one
    count[0] = 0
    with torch.no_grad():
        cpo.linear_nll(batch.hidden, weight, batch.labels)
    assert count[0] == one


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.numel = max([self.numel, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


def test_no_tensor_grows_with_the_logits():
    """The ops' own bodies are watched: with 8 times the tokens nothing but the [N, H] tensors grows."""

    def largest(length):
        batch = make_batch(2, length, 8, 1001, torch.float32, bias=False)
        empty = batch.weight.new_empty(0)
        tensors = inputs.HeadTensors(batch.hidden.view(-1, 8), batch.weight, empty, batch.labels.view(-1))
        options, needs = HeadOptions(-100, 1.0, 0.0, 1001), inputs.Needs(True, True, False)
        execution = inputs.Execution(limits_of(16), Backend.of("cpu"))
        args = nll.NLLArgs(batch.labels[:0].view(0), empty, options, -1.0, needs, execution)
        watch = Largest()
        with torch.no_grad(), watch:
            library.BODIES[nll.linear_nll_op.overload](*library.flatten((tensors, args)))
        return watch.numel

    assert 8 * 1001 < largest(40) <= 16 * 1001 and largest(320) <= 16 * 1001


@pytest.mark.parametrize("impl", EVERY_BACKEND)
def test_no_labels_and_no_rows(impl):
    batch = make_batch()
    none = torch.full_like(batch.labels, -100)
    for hidden, labels in ((batch.hidden, none), (batch.hidden[:, :0], none[:, :0])):
        logps = cpo.linear_token_logps(hidden, batch.weight, labels, batch.bias, impl=impl)
        grads = torch.autograd.grad(logps.sum(), batch.leaves)
        assert logps.shape == labels.shape and not logps.any()
        assert not any(g.any() for g in grads) and all(g.isfinite().all() for g in grads)
        loss = cpo.linear_nll(hidden, batch.weight, labels, batch.bias, impl=impl)
        assert loss.item() == 0.0
        assert not any(g.any() for g in torch.autograd.grad(loss, batch.leaves))


def test_extras_match_the_oracle():
    batch = make_batch()
    logps, extras = cpo.linear_token_logps(
        batch.hidden, batch.weight, batch.labels, batch.bias, extras=True, memory_budget=5 * ROW
    )
    logits = batch.hidden @ batch.weight.t() + batch.bias
    p, kept = logits.softmax(-1), batch.labels != -100
    assert torch.equal(logps, cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias,
                                                    memory_budget=5 * ROW))  # fmt: skip
    for seen, want in (
        (extras.entropy, -(p * p.log()).sum(-1)),
        (extras.log_sum_sq_probs, p.square().sum(-1).log()),
        (extras.mean_logit, logits.mean(-1)),
    ):
        assert relative_error(seen, want * kept) < 1e-12
        assert seen.requires_grad == (seen is extras.entropy)
    assert torch.equal(extras.is_top1, (logits.argmax(-1) == batch.labels) & kept)


def true_entropies(hidden, weight, bias, labels, scale=1.0, softcap=None, vocab_size=None):
    z = torch.nn.functional.linear(hidden, weight, bias)[..., :vocab_size] * scale
    logp = (softcap * torch.tanh(z / softcap) if softcap else z).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1) * (labels != -100)


ENTROPY_CASES = {
    "one chunk": {},
    "chunks": {"memory_budget": 5 * ROW},
    "softcap": {"memory_budget": 5 * ROW, "softcap": 3.0, "scale": 0.5},
    "padded": {"memory_budget": 5 * ROW, "vocab_size": 97},
    "filtered": {"filter_eps": 0.02},
    "both filtered": {"filter_eps": 0.02, "filter_head_grad": True},
}


@pytest.mark.parametrize("impl", EVERY_BACKEND)
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("case", ENTROPY_CASES)
def test_gradients_of_the_entropy(case, train_head, impl):
    """Together with those of the log-probs, and by themselves; exact where gradients of log-probs are filtered."""
    options = ENTROPY_CASES[case]
    head = {k: v for k, v in options.items() if k in ("softcap", "scale", "vocab_size")}
    batch = make_batch()
    batch.labels[batch.labels >= 97] = 5
    leaves = batch.leaves if train_head else batch.leaves[:1]
    weight, bias = (t if train_head else t.detach() for t in (batch.weight, batch.bias))
    generator = torch.Generator().manual_seed(0)
    upstream, of_entropy = torch.randn(2, *batch.labels.shape, dtype=torch.float64, generator=generator)
    logps, extras = cpo.linear_token_logps(batch.hidden, weight, batch.labels, bias, extras=True, impl=impl, **options)
    true_logps = reference.linear_token_logps(batch.hidden, weight, batch.labels, bias, **head)
    entropies = true_entropies(batch.hidden, weight, bias, batch.labels, **head)
    assert relative_error(extras.entropy, entropies) < 1e-12
    for mine, truth in (
        (
            (logps * upstream + extras.entropy * of_entropy).sum(),
            (true_logps * upstream + entropies * of_entropy).sum(),
        ),
        ((extras.entropy * of_entropy).sum(), (entropies * of_entropy).sum()),
    ):
        got = torch.autograd.grad(mine, leaves, retain_graph=True)
        for g, w in zip(got, torch.autograd.grad(truth, leaves, retain_graph=True), strict=True):
            assert relative_error(g, w) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_gradients_of_the_entropy_in_other_dtypes(dtype):
    """Coefficients of the log-probs down to 1e-6, whose rows would vanish in float16 beside those of the entropy."""
    truth = make_batch(4, 33, 48, 501, seed=3)
    upstream = torch.logspace(-6, 0, 4 * 33, dtype=torch.float64).view(4, 33)
    wanted = reference.linear_token_logps(truth.hidden, truth.weight, truth.labels, truth.bias)
    entropies = true_entropies(truth.hidden, truth.weight, truth.bias, truth.labels)
    want = torch.autograd.grad((wanted * upstream + entropies * 0.01).sum(), truth.leaves)
    low = truth.to(dtype)
    logps, extras = cpo.linear_token_logps(low.hidden, low.weight, low.labels, low.bias, extras=True)
    got = torch.autograd.grad((logps * upstream.float() + extras.entropy * 0.01).sum(), low.leaves)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < {torch.float32: FLOAT32, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("options", [{}, {"filter_eps": 0.02, "filter_head_grad": True}], ids=str)
@pytest.mark.parametrize("index", [False, True])
def test_whatever_ignored_positions_hold_stays_there(index, options, train_head, dtype):
    """NaN hidden states and NaN incoming gradients of ignored positions, those that `index` covers too."""
    batch = make_batch().to(dtype)
    ignored = batch.labels == -100
    assert ignored.any()
    every = torch.arange(batch.labels.numel()) if index else None
    weight, bias = (t if train_head else t.detach() for t in (batch.weight, batch.bias))
    leaves = batch.leaves if train_head else batch.leaves[:1]
    grads = []
    for what in (0.0, torch.nan):
        hidden = torch.where(ignored[..., None], what, batch.hidden)
        logps, extras = cpo.linear_token_logps(hidden, weight, batch.labels, bias, extras=True, index=every, **options)
        upstream = torch.where(ignored, what, 1.5).to(logps.dtype)
        grads += [torch.autograd.grad(logps, leaves, upstream, retain_graph=True)]
        grads += [torch.autograd.grad([logps, extras.entropy], leaves, [upstream, upstream], retain_graph=True)]
        grads += [torch.autograd.grad(cpo.linear_nll(hidden, weight, batch.labels, bias, index=every), leaves)]
    for clean, dirty in zip(grads[:3], grads[3:], strict=True):
        for a, b in zip(clean, dirty, strict=True):
            assert torch.isfinite(a).all() and torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.0625, 0.01])
@pytest.mark.parametrize("coupled", [False, True])
def test_float16_gradients_of_few_rows_under_a_small_scale(scale, coupled):
    """One row has all of the sum: c x / P must fit float16 before `scale` makes it small."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 64, generator=g).half(), (torch.randn(301, 64, generator=g) / 8).half()
    labels, weights = torch.randint(301, (300,), generator=g), torch.zeros(300)
    weights[:4] = 1.0
    leaf = weight.clone().requires_grad_()
    true = weight.double().requires_grad_()
    bias, true_bias = torch.zeros(301).half().requires_grad_(), torch.zeros(301, dtype=torch.float64).requires_grad_()
    truth = reference.linear_token_logps(hidden.double(), true, labels, true_bias, scale=scale)
    want = torch.autograd.grad(-(truth * weights).sum() / 300, (true, true_bias))
    if coupled:
        logps = cpo.linear_token_logps(hidden, leaf, labels, bias, scale=scale)
        loss = -(logps * weights).sum() / 300
    else:
        loss = cpo.linear_nll(hidden, leaf, labels, bias, scale=scale, token_weights=weights)
    for got, w in zip(torch.autograd.grad(loss * 2.0**10, (leaf, bias)), want, strict=True):
        assert relative_error(got.double() / 2**10, w) < 5e-3


@pytest.mark.parametrize("train_head", [True, False])
def test_permuted_and_strided_inputs(train_head):
    batch = make_batch()
    weight = batch.weight if train_head else batch.weight.detach()
    hidden = batch.hidden.detach().permute(1, 0, 2).contiguous().permute(1, 0, 2).requires_grad_()
    wide = torch.randn(101, 48, dtype=torch.float64)
    wide[:, ::2] = weight.detach()
    strided = wide[:, ::2].requires_grad_(train_head)
    for h, w in ((hidden, weight), (batch.hidden, strided)):
        want = torch.autograd.grad(true_seq_logps(batch).square().sum(), batch.leaves[:2])
        got = torch.autograd.grad(
            cpo.linear_token_logps(h, w, batch.labels, batch.bias).sum(1).square().sum(),
            (h, w) if train_head else h,
        )
        for g, x in zip(got, want[: len(got)], strict=True):
            assert relative_error(g, x) < 1e-12


def test_retain_graph_and_second_backward_accumulate():
    """The saved dW is handed out as it is: a kept graph must not see what the optimizer does to the gradient."""
    batch = make_batch()
    loss = cpo.linear_nll(batch.hidden, batch.weight, batch.labels, batch.bias)
    for grad in torch.autograd.grad(loss, batch.leaves, retain_graph=True):
        grad.zero_()  # belongs to whoever asked for it
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in batch.leaves]
    assert all(grad.any() for grad in first)
    for leaf in batch.leaves:
        leaf.grad.mul_(-3)  # clipping, or an optimizer that works in place
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, g in zip(batch.leaves, first, strict=True):
        assert relative_error(leaf.grad, -g) < 1e-12
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_is_refused():
    batch = make_batch()
    for value in (
        cpo.linear_nll(batch.hidden, batch.weight, batch.labels),
        cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels).sum(),
    ):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(value, batch.hidden, create_graph=True)


def test_two_losses_on_the_same_hidden_states():
    batch = make_batch()
    total = cpo.linear_nll(batch.hidden, batch.weight, batch.labels, batch.bias)
    total = total + 0.5 * cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels).square().sum()
    total = total + batch.hidden.sin().sum()
    logps = reference.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias)
    want = -logps.sum() / batch.lengths().sum() + batch.hidden.sin().sum()
    want = want + 0.5 * reference.linear_token_logps(batch.hidden, batch.weight, batch.labels).square().sum()
    for g, w in zip(torch.autograd.grad(total, batch.leaves), torch.autograd.grad(want, batch.leaves), strict=True):
        assert relative_error(g, w) < 1e-12


def test_tied_embedding_gets_both_gradients():
    weight = make_batch(dtype=torch.float32).weight
    tokens = torch.randint(101, (2, 6))
    labels = torch.randint(101, (2, 6))
    hidden = torch.nn.functional.embedding(tokens, weight).tanh()
    got = torch.autograd.grad(cpo.linear_nll(hidden, weight, labels), weight)[0]
    hidden = torch.nn.functional.embedding(tokens, weight).tanh()
    want = torch.autograd.grad(-naive_token_logps(hidden, weight, labels).mean(), weight)[0]
    assert relative_error(got, want) < FLOAT32


def test_autocast_casts_as_a_linear_layer_would():
    batch = make_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cpo.linear_nll(batch.hidden.bfloat16(), batch.weight, batch.labels, batch.bias)
    low = batch.to(torch.bfloat16)
    want = cpo.linear_nll(low.hidden, low.weight, low.labels, low.bias)
    assert torch.equal(loss, want)
    (got,) = torch.autograd.grad(loss, batch.weight)
    assert got.dtype == torch.float32 and torch.equal(got, torch.autograd.grad(want, low.weight)[0].float())


def test_autocast_leaves_float32_arithmetic_inside_alone():
    """float64 is not cast by autocast, and the ops' own float32 products must not be either."""
    batch = make_batch()
    want = cpo.linear_nll(batch.hidden, batch.weight, batch.labels, batch.bias)
    with torch.autocast("cpu", torch.bfloat16):
        seen = cpo.linear_nll(batch.hidden, batch.weight, batch.labels, batch.bias)
    assert torch.equal(seen, want)
    for g, w in zip(torch.autograd.grad(seen, batch.leaves), torch.autograd.grad(want, batch.leaves), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype):
    batch = make_batch(4, 33, 48, 501).to(dtype)
    runs = []
    for _ in range(2):
        loss = cpo.linear_nll(batch.hidden, batch.weight, batch.labels, batch.bias, memory_budget=20_000)
        runs.append((loss, *torch.autograd.grad(loss, batch.leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 9, 7)}, r"H = 24.*got \(4, 9, 7\)"),
        ({"weight": torch.zeros(24)}, r"weight must have shape \[V, H\]"),
        ({"hidden": torch.zeros(4, 9, 0), "weight": torch.zeros(101, 0)}, r"V and H >= 1, got \(101, 0\)"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[101\], got \(3,\)"),
        ({"labels": torch.zeros(4, 8, dtype=torch.int64)}, r"\(4, 9\).*got \(4, 8\)"),
        ({"labels": torch.zeros(4, 9)}, "labels must be int64, got torch.float32"),
        ({"labels": torch.full((4, 9), 101)}, "101"),
        ({"weight": torch.zeros(101, 24, dtype=torch.bfloat16)}, "share one dtype.*bfloat16"),
        ({"hidden": torch.zeros(4, 9, 24).int()}, "float16 or float64, got torch.int32"),
        ({"softcap": -1.0}, "softcap must be a positive number.*got -1.0"),
        ({"scale": float("nan")}, "scale must be positive and finite, got nan"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"vocab_size": 102}, r"vocab_size must lie in \[1, 101\].*got 102"),
        ({"memory_budget": 0}, "memory_budget must be a positive number of bytes, got 0"),
        ({"index": torch.arange(37)}, r"index must lie in \[0, 36\), got 0 to 36"),
        ({"index": torch.tensor([*range(36), 7, 7])}, "index holds position 7 3 times: give each position once"),
        ({"index": torch.arange(35)}, "index lacks position 35, whose label is [0-9]+: give all positions"),
        ({"impl": "fast"}, "impl must be one of.*got 'fast'"),
        ({"impl": "cuda"}, "impl='cuda' (is not available|takes GPU tensors)"),
    ],
)
def test_misuse_names_the_value(change, message):
    batch = make_batch(dtype=torch.float32)
    kwargs = {"hidden": batch.hidden, "weight": batch.weight, "labels": batch.labels, **change}
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
        cpo.linear_token_logps(**kwargs)
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
        cpo.linear_nll(**kwargs)


@pytest.mark.parametrize("impl", EVERY_BACKEND)
@pytest.mark.parametrize("budget", [None, 5 * ROW, 3 * ROW, 1], ids=["one chunk", "chunks", "columns", "one row"])
def test_padded_rows_change_nothing(monkeypatch, impl, budget):
    """Rows of an odd vocabulary are padded on a GPU; here on a CPU, with padding that shows where it is read."""
    monkeypatch.setattr(inputs, "row_stride", lambda width, dtype, device: width + 27)
    batch, given = make_batch(4, 5), {"memory_budget": budget, "impl": impl}
    truth = reference.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias, softcap=3.0)
    upstream = torch.linspace(-1, 2, truth.numel(), dtype=torch.float64).view(truth.shape)
    want = torch.autograd.grad(truth, batch.leaves, upstream, retain_graph=True)
    nll = -truth.sum() / (batch.labels != -100).sum()
    want_nll = torch.autograd.grad(nll, batch.leaves, retain_graph=True)
    loss = torch.nn.functional.softplus(-0.1 * (truth.sum(1) - batch.ref_logps).view(2, 2).T.mv(SIGNS)).mean()
    want_loss = torch.autograd.grad(loss, batch.leaves)
    with poisoned():
        logps = cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias, softcap=3.0, **given)
        got = torch.autograd.grad(logps, batch.leaves, upstream)
        ours = cpo.linear_nll(batch.hidden, batch.weight, batch.labels, batch.bias, softcap=3.0, **given)
        got_nll = torch.autograd.grad(ours, batch.leaves)
        out = cpo.FusedLinearCPOLoss(softcap=3.0, **given)(
            batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=batch.ref_logps
        )
        got_loss = torch.autograd.grad(out.loss, batch.leaves)
    assert relative_error(logps, truth) < 1e-12 and relative_error(ours, nll) < 1e-12
    assert relative_error(out.loss, loss) < 1e-12
    for seen, right in ((got, want), (got_nll, want_nll), (got_loss, want_loss)):
        assert all(relative_error(a, b) < 1e-11 for a, b in zip(seen, right, strict=True))


def test_rows_of_logits_begin_on_16_bytes_on_a_gpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert strategy.row_stride(50_257, torch.bfloat16, gpu) == 50_304  # GPT-2
    assert strategy.row_stride(32_001, torch.float32, gpu) == 32_064
    assert strategy.row_stride(128_256, torch.bfloat16, gpu) == 128_256
    assert strategy.row_stride(50_257, torch.bfloat16, cpu) == 50_257
    assert strategy.row_stride(7, torch.bfloat16, gpu) == 7  # a few columns of very many rows
    plan = cpo.explain(1000, 768, 50_257, device="cuda", train_head=False)
    assert plan.logits_bytes == 1000 * 50_304 * 2
    budget = 100 * 50_257 * 2
    assert cpo.explain(1000, 768, 50_257, device="cuda", memory_budget=budget).logits_bytes <= budget


def own_limits(vocab, hidden, dtype):
    """Of this CPU: fewer rows in a chunk where its own matmul sums dW."""
    cpu = torch.device("cpu")
    return strategy.limits(vocab, hidden, dtype, cpu, None, own_sums(cpu, dtype), False)


def test_explain_follows_the_budget():
    plan = cpo.explain(512, 896, 151936)
    assert (plan.strategy, plan.products, plan.num_chunks) == ("pairs", 3, 1)
    assert plan.logits_bytes == 512 * 151936 * 2
    assert cpo.explain(512, 896, 151936, train_head=False).strategy == "frozen"
    assert cpo.explain(512, 896, 151936, train_head=False, train_hidden=False).products == 1
    assert cpo.explain(5000, 896, 151936, group_tokens=500).num_chunks > 1
    assert cpo.explain(5000, 896, 151936, group_tokens=5000).strategy == "two_pass"
    assert cpo.explain(5000, 896, 151936, group_tokens=500, couples_pairs=True).strategy == "two_pass"
    kept, again = (cpo.explain(rows, 896, 151936, loss="unknown") for rows in (1104, 1105))
    assert (kept.strategy, kept.products, again.strategy, again.products) == ("kept", 3, "recompute", 4)
    assert kept.extra_bytes >= 1104 * 151936 * 2
    frozen = cpo.explain(5000, 896, 151936, train_head=False)
    assert frozen.chunk_rows <= 256 and frozen.logits_bytes < 75 << 20  # nothing adds up over chunks
    assert cpo.explain(5000, 896, 151936, train_head=False, memory_budget=320 << 20).chunk_rows == 1000
    assert cpo.explain(5000, 64, 2000, train_head=False).num_chunks == 1
    assert cpo.explain(10**6, 896, 151936, loss="nll").logits_bytes <= 320 << 20
    rows = {v: cpo.explain(10**7, 4096, v, device="cuda", loss="nll") for v in (49_152, 128_256, 256_000)}
    assert [p.chunk_rows for p in rows.values()] == [8191, 4176, 2096]  # even shares of 8192, 4176 and 2096
    llama = {"hidden_size": 4096, "vocab_size": 128_256, "device": "cuda", "group_tokens": 1024}
    one, two = (cpo.explain(8192, **llama, memory_budget=budget) for budget in (None, 1 << 30))
    assert two.logits_bytes <= 1 << 30 and (one.num_chunks, two.num_chunks) == (1, 2)
    assert one.extra_bytes < 0.75 * two.extra_bytes  # two hold a float32 sum of dW
    plan = cpo.explain(5000, 896, 151936, loss="kto", group_tokens=500)
    assert (plan.strategy, plan.products, plan.chunk_rows) == ("kto", 3, 1000) and plan.num_chunks == 5
    long, longer = (cpo.explain(5000, 896, 151936, loss="kto", group_tokens=rows) for rows in (1104, 1105))
    assert (long.products, long.chunk_rows, longer.products) == (3, 1104, 4)
    pairs = cpo.explain(5000, 896, 151936, group_tokens=1100)
    assert (pairs.products, pairs.chunk_rows, pairs.num_chunks) == (3, 1100, 5)
    assert cpo.explain(5000, 896, 151936, loss="kto", train_head=False).products == 2
    with pytest.raises(ValueError, match="one of preference, kto, nll, unknown, got 'mse'"):
        cpo.explain(1, 1, 1, loss="mse")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("filter_eps", [None, 0.01])
def test_kept_logits_serve_every_backward(dtype, filter_eps):
    """A graph that is retained serves several backwards, the first from kept logits; float16 stays in range."""
    truth = make_batch(4, 9, seed=2)
    batch = truth.to(dtype)
    logps = cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias, filter_eps=filter_eps)
    want = reference.linear_token_logps(truth.hidden, truth.weight, truth.labels, truth.bias)
    bound = {torch.float64: 1e-12, torch.float32: FLOAT32}.get(dtype, 2e-2)
    for size in (1.0, 300.0, 1e-3):
        upstream = torch.randn(want.shape, dtype=torch.float64) * size
        upstream[truth.labels == -100] = float("nan")
        got = torch.autograd.grad(logps, batch.leaves, upstream.to(logps.dtype), retain_graph=True)
        true = torch.autograd.grad(want, truth.leaves, upstream.nan_to_num(), retain_graph=True)
        for g, w in list(zip(got, true, strict=True))[filter_eps is not None :]:  # dX is filtered
            assert relative_error(g, w) < bound


def kept_bytes():
    return head_token_logps._Kept.bytes(torch.device("cpu"))


def test_logits_are_kept_where_they_fit_and_freed_by_the_first_backward():
    batch, before = make_batch(4, 9), kept_bytes()
    rows = int(batch.lengths().sum())
    for budget, size in ((None, rows * ROW), (rows // 16 * 16 * ROW, 0)):
        logps = cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels, memory_budget=budget)
        assert kept_bytes() - before == size
        torch.autograd.grad(logps.sum(), batch.leaves[:2], retain_graph=True)
        assert kept_bytes() == before
    logps = cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels)
    del logps  # without a backward pass
    assert kept_bytes() == before


def test_a_graph_is_freed_while_logits_are_counted():
    """The garbage collector frees a graph in a cycle between any two instructions, here all of those that count."""
    before, ran = kept_bytes(), []

    def collect(frame, event, arg):
        if frame.f_code.co_filename == head_token_logps.__file__:
            frame.f_trace_opcodes = True
            if event == "opcode":
                sys.settrace(None)
                cycle = [head_token_logps._Kept(torch.zeros(2, 3))]
                cycle.append(cycle)
                del cycle
                gc.collect()
                ran.append(event)
                sys.settrace(collect)
        return collect

    def run():
        sys.settrace(collect)
        kept = head_token_logps._Kept(torch.zeros(4, 5))
        kept.take()
        sys.settrace(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and ran
    assert kept_bytes() == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_kept_logits_under_checkpoint(reentrant):
    """What was counted when forward ran does not change what is saved when it runs again."""
    batch = make_batch(4, 9)
    rows = int(batch.lengths().sum())

    def run(hidden, weight):
        return cpo.linear_token_logps(hidden, weight, batch.labels, memory_budget=(rows + 15) * ROW)

    want = torch.autograd.grad(run(*batch.leaves[:2]).square().sum(), batch.leaves[:2])
    out = torch.utils.checkpoint.checkpoint(run, *batch.leaves[:2], use_reentrant=reentrant)
    out.square().sum().backward()
    assert all(relative_error(t.grad, w) < 1e-12 for t, w in zip(batch.leaves[:2], want, strict=True))


def test_a_trained_head_under_fake_tensors_and_batched_gradients():
    batch = make_batch(4, 9, bias=False)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t.detach()).requires_grad_() for t in batch.leaves]
    labels = mode.from_tensor(batch.labels)
    with mode:
        cpo.linear_token_logps(*fakes, labels).sum().backward()
        assert all(t.grad.shape == t.shape for t in fakes)
    logps = cpo.linear_token_logps(*batch.leaves, batch.labels)
    upstream = torch.randn(3, *logps.shape, dtype=torch.float64)
    batched = torch.autograd.grad(logps, batch.leaves, upstream, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        want = torch.autograd.grad(logps, batch.leaves, upstream[k], retain_graph=True)
        assert all(relative_error(b[k], w) < 1e-12 for b, w in zip(batched, want, strict=True))


def test_meta_tensors_give_shapes():
    """There is no autocast for them to ask about."""
    hidden, weight = (torch.zeros(*shape, device="meta", requires_grad=True) for shape in ((2, 3, 8), (16, 8)))
    labels, ref_logps = torch.zeros(2, 3, dtype=torch.int64, device="meta"), torch.zeros(2, device="meta")
    loss = cpo.FusedLinearCPOLoss()(hidden, weight, labels, ref_logps=ref_logps).loss + cpo.linear_nll(
        hidden, weight, labels
    )
    loss.backward()
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("loss_of", ["nll", "preference", "kto"])
def test_batched_gradients_of_a_loss(loss_of, train_head):
    """is_grads_batched=True, as in torch.autograd.functional.jacobian(vectorize=True): nothing may be read there."""
    batch = make_batch(4, 9)
    weight = batch.weight if train_head else batch.weight.detach()
    leaves = batch.leaves[: 1 + train_head]
    head, ref = (batch.hidden, weight, batch.labels), {"ref_logps": batch.ref_logps}
    if loss_of == "nll":
        loss = cpo.linear_nll(*head)
    elif loss_of == "preference":
        loss = cpo.FusedLinearCPOLoss()(*head, **ref).loss
    else:
        desirable = torch.tensor([True, False, True, False])
        loss = cpo.FusedLinearKTOLoss()(*head, desirable=desirable, kl=0.0, **ref).loss
    upstream = torch.tensor([1.0, -2.5, 0.0], dtype=torch.float64)
    batched = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        want = torch.autograd.grad(loss, leaves, upstream[k], retain_graph=True)
        assert all(relative_error(b[k], w) < 1e-12 for b, w in zip(batched, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_chunk_where_several_need_no_less_memory(dtype):
    """2 H rows more than one of several chunks in 16 bit, H where own matmuls add to halves; in float32 dW is its own
    sum. Besides the float32 tiles of a CPU without 16-bit matmuls, which grow with the rows."""
    given = {"hidden_size": 896, "vocab_size": 151936, "dtype": dtype, "group_tokens": 128}
    limit = 1104 if dtype == torch.bfloat16 else 544  # 320 MiB of logits
    rows, more = own_limits(151936, 896, dtype).sum
    assert (rows, more) in (((1104, 1792), (1024, 896)) if dtype == torch.bfloat16 else ((544, 0),))

    def most_rows(limit):
        return max(n for n in range(1, 4000) if n <= strategy.even_rows(n, limit) + more)

    most = most_rows(rows) if more else rows
    for loss in ("preference", "nll"):
        one, several = (cpo.explain(most + extra, loss=loss, **given) for extra in (0, 1))
        assert one.num_chunks == 1 and several.num_chunks > 1
        held = [p.extra_bytes - tile_bytes(p.chunk_rows, 896, dtype, torch.device("cpu")) for p in (one, several)]
        assert held[0] <= 1.02 * held[1] or dtype == torch.float32  # it looks at more labels
        assert cpo.explain(limit + 1, loss=loss, memory_budget=320 << 20, **given).num_chunks == 2
    given["group_tokens"] = None
    most = most_rows(limit) if more else limit
    assert [cpo.explain(most + extra, one_pair=True, **given).strategy for extra in (0, 1)] == ["pairs", "deferred"]


def test_one_chunk_by_the_ops(monkeypatch):
    """A budget of 32 rows and 24 features: up to 24 + 24 rows at once in bfloat16, without own matmuls 24 more."""
    monkeypatch.setitem(strategy.DEFAULT_BUDGET, "cpu", 32 * 101 * 2)
    batch = make_batch(6, 9).to(torch.bfloat16)
    rows = int(batch.lengths().sum())
    assert 32 < rows <= 48
    want = cpo.FusedLinearCPOLoss(memory_budget=1 << 30)(
        batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=batch.ref_logps
    )
    sizes, original = [], grads.WeightGrad.add

    def watched(self, g, *rest):
        sizes.append(g.shape[0])
        return original(self, g, *rest)

    monkeypatch.setattr(grads.WeightGrad, "add", watched)
    loss_fn = cpo.FusedLinearCPOLoss()
    given = {"ref_logps": batch.ref_logps}
    out = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, **given)
    assert sizes == [rows] and relative_error(out.loss, want.loss) < 1e-3
    plan = loss_fn.plan(batch.labels, 101, torch.bfloat16, device="cpu", hidden_size=24)
    sizes.clear()
    loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, plan=plan, **given)
    cpo.linear_nll(batch.hidden, batch.weight, batch.labels, batch.bias)
    assert sizes == [rows, rows]
    plan = loss_fn.plan(batch.labels, 101, torch.bfloat16, device="cpu", hidden_size=23)
    with pytest.raises(ValueError, match="another hidden_size: give plan.. this head's, 24"):
        loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, plan=plan, **given)
    plan = loss_fn.plan(batch.labels, 101, torch.bfloat16, device="cpu")
    sizes.clear()
    loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, plan=plan, **given)
    assert len(sizes) > 1
    elsewhere = loss_fn.plan(batch.labels, 101, torch.bfloat16, hidden_size=24)  # on a GPU
    with pytest.raises(ValueError, match="made for chunks of 8192 rows, this head takes 32: .* device 'cpu'"):
        loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, plan=elsewhere, **given)


@pytest.mark.parametrize("loss", ["nll", "kto", "preference"])
def test_explain_has_the_chunks_of_the_ops(loss, monkeypatch):
    """In bfloat16, where dW is summed over chunks: of 32 rows with own matmuls; whole sequences, whole pairs."""
    monkeypatch.setattr(strategy, "OWN_ROWS", 32)
    monkeypatch.setitem(strategy.DEFAULT_BUDGET, "cpu", 64 * 101 * 2)
    batch, sizes, original = make_batch(20, 9).to(torch.bfloat16), [], grads.WeightGrad.add
    batch.labels[:] = 3

    def watched(self, g, *rest):
        sizes.append(g.shape[0])
        return original(self, g, *rest)

    monkeypatch.setattr(grads.WeightGrad, "add", watched)
    given, rest = (batch.hidden, batch.weight, batch.labels, batch.bias), {"ref_logps": batch.ref_logps}
    if loss == "nll":
        cpo.linear_nll(*given)
    elif loss == "kto":
        cpo.FusedLinearKTOLoss()(*given, desirable=batch.ref_logps < -9, kl=0.0, **rest)
    else:
        cpo.FusedLinearCPOLoss()(*given, **rest)
    group = {"nll": None, "kto": 9, "preference": 18}[loss]
    plan = cpo.explain(180, 24, 101, loss=loss, group_tokens=group)
    assert (plan.num_chunks, plan.chunk_rows) == (len(sizes), max(sizes))
    assert plan.chunk_rows <= own_limits(101, 24, torch.bfloat16).sum.rows


def test_one_pair_beyond_the_budget_in_one_chunk():
    """Where that needs no more memory than several, and a short sequence without a pair stays with it."""
    plan = cpo.explain(8000, 4096, 32000, one_pair=True)
    assert (plan.strategy, plan.num_chunks, plan.chunk_rows) == ("pairs", 1, 8000)
    rows = own_limits(32000, 4096, torch.bfloat16)
    layout = Layout([4000, 4000, 10], [(0, 1)], rows.budget, False, True, rows.sum)
    assert layout.strategy == "pairs" and [chunk.num_rows for chunk in layout.chunks] == [8010]


def test_a_plan_without_a_hidden_size_has_the_same_chunks():
    labels = torch.zeros(8, 400, dtype=torch.int64)
    loss_fn = cpo.FusedLinearCPOLoss()
    plain, sized = (loss_fn.plan(labels, 49152, torch.bfloat16, device="cpu", hidden_size=h) for h in (None, 16))
    assert [c.num_rows for c in plain.layout.chunks] == [c.num_rows for c in sized.layout.chunks]


def test_all_kept_logits_share_one_budget():
    """What waits for a backward pass counts: a call beyond the budget computes its logits again."""
    batch, before = make_batch(4, 9), kept_bytes()
    rows = int(batch.lengths().sum())
    budget = (2 * rows + 15) * ROW + before

    def run():
        return cpo.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias, memory_budget=budget)

    logps, held = [], []
    for _ in range(3):
        logps.append(run())
        held.append((kept_bytes() - before) // ROW)
    assert held == [rows, 2 * rows, 2 * rows]
    want = torch.autograd.grad(logps[0].sum(), batch.leaves, retain_graph=True)
    assert kept_bytes() - before == rows * ROW
    for one in logps:  # used before, kept, computed again
        got = torch.autograd.grad(one.sum(), batch.leaves, retain_graph=True)
        assert all(relative_error(g, w) < 1e-12 for g, w in zip(got, want, strict=True))
    assert kept_bytes() == before


def test_a_bias_alone_sums_no_weight_gradient(monkeypatch):
    """So its chunks get no more rows than the budget."""
    monkeypatch.setitem(strategy.DEFAULT_BUDGET, "cpu", 32 * 101 * 2)
    batch, sizes, original = make_batch(8, 9).to(torch.bfloat16), [], grads.WeightGrad.add

    def watched(self, g, *rest):
        sizes.append(g.shape[0])
        return original(self, g, *rest)

    monkeypatch.setattr(grads.WeightGrad, "add", watched)
    given = batch.hidden, batch.weight.detach(), batch.labels, batch.bias
    cpo.linear_nll(*given)
    cpo.FusedLinearCPOLoss()(*given, ref_logps=batch.ref_logps)
    cpo.FusedLinearKTOLoss()(*given, ref_logps=batch.ref_logps, desirable=batch.ref_logps < -9, kl=0.0)
    assert len(sizes) >= 6 and max(sizes) <= 32


@pytest.mark.parametrize("filter_eps", [None, 1e-9])
def test_pieces_of_a_chunk_are_the_chunk(monkeypatch, filter_eps):
    """300 rows in pieces of 128, the last one shorter; a tiny eps leaves every column live."""
    monkeypatch.setitem(strategy.SMALL, "cpu", (1, 128))
    batch = make_batch(4, 80)
    batch.labels[batch.labels == -100] = 3
    batch.labels[0, :20] = -100
    logps = reference.linear_token_logps(batch.hidden, batch.weight, batch.labels, batch.bias)
    pair = torch.nn.functional.logsigmoid(0.1 * (logps[:2].sum(1) - logps[2:].sum(1)))
    upstream = torch.randn(logps.shape, dtype=torch.float64)
    given, options = (batch.hidden, batch.weight, batch.labels, batch.bias), {"filter_eps": filter_eps}
    sizes, original = [], inputs.Head.columns

    def watched(self, x, *rest):
        sizes.append(x.shape[0])
        return original(self, x, *rest)

    monkeypatch.setattr(inputs.Head, "columns", watched)
    fused = cpo.FusedLinearCPOLoss(beta=0.1, **options)
    zeros = torch.zeros(4, dtype=torch.float64)
    for run, want in (
        (lambda: cpo.linear_nll(*given, **options), -logps.sum() / 300),
        (lambda: fused(*given, ref_logps=zeros).loss, -pair.mean()),
        (lambda: (cpo.linear_token_logps(*given, **options) * upstream).sum(), (logps * upstream).sum()),
    ):
        sizes.clear()
        seen = run()
        assert len(sizes) == 3 and sum(sizes) == 300 and max(sizes) <= 128
        assert relative_error(seen, want) < 1e-12
        got, true = (torch.autograd.grad(loss, batch.leaves, retain_graph=True) for loss in (seen, want))
        assert all(relative_error(g, t) < 1e-11 for g, t in zip(got, true, strict=True))
