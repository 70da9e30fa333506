"""Triton's products of live gradients in its interpreter, against plain products in float64."""

import pytest
import torch

from cpo_kernels.kernels import live_matmul, tuning

DTYPES = (torch.float32, torch.float16, torch.float64)
SHAPES = {
    # rows, vocab, hidden, set_rows, share of live columns
    "sets of 32, odd sizes": (70, 301, 41, 32, 0.3),
    "one row": (1, 9, 8, 128, 0.5),
    "more rows a set than a tile": (150, 60, 24, 140, 0.5),
    "more sets than bits of a key": (70, 40, 16, 1, 0.2),
    "nothing is live": (10, 40, 16, 4, 0.0),
    "everything is": (10, 200, 300, 4, 1.0),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(name, dtype, aligned=False):
    """[g_A, tau] of each set, and what `live_grads` makes of them; x, weight, tail_rows."""
    rows, vocab, hidden, set_rows, share = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    sets = -(-rows // set_rows)
    live = torch.rand(sets, vocab, generator=generator) < share
    if sets > 2:
        live[1] = False
    if aligned:
        for k in range(sets):
            while (live[k].sum() + 1) % 8:
                live[k, (~live[k]).nonzero()[0]] = True
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), live.sum(1).cumsum(0)])
    parts = [
        torch.randn(min(set_rows, rows - k * set_rows), int(live[k].sum()) + 1, generator=generator).to(dtype)
        for k in range(sets)
    ]
    shapes = ((rows, hidden), (vocab, hidden), (sets, hidden))
    x, weight, tail = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    columns = live.nonzero()[:, 1]
    return parts, torch.cat([part.flatten() for part in parts]), columns, offsets, set_rows, x, weight, tail


def near(actual, expected, dtype):
    tolerance = {torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    scale = expected.abs().amax().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_dx(name, dtype):
    parts, g, columns, offsets, set_rows, x, weight, tail = make(name, dtype)
    ids = columns.split(offsets.diff().tolist())
    want = [p[:, :-1].double() @ weight[i].double() + p[:, -1:].double() * t.double()
            for p, i, t in zip(parts, ids, tail, strict=True)]  # fmt: skip
    near(live_matmul.live_dx(g, columns, offsets, set_rows, weight, tail, len(x)), torch.cat(want), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_dw(name, dtype):
    parts, g, columns, offsets, set_rows, x, weight, _ = make(name, dtype)
    dw = torch.randn(weight.shape).to(torch.promote_types(dtype, torch.float32))
    want = dw.double()
    for part, i, rows in zip(parts, columns.split(offsets.diff().tolist()), x.split(set_rows), strict=True):
        want[i] += part[:, :-1].double().T @ rows.double()
    again = dw.clone()
    for out in (dw, again):
        live_matmul.live_dw_(g, columns, offsets, set_rows, x, out)
    near(dw, want, dtype)
    assert torch.equal(dw, again)


def test_rows_of_16_bytes_give_the_same():
    parts, g, columns, offsets, set_rows, x, weight, tail = make("sets of 32, odd sizes", torch.float16, aligned=True)
    assert not ((offsets.diff() + 1) % 8).any()
    aligned = live_matmul.live_dx(g, columns, offsets, set_rows, weight, tail, len(x))
    shifted = torch.cat([g.new_zeros(1), g])[1:]
    assert torch.equal(aligned, live_matmul.live_dx(shifted, columns, offsets, set_rows, weight, tail, len(x)))


def test_no_rows():
    g, none, offsets = torch.empty(0), torch.empty(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    assert live_matmul.live_dx(g, none, offsets, 4, torch.ones(3, 2), torch.empty(0, 2), 0).shape == (0, 2)
    live_matmul.live_dw_(g, none, offsets, 4, torch.empty(0, 2), torch.zeros(3, 2))


def test_columns_of_the_same_sets_share_tiles():
    """Columns of 8 sets, 64 of each, mixed: tiles of 32 by membership hold one set each, in their own order all."""
    live = torch.arange(8)[:, None] == torch.arange(512)[None, :] % 8
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), live.sum(1).cumsum(0)])
    places, order, active = live_matmul._tiles(live.nonzero()[:, 1], offsets, 512, 32)
    assert order.sort().values.equal(torch.arange(512)) and active.sum() == 16
    k, at = (places >= 0).nonzero(as_tuple=True)
    assert torch.equal(live.nonzero()[:, 1].view(8, 64)[k, places[k, at].long()], order[at])


@pytest.mark.parametrize("rows, tile", [(1, 16), (16, 16), (17, 32), (128, 128), (4096, 128)])
def test_tiles_fit_sets(rows, tile):
    assert tuning.live_product(2, rows).rows == tile
