"""Relative logits: how much better 16-bit log-probs become, on every path of the head, and what the rows lack."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cpo_kernels as cpo
from cpo_kernels import reference
from cpo_kernels.backends import dispatch
from cpo_kernels.bench.rows import MAKERS
from cpo_kernels.bench.workload import head
from cpo_kernels.head import relative
from cpo_kernels.head.inputs import Head, Logits
from cpo_kernels.head.label_remainder import add_remainder, label_remainder, product_dx
from cpo_kernels.ops.token_logps import HeadOptions
from tests.support.heads import EVERY_BACKEND, LOW_PRECISION

VOCAB, HIDDEN, ROWS = 6001, 64, 256


def made(dtype, labels="true", bias=False, kind="peaked", seed=0):
    """Rows of the benchmark: peaked as those of a trained model, with its frequent words; or of random numbers."""
    workload = replace(
        head("smollm2-135m"), hidden=HIDDEN, vocab=VOCAB, groups=ROWS // 16, responses=1, length=16, prompt=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = MAKERS[kind](workload, torch.device("cpu"))
    g = torch.Generator().manual_seed(seed)
    x, weight, y = rows.hidden.view(ROWS, HIDDEN), rows.weight, rows.labels.view(-1)
    x = x * (0.5 + torch.rand(ROWS, 1, generator=g))
    if labels == "shuffled":
        y = y[torch.randperm(ROWS, generator=g)]
    if labels == "random":
        y = torch.randint(VOCAB, (ROWS,), generator=g)
    y[::7] = -100
    b = torch.randn(VOCAB, generator=g).to(dtype) if bias else None
    return x.to(dtype), weight.to(dtype), b, y


def fewer(impl, x, y):
    """Triton's interpreter takes 50 ms for a row."""
    step = 3 if impl == "triton" else 1
    return x[::step], y[::step]


def rms(actual, truth):
    return float((actual.double() - truth).square().mean().sqrt())


def naive(x, weight, labels, bias, softcap=None, scale=1.0):
    """What PyTorch makes in this dtype: logits rounded, log_softmax in float32."""
    z = torch.nn.functional.linear(x, weight, bias).float() * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1) * (labels != -100)


def of_loss(x, weight, labels, bias, budget=None, **options):
    """Per-token log-probs by way of the fused loss: sequences of one token, pairs of neighbours."""
    loss_fn = cpo.FusedLinearCPOLoss(memory_budget=budget, **options.pop("loss", {}), **options)
    pairs = torch.arange(ROWS).view(-1, 2)
    out = loss_fn(x[:, None], weight, labels[:, None], bias, pairs=pairs, ref_logps=torch.zeros(ROWS))
    return out.seq_logps


def leaves(x, weight, bias, train):
    return x.clone().requires_grad_(), weight.clone().requires_grad_(train), bias


