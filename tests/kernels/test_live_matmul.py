"""Triton's products with live columns: what the cases of `cpo-kernels check` do not see."""

import pytest
import torch

from cpo_kernels.kernels import live_matmul, tuning


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
