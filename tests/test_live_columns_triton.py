"""live_columns, live_grads and the products with live columns through the cases of `cpo-kernels check`: the CPU's
kernels, and Triton's in its interpreter."""

import pytest
import torch

from cpo_kernels import kernels
from cpo_kernels.backends import dispatch
from cpo_kernels.check.compare import Backend
from cpo_kernels.check.live import live_cases
from cpo_kernels.check.run import run_case
from cpo_kernels.kernels import live_matmul, tuning

needs_cpu = pytest.mark.skipif(bool(dispatch.missing("cpu")), reason="the C++ extension is not built")
CASES = {case.name: case for case in live_cases()}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["triton", pytest.param("cpu", marks=needs_cpu)])
def test_check_cases(backend, name):
    result = run_case(Backend(backend, torch.device("cpu")), CASES[name])
    skipped = CASES[name].group != "live" and (backend == "cpu" or "bfloat16" in name)
    assert result["status"] == ("skipped" if skipped else "passed"), result["wrong"][:3] or result["reason"]


def test_every_backend_offers_them():
    assert dispatch.kernels("triton", torch.empty(0)).live_grads is kernels.live_grads
    for backend in ("reference", "triton", "cpu"):
        offered = dispatch.kernels(backend, torch.empty(0))
        assert callable(offered.live_columns) and callable(offered.live_grads)


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