PATHS = {
    "forward": lambda x, w, y, b, **o: cpo.linear_token_logps(x, w, y, b, **o),
    "frozen": lambda x, w, y, b, **o: cpo.linear_token_logps(x.clone().requires_grad_(), w, y, b, **o),
    "recompute": lambda x, w, y, b, **o: cpo.linear_token_logps(*leaves(x, w, b, True)[:2], y, b, **o),
    "chunks": lambda x, w, y, b, **o: cpo.linear_token_logps(x, w, y, b, memory_budget=40 * VOCAB * 2, **o),
    "filtered": lambda x, w, y, b, **o: cpo.linear_token_logps(
        *leaves(x, w, b, True)[:2], y, b, filter_eps=2.0**-12, filter_head_grad=True, **o
    ),
    "pairs": lambda x, w, y, b, **o: of_loss(*leaves(x, w, b, True)[:2], y, b, **o),
    "two_pass": lambda x, w, y, b, **o: of_loss(
        *leaves(x, w, b, True)[:2], y, b, budget=40 * VOCAB * 2, loss={"loss_type": "aot"}, **o
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("labels", ["true", "shuffled", "random"])
def test_a_part_of_the_naive_error_on_peaked_logits(path, dtype, labels):
    x, weight, _, y = made(dtype, labels)
    truth = reference.linear_token_logps(x.double(), weight.double(), y)
    share = {"true": 1 / 4, "shuffled": 1 / 3, "random": 1}[labels]  # random labels are not where the mass is
    assert rms(PATHS[path](x, weight, y, None).detach(), truth) <= rms(naive(x, weight, y, None), truth) * share


HEADS = ({}, {"scale": 0.5}, {"softcap": 30.0}, {"softcap": 30.0, "scale": 1.5})


@pytest.mark.parametrize(
    "impl, head, bias",
    [
        (impl, head, bias)
        for impl, head, bias in itertools.product(EVERY_BACKEND, HEADS, (False, True))
        if impl != "triton" or bias == ("softcap" in head)  # 12 s each in its interpreter
    ],
    ids=str,
)
def test_scale_softcap_and_bias(impl, head, bias):
    """float16, as Triton's interpreter has no bfloat16."""
    x, weight, b, y = made(torch.float16, bias=bias)
    truth = reference.linear_token_logps(x.double(), weight.double(), y, None if b is None else b.double(), **head)
    logps = cpo.linear_token_logps(x, weight, y, b, impl=impl, **head)
    assert rms(logps, truth) <= rms(naive(x, weight, y, b, **head), truth) / 3


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("path", ["frozen", "recompute", "pairs"])
def test_never_more_than_the_naive_error_on_random_logits(path, dtype):
    x, weight, _, y = made(dtype, kind="random")
    truth = reference.linear_token_logps(x.double(), weight.double(), y)
    assert rms(PATHS[path](x, weight, y, None).detach(), truth) <= rms(naive(x, weight, y, None), truth)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_gradients_are_no_worse_than_naive_ones(train, kind, dtype):
    """rms over 4 batches, in norms; on peaked logits less than 0.7 of the naive error. dX of a frozen head and dW in
    float16 are rounded once more: their coefficients are known later, or multiply in float32."""
    errors = {"ours": 0.0, "naive": 0.0}
    for seed in range(4):
        x, weight, _, y = made(dtype, kind=kind, seed=seed)
        upstream = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))
        true = [t.double().requires_grad_() for t in (x, weight)]
        want = torch.autograd.grad(reference.linear_token_logps(*true, y), true, upstream.double())
        for name, function in (("ours", cpo.linear_token_logps), ("naive", lambda x, w, y: naive(x, w, y, None))):
            x_, w_, _ = leaves(x, weight, None, train)
            wanted = [x_, w_][: 1 + train]
            got = torch.autograd.grad(function(x_, w_, y), wanted, upstream)
            for g, w in zip(got, want, strict=False):
                errors[name] += float((g.double() - w).norm() / w.norm()) ** 2
    assert errors["ours"] ** 0.5 <= errors["naive"] ** 0.5 * (0.7 if kind == "peaked" else 1.15)


def known_loss(path, x, weight, labels):
    """A loss that is known in the forward pass, and what it multiplies the gradients of the log-probs [ROWS] by."""
    x, labels, length = x.view(16, -1, HIDDEN), labels.view(16, -1), ROWS // 16
    if path == "nll":
        m = 0.5 + torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
        return cpo.linear_nll(x, weight, labels, token_weights=m, num_tokens=190.0), -m.view(-1) / 190
    ref_logps = torch.linspace(-60, -20, 16)
    if path == "kto":
        given = {"ref_logps": ref_logps, "desirable": torch.arange(16) % 3 == 0, "kl": 0.3}
        out = cpo.FusedLinearKTOLoss(beta=0.05)(x, weight, labels, **given)
        after = lambda logps: reference.kto_loss(logps, *given.values(), 0.05, 1.0, 1.0).mean()  # noqa: E731
    else:
        options = {"chunks": {"memory_budget": 64 * VOCAB * 2}, "exact sets": {"filter_eps": 1e-12}}.get(path, {})
        out = cpo.FusedLinearCPOLoss(beta=0.05, **options)(x, weight, labels, ref_logps=ref_logps)
        after = lambda logps: cpo.preference_loss(logps, beta=0.05, ref_logps=ref_logps.double()).loss  # noqa: E731
    logps = out.seq_logps.double().requires_grad_()
    return out.loss, torch.autograd.grad(after(logps), logps)[0].float().repeat_interleave(length)


