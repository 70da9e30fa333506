"""Products by tiles of float32, as on a CPU without 16-bit products: against float64, and through the loss."""

from functools import wraps

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cpo_kernels as cpo
from cpo_kernels.backends import dispatch
from cpo_kernels.head import grads, matmul
from cpo_kernels.head.grads import WeightGrad
from cpo_kernels.head.inputs import Head, Needs
from cpo_kernels.head.matmul import TILE, add_product, adds_products, own_sums, product
from cpo_kernels.head.relative import anchor_bytes
from cpo_kernels.ops.token_logps import HeadOptions

# [m, k, n]: the longest side is each in turn, below, at and beyond a tile
SHAPES = [(3, 5, 2 * TILE + 7), (2 * TILE + 7, 3, 5), (3, 2 * TILE + 7, 5), (5, 3, TILE), (4, 4, 4), (1, 1, 1)]
EMPTY = [(0, 3, 5), (3, 0, 5), (3, 5, 0)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def tiles(monkeypatch):
    """As if this CPU had no 16-bit products: torch's are an error."""
    monkeypatch.setattr(matmul, "cpu_multiplies", lambda dtype: dtype not in DTYPES)
    for own in ("cpu_multiplies_bf16", "cpu_has_tiles"):
        monkeypatch.setattr(dispatch, own, lambda: False)

    def guarded(torchs):
        @wraps(torchs)
        def call(*args, **kind):
            assert not any(isinstance(t, torch.Tensor) and t.dtype in DTYPES for t in args)
            return torchs(*args, **kind)

        return call

    for name in ("mm", "addmm", "matmul"):
        monkeypatch.setattr(torch, name, guarded(getattr(torch, name)))


def operands(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a and b, both transposed in memory, and bias."""
    generator = torch.Generator().manual_seed(m + k + n)
    a = torch.randn(k, m, generator=generator).t() / max(k, 1) ** 0.5
    return (
        a.to(dtype),
        torch.randn(n, k, generator=generator).t().to(dtype),
        torch.randn(n, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_a_product_is_rounded_once(shape, dtype, tiles):
    a, b, bias = operands(*shape, dtype)
    exact = a.double() @ b.double()
    for given, expected in ((None, exact), (bias, exact + bias.double())):
        out = torch.full(exact.shape, float("nan"), dtype=dtype)
        assert product(a, b, out, given) is out
        step = torch.finfo(dtype).eps * expected.abs()  # half a step of the dtype, and float32's own rounding
        assert ((out.double() - expected).abs() <= 0.5 * step + 1e-5).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_dw_of_several_chunks_in_bfloat16(scale, impl, monkeypatch):
    """The CPU's own matmul rounds the sum once; others round each chunk's product before the sum is. The reference is
    plain PyTorch."""
    own = impl == "cpu" and own_sums(torch.device("cpu"), torch.bfloat16)
    if not own:
        monkeypatch.setattr(grads, "add_to_halves", None)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.zeros(300, 70, dtype=torch.bfloat16), torch.randn(90, 70, generator=generator).bfloat16()
    g = torch.randn(90, 300, generator=generator).bfloat16()
    options, kernels = HeadOptions(-100, 1.0, 0.0, 300), dispatch.kernels(impl, weight)
    head = Head(weight, weight[:0, 0], torch.zeros(90, dtype=torch.int64), options, 1, kernels)
    sums, ones, parts = WeightGrad(head, 4, Needs(False, True, True)), torch.ones(90), [0, 31, 32, 64, 90]
    for low, high in zip(parts, parts[1:], strict=False):
        if high == 90 and scale is not None:
            sums.scale = torch.tensor([scale])
        sums.add(g[low:high], x[low:high], ones[low:high])
    made, factor = sums.result(weight[:0], ones), 1.0 if scale is None else scale
    want = factor * (g.double().t() @ x.double())
    rounded = sum(g[a:b].double().t() @ x[a:b].double() for a, b in zip(parts, parts[1:], strict=False)).abs()
    each = 0 if own else 2**-8 * abs(factor) * (rounded + 20)
    assert made.dw.dtype == torch.bfloat16
    assert ((made.dw.double() - want).abs() <= 2**-8 * want.abs() + 1e-5 * abs(factor) + each).all()
    torch.testing.assert_close(made.db.double(), factor * g.double().sum(0), rtol=1e-2, atol=0.1 * abs(factor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_products_add_up_in_float32(shape, dtype, tiles):
    a, b, _ = operands(*shape, dtype)
    total = torch.full((shape[0], shape[2]), float("nan"))
    add_product(total, a, b, first=True)
    add_product(total, a, b, first=False)
    torch.testing.assert_close(total.double(), 2 * (a.double() @ b.double()), rtol=1e-5, atol=1e-5)
    out = torch.full(total.shape, float("nan"), dtype=dtype)
    add_product(out, a, b, first=True)
    assert torch.equal(out, product(a, b, torch.empty_like(out)))
    add_product(out, a, b, first=False)
    assert ((out.double() - 2 * (a.double() @ b.double())).abs() <= 2 * torch.finfo(dtype).eps * out.abs() + 1e-5).all()


def test_the_default_dtype_does_not_matter(tiles):
    a, b, _ = operands(3, 2 * TILE + 7, 5, torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        product(a, b, torch.empty(3, 5, dtype=a.dtype))
    finally:
        torch.set_default_dtype(torch.float32)


def test_products_follow_onednn(monkeypatch):
    """Without oneDNN, or with it switched off, 16-bit products are torch's own loops."""
    monkeypatch.setattr(matmul, "_onednn_multiplies", lambda dtype: True)
    assert matmul.cpu_multiplies(torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not matmul.cpu_multiplies(torch.bfloat16) and matmul.cpu_multiplies(torch.float32)
    monkeypatch.undo()
    matmul._onednn_multiplies.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not matmul._onednn_multiplies(torch.bfloat16)
    matmul._onednn_multiplies.cache_clear()


class Live(TorchDispatchMode):
    """Counts the bytes of the float32 tensors that torch makes in it, and how many there are at most at a time."""

    def __init__(self):
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = op(*args, **kwargs)
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        if out.dtype == torch.float32 and out.untyped_storage()._cdata not in given:
            storage = out.untyped_storage()
            self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


@pytest.mark.parametrize("rows, hidden, vocab", [(100, 64, 9000), (7, 640, 9000), (300, 300, 5000)])
def test_the_plan_counts_tiles(rows, hidden, vocab, tiles):
    x, w = torch.randn(rows, hidden).bfloat16(), torch.randn(vocab, hidden).bfloat16()
    g = torch.randn(rows, vocab).bfloat16()
    counted = matmul.tile_bytes(rows, hidden, x.dtype, x.device)
    for a, b in ((x, w.t()), (g, w), (g.t(), x)):
        out = torch.empty(len(a), b.shape[1], dtype=a.dtype)
        with Live() as live:
            product(a, b, out)
        assert 0.7 * counted <= live.peak <= counted
    layout = cpo.explain(rows, hidden, vocab)
    looked_at = anchor_bytes(rows, rows, hidden, vocab, x.dtype, x.device)
    assert layout.extra_bytes == 2 * rows * (vocab + hidden) + counted + looked_at
    assert matmul.tile_bytes(rows, hidden, torch.float32, x.device) == 0


def test_float32_is_left_to_torch(tiles):
    a, b, bias = operands(5, 7, 9, torch.float32)
    assert torch.equal(product(a, b, torch.empty(5, 9), bias), torch.addmm(bias, a, b))
    assert adds_products(torch.empty(0), a) and adds_products(torch.empty(0), a.bfloat16())
    assert not adds_products(torch.empty(0), a.half())  # float16 needs its power of two


def test_what_the_cpu_multiplies_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(matmul, "cpu_multiplies", lambda dtype: True)
    monkeypatch.setattr(matmul, "_in_float32", None)
    a, b, _ = operands(5, 7, 9, torch.bfloat16)
    assert torch.equal(product(a, b, torch.empty(5, 9, dtype=a.dtype)), a @ b)


@pytest.mark.skipif(not dispatch.cpu_has_tiles(), reason="this processor has no AMX")
@pytest.mark.parametrize("width, turned, own", [(1024, True, True), (1025, True, False), (1025, False, True)])
def test_a_wide_dw_is_left_to_torch(width, turned, own):
    a = torch.ones(3, 4, dtype=torch.bfloat16)
    total, b = torch.empty(3, width, dtype=torch.bfloat16), torch.ones(4, width, dtype=torch.bfloat16)
    assert matmul._own_adds(total, a.t().contiguous().t() if turned else a, b) is own
    add_product(total, a, b, first=True)
    assert bool((total == 4.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_nll_does_not_notice(dtype, tiles):
    generator = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(30, 16, generator=generator), torch.randint(3000, (30,), generator=generator)
    weight = torch.randn(3000, 16, generator=generator) / 4
    results = []
    for kind in (dtype, torch.float32):
        x, w = (t.to(dtype).to(kind).requires_grad_() for t in (hidden, weight))
        loss = cpo.linear_nll(x, w, labels, memory_budget=16 * 3000 * kind.itemsize)
        (3.0 * loss).backward()
        results.append((loss.detach(), x.grad, w.grad))
    for ours, exact in zip(*results, strict=True):
        assert (ours.float() - exact).norm() <= 0.02 * exact.norm()


ROW = 3000 * 2  # bytes of a row of logits
# strategy: loss type, rows that the memory budget holds, chunks
STRATEGIES = {
    "pairs": ("sigmoid", 80, 1),
    "pairs, two chunks": ("sigmoid", 36, 2),
    "deferred": ("sigmoid", 10, 1),
    "two_pass": ("ipo", 10, 1),
    "frozen": ("sigmoid", 80, 1),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_does_not_notice(strategy, dtype, tiles, monkeypatch):
    """Loss and gradients in 16 bit against float32; every product of 16-bit matrices goes by tiles."""
    seen, in_float32 = [], matmul._in_float32
    monkeypatch.setattr(
        matmul, "_in_float32", lambda a, *rest, **kind: seen.append(a.dtype) or in_float32(a, *rest, **kind)
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4 if strategy != "deferred" else 2, 12, 16, generator=generator).to(dtype)
    weight = (torch.randn(3000, 16, generator=generator) / 4).to(dtype)
    bias = torch.randn(3000, generator=generator).to(dtype)
    labels = torch.randint(3000, hidden.shape[:2], generator=generator)
    labels[:, :3] = -100
    given = torch.randn(len(hidden), generator=generator)
    loss_type, rows, chunks = STRATEGIES[strategy]
    results = []
    for kind in (dtype, torch.float32):
        x, w, b = (t.detach().to(kind).requires_grad_() for t in (hidden, weight, bias))
        w.requires_grad_(strategy != "frozen")
        budget = rows * ROW * kind.itemsize // 2
        loss = cpo.FusedLinearCPOLoss(beta=0.3, loss_type=loss_type, memory_budget=budget)
        if strategy != "frozen":
            plan = loss.plan(labels, 3000, kind, device="cpu")
            assert (plan.layout.strategy, len(plan.layout.parts)) == (strategy.split(",")[0], chunks)
        out = loss(x, w, labels, ref_logps=given, bias=b)
        (3.0 * out.loss).backward()
        results.append([out.loss.detach(), *(t.grad for t in (x, w, b) if t.grad is not None)])
    assert set(seen) == {dtype}
    for ours, exact in zip(*results, strict=True):
        assert (ours.float() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize(
    "columns, stride, first", [(64, 64, 0), (61, 64, 0), (61, 61, 0), (64, 70, 0), (62, 64, 1), (1, 8, 0)]
)
def test_rows_are_filled_with_their_constants(columns, stride, first):
    """By words of 8 bytes where rows begin on such; else one by one. Nothing but padding is written besides."""
    flat = torch.full((first + 5 * stride,), torch.nan, dtype=torch.bfloat16)
    out, values = flat[first:].view(5, stride)[:, :columns], torch.randn(5).bfloat16()
    matmul._fill_rows(out, values)
    assert torch.equal(out, values[:, None].expand(5, columns)) and bool(flat[:first].isnan().all())
    a, b, lacks = torch.randn(5, 8).bfloat16(), torch.randn(8, columns).bfloat16(), values.float()
    want = a.double() @ b.double() - lacks.double()[:, None]
    torch.testing.assert_close(product(a, b, out, None, lacks).double(), want, rtol=2.0**-8, atol=1e-4)