@pytest.mark.parametrize("path", ["pairs", "chunks", "exact sets", "nll", "kto"])
def test_known_losses_round_gradients_once(path):
    """In bfloat16, coefficients are in the gradient of the logits before it is rounded, as where logits are kept: dX
    and dW of several batches are as near to float64. With one rounding more they are 1.1 times as far from it, as is dW
    of several chunks, whose products are rounded on a CPU before they are added."""
    errors = {name: [0.0, 0.0] for name in ("known", "kept")}
    for seed in range(3):
        x, weight, _, y = made(torch.bfloat16, seed=seed)
        given = leaves(x, weight, None, True)[:2]
        loss, coef = known_loss(path, *given, y)
        got = torch.autograd.grad(loss, given)
        kept = torch.autograd.grad(cpo.linear_token_logps(*given, y), given, coef)
        true = [t.double().requires_grad_() for t in (x, weight)]
        want = torch.autograd.grad(reference.linear_token_logps(*true, y), true, coef.double())
        for name, grads in (("known", got), ("kept", kept)):
            for k, (g, w) in enumerate(zip(grads, want, strict=True)):
                errors[name][k] += float((g.double() - w).norm() / w.norm()) ** 2
    for known, kept in list(zip(*errors.values(), strict=True))[: 1 if path == "chunks" else 2]:
        assert known**0.5 <= 1.03 * kept**0.5


@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "softcap": 20.0}, {"vocab_size": VOCAB - 9}])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_dx_lacks_the_rounding_of_labels_elements(dtype, options):
    """dX is as near as its own rounding allows to the product of G with the labels' elements before they were rounded,
    whole and by tiles of columns; rows without a label are 0."""
    x, weight, bias, y = made(dtype, bias=True)
    y[y >= VOCAB - 9] = 3
    options = HeadOptions(
        -100, options.get("scale", 1.0), options.get("softcap", 0.0), options.get("vocab_size", VOCAB)
    )
    coef = torch.randn(ROWS, generator=torch.Generator().manual_seed(1)) * (1e-3 if dtype == torch.bfloat16 else 1.0)
    whole = Head(weight, bias, y, options, ROWS, dispatch.kernels("cpu", x))
    z, (logp, lse, *_) = whole.forward(x, y)
    whole.kernels.token_logps_bwd_(z.z, y, lse, coef, *options, z.anchors)
    u = (z.anchors[1].double() * options.scale)[:, None]
    slope = torch.full_like(u, options.scale)
    if cap := options.softcap:
        u, slope = cap * torch.tanh(u / cap), options.scale / torch.cosh(u / cap) ** 2
    exact = coef.double()[:, None] * slope * -torch.expm1(u - lse.double()[:, None])
    labelled, g, w = y != -100, z.z.double(), weight.double()
    columns = y.clamp(min=0)[:, None]
    want = g.scatter(1, columns, torch.where(labelled[:, None], exact, g.gather(1, columns))) @ w

    def error(dx):
        return float((dx.double() - want).norm() / want.norm())

    dx, by_tiles, e = torch.full_like(x, torch.nan), torch.zeros(x.shape), torch.zeros(ROWS, dtype=torch.float64)
    product_dx(whole, z, y, logp, coef, dx)
    for low in range(0, VOCAB, 2000):
        part = slice(low, min(low + 2000, VOCAB))
        e += label_remainder(whole, Logits(z.z[:, part], z.anchors), y, logp, coef, part)[0]
        by_tiles += z.z[:, part].float() @ weight[part].float()
    add_remainder(whole, y, e, by_tiles)
    rounded = error(want.to(dtype))
    assert error(dx) < 1.03 * rounded and error(by_tiles) < 0.1 * rounded
    assert error(z.z @ weight) > 1.1 * rounded  # without that, the largest error of G is in dX
    assert not dx[~labelled].any()


@pytest.mark.parametrize("path", ["pairs", "nll", "kto"])
def test_float32_gradients_of_logits_far_from_zero(path):
    """All logits of a row shifted by 300: p must not be computed from a rounded log-sum-exp."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(ROWS, HIDDEN, generator=g), 0.3 * torch.randn(2003, HIDDEN, generator=g)
    x[:, 0], weight[:, 0] = 1.0, 300.0
    y = (x @ weight.t()).topk(3, 1).indices[:, 1]
    given = leaves(x, weight, None, True)[:2]
    loss, coef = known_loss(path, *given, y)
    got = torch.autograd.grad(loss, given)
    torchs = torch.autograd.grad(naive(*given, y, None), given, coef)
    true = [t.double().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(reference.linear_token_logps(*true, y), true, coef.double())
    for ours, theirs, w in zip(got, torchs, want, strict=True):
        assert (ours.double() - w).norm() <= 1.5 * (theirs.double() - w).norm()


def test_a_reference_through_the_same_head():
    x, weight, _, y = made(torch.bfloat16)
    truth = reference.linear_token_logps(x.double(), weight.double(), y)
    loss_fn = cpo.FusedLinearCPOLoss()
    pairs = torch.arange(ROWS).view(-1, 2)
    for budget in (None, 50 * VOCAB * 2):  # both in one product, and one after the other
        loss_fn = cpo.FusedLinearCPOLoss(memory_budget=budget)
        out = loss_fn(x[:, None], weight, y[:, None], ref_hidden=x[:, None].flip(0), pairs=pairs)
        want = truth[pairs] - reference.linear_token_logps(x.flip(0).double(), weight.double(), y)[pairs]
        got = torch.stack([out.chosen_rewards, out.rejected_rewards], 1) / 0.1
        assert rms(got, want) < 4e-3


def test_what_rows_lack():
    """Numbers of the 16-bit dtype, near the mean logit; nothing where all of the columns are masked; exact labels."""
    x, weight, bias, y = made(torch.bfloat16, bias=True)
    options, columns = HeadOptions(-100, 0.7, 0.0, VOCAB), y.clamp(min=0)
    net = relative.make_net(columns, weight, bias, VOCAB)
    kernels, room = dispatch.kernels("auto", x), x.new_empty(0)
    lacks, at_label = relative.make_anchors(x, weight, bias, columns, net, options, kernels, room)
    z = x.double() @ weight.double().t() + bias.double()
    assert torch.equal(lacks, lacks.bfloat16().float())
    mean = ((0.7 * z).softmax(1) * z).sum(1)
    assert float((lacks - mean)[y != -100].abs().median()) < 0.6 * float(mean.abs().median())
    torch.testing.assert_close(at_label.double(), z.gather(1, columns[:, None]).squeeze(1), rtol=1e-6, atol=1e-5)
    masked = torch.full_like(bias, -torch.inf)
    net = relative.make_net(columns, weight, masked, VOCAB)
    lacks, at_label = relative.make_anchors(x, weight, masked, columns, net, options, kernels, room)
    assert not lacks.any() and bool((at_label == -torch.inf).all())


@pytest.mark.parametrize("softcap, scale", [(0.0, 1.0), (0.0, 0.7), (20.0, 1.3)])
def test_what_rows_lack_in_one_op(softcap, scale):
    """`relative_anchors` of the CPU's own matmuls: as the operations of the other backends, also for more
    rows than it takes at a time and for logits that are not finite."""
    x, weight, _, y = made(torch.bfloat16)
    x, columns, none = x.repeat(2, 1)[:387], y.repeat(2)[:387].clamp(min=0), weight.new_empty(0)
    x[3], x[5], x[7] = 0.0, 3e38, torch.nan
    kernels, options = dispatch.kernels("auto", x), HeadOptions(-100, scale, softcap, VOCAB)
    if not dispatch.own_matmuls(kernels, weight):
        pytest.skip("the CPU kernels' own matmuls need AVX512_BF16")
    net, room = relative.make_net(columns, weight, none, VOCAB), x.new_empty(0)
    got = relative.make_anchors(x, weight, none, columns, net, options, kernels, room)
    want = relative.make_anchors(x, weight, none, columns, net, options, reference, room)
    assert torch.equal(got[0], got[0].bfloat16().float()) and got.isfinite().all(1).tolist() == [True, False]
    rows = torch.arange(387) != 5  # there float32 sums of products near 1e38 depend on their order
    torch.testing.assert_close(got[0, rows], want[0, rows], rtol=2.0**-7, atol=1e-2)  # of logits rounded to bfloat16
    torch.testing.assert_close(got[1, rows], want[1, rows], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_relative_anchors_refuse_what_does_not_fit():
    x, few, labels = (torch.zeros(3, 4).bfloat16(), torch.zeros(2, 4).bfloat16(), torch.tensor([0, 5, 1]))
    weight, room = torch.zeros(6, 4).bfloat16(), torch.zeros(3, 2).bfloat16()
    if not dispatch.own_matmuls(dispatch.kernels("auto", x), weight):
        pytest.skip("the CPU kernels' own matmuls need AVX512_BF16")

    def call(x=x, weight=weight, labels=labels, few=few, room=room):
        return torch.ops.cpo_kernels.relative_anchors(x, weight, labels, few, 1.0, 0.0, room)

    assert call().shape == (2, 3) and call(x[:0], labels=labels[:0]).shape == (2, 0)
    for given, message in (
        ({"labels": labels + 1}, r"labels must lie in \[0, 6\), got 6 at row 1"),
        ({"labels": labels - 1}, "got -1 at row 0"),
        ({"labels": labels[:2]}, r"labels must have shape \[3\]"),
        ({"room": room[:, :1]}, r"room must have shape"),
        ({"room": room[:0]}, "few and room must have rows, got 2 and 0"),
        ({"few": few[:0], "room": room[:, :0]}, "few and room must have rows, got 0 and 3"),
        ({"x": x.float()}, "x must be"),
        ({"weight": torch.zeros(6, 6).bfloat16()}, "weight must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**given)


@pytest.mark.parametrize("train", [False, True])
def test_small_chunks_take_the_labels_of_all(train):
    """Shuffled labels: the logits of a row's likely tokens are known from the labels of other chunks."""
    x, weight, _, y = made(torch.bfloat16, "shuffled")
    truth = reference.linear_token_logps(x.double(), weight.double(), y)
    whole, chunks = (
        cpo.linear_token_logps(x, weight.clone().requires_grad_(train), y, memory_budget=budget)
        for budget in (None, 16 * VOCAB * 2)
    )
    assert cpo.explain(ROWS, HIDDEN, VOCAB, torch.bfloat16, memory_budget=16 * VOCAB * 2).chunk_rows < ROWS // 8
    assert rms(chunks, truth) < 1.1 * rms(whole, truth) < 0.2 * rms(naive(x, weight, y, None), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_logits_lack_nothing(dtype):
    assert not relative.is_relative(dtype)


def test_float16_logits_beyond_its_range():
    """A product of 1e5 is infinite in float16; what it lacks is not."""
    x, weight, _, y = made(torch.float16)
    weight[:, 0], x[:, 0] = 250.0, 250.0  # 62,500 in every logit, and at most 65,504 in float16
    x[:, 1], weight[:, 1] = 100.0, 100.0
    truth = reference.linear_token_logps(x.double(), weight.double(), y)
    assert not torch.isfinite(naive(x, weight, y, None)).all()
    x_ = x.clone().requires_grad_()
    logps = cpo.linear_token_logps(x_, weight, y)
    assert float((logps.detach() - truth).abs().max()) < 40.0  # a row lacks at most 32,752 of 72,500


@pytest.mark.parametrize("impl", EVERY_BACKEND)
def test_masked_columns(impl):
    """Unused words at -inf, among them labels: their log-prob is -inf, gradients of the others are finite."""
    x, weight, bias, y = made(torch.float16, bias=True)
    x, y = fewer(impl, x, y)
    bias[100:200] = -torch.inf
    y[1] = 150
    truth = reference.linear_token_logps(x.double(), weight.double(), y, bias.double())
    x_ = x.clone().requires_grad_()
    logps = cpo.linear_token_logps(x_, weight, y, bias, impl=impl)
    assert logps[1] == -torch.inf
    rest = torch.isfinite(truth)
    assert rms(logps.detach()[rest], truth[rest]) < 1e-2
    logps[rest].sum().backward()
    assert torch.isfinite(x_.grad).all()


@pytest.mark.parametrize("impl", EVERY_BACKEND)
@pytest.mark.parametrize("mask", [-1e3, -3e4, -6e4])
def test_columns_that_a_finite_bias_masks_under_a_softcap(mask, impl):
    """tanh leaves them e^-cap of probability each: their logits may not decide what rows lack."""
    x, weight, _, y = made(torch.float16)
    x, y = fewer(impl, x, y)
    bias = torch.zeros(VOCAB, dtype=torch.float16)
    bias[:256] = mask
    y[y < 256] = -100
    truth = reference.linear_token_logps(x.double(), weight.double(), y, bias.double(), softcap=5.0)
    logps = cpo.linear_token_logps(x, weight, y, bias, softcap=5.0, impl=impl)
    assert rms(logps, truth) <= 2 * rms(naive(x, weight, y, bias, softcap=5.0), truth)


def test_the_first_columns_and_labels_may_be_masked():
    """By a finite bias, as padded vocabularies are: columns from all over the vocabulary are looked at, too."""
    x, weight, _, y = made(torch.bfloat16)
    bias = torch.zeros(VOCAB, dtype=torch.bfloat16)
    bias[:512], bias[1000], y[:] = -1e4, -1e4, 1000
    true = x.double().requires_grad_()
    want = torch.autograd.grad(reference.linear_token_logps(true, weight.double(), y, bias.double()).sum(), true)[0]
    leaf = x.clone().requires_grad_()
    got = torch.autograd.grad(cpo.linear_token_logps(leaf, weight, y, bias).sum(), leaf)[0]
    assert float((got.double() - want).norm() / want.norm()) < 2e-2


class Counted(TorchDispatchMode):
    """Counts operations that compute; views cost no launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def test_launches_do_not_grow_with_rows():
    """On a GPU each operation is a launch: 32 turns of 256 rows took longer than the matmul let them hide."""

    def scan(u, *_):
        return u.new_empty(len(u)), u.new_empty(len(u)), u.new_empty(4, len(u))

    kernels, found = SimpleNamespace(token_logps_fwd=scan), []
    for rows in (256, 8192):
        shapes = (rows, HIDDEN), (VOCAB, HIDDEN), (0,)
        x, weight, bias = (torch.empty(*shape, device="meta", dtype=torch.bfloat16) for shape in shapes)
        labels = torch.empty(rows, dtype=torch.int64, device="meta")
        options, room = HeadOptions(-100, 1.0, 0.0, VOCAB), x.new_empty(rows * VOCAB)
        with Counted() as counted:
            net = relative.make_net(labels, weight, bias, VOCAB)
            relative.make_anchors(x, weight, bias, labels, net, options, kernels, room)
        found.append(counted.count)
    assert found[0] == found[1] < 40
