"""Ten thousand steps without growth, and threads that call the losses at once."""

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch

import cpo_kernels as cpo
from tests.support.heads import make_batch

OBJECTIVES = [cpo.Objective("helpfulness", 1, 5), cpo.Objective("honesty", 1, 5)]
PAGES = Path("/proc/self/statm")


def held():
    """(Python objects, bytes of memory) of this process."""
    gc.collect()
    objects = len(gc.get_objects())  # a list of megabytes: first
    return objects, int(PAGES.read_text().split()[1]) * 4096


def step(batch, loss_fn):
    """A training step's calls: the fused loss, the supervised one, and one from log-probs with a frozen head."""
    scores = torch.tensor([[1.0, 2.0], [5.0, 4.0]])
    out = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=batch.ref_logps, scores=scores)
    logps = cpo.linear_token_logps(batch.hidden, batch.weight.detach(), batch.labels)
    total = out.loss + cpo.linear_nll(batch.hidden, batch.weight, batch.labels) + logps.sum() * 0.1
    return torch.autograd.grad(total, batch.leaves)


@pytest.mark.skipif(not PAGES.exists(), reason="needs /proc")
def test_ten_thousand_steps_do_not_grow():
    """100 bytes kept by each step would be 900 kB."""
    batch = make_batch(2, 4, 4, 7, torch.float32)
    loss_fn = cpo.FusedLinearCPOLoss(OBJECTIVES, memory_budget=5 * 7 * 4)  # two_pass
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(1000):
            step(batch, loss_fn)
        objects, memory = held()
        for _ in range(9000):
            step(batch, loss_fn)
    finally:
        torch.set_num_threads(threads)
    more_objects, more_memory = held()
    assert more_objects - objects < 100
    assert more_memory - memory < 500_000


def test_threads_share_a_loss_and_a_weight():
    """Each thread its own batch, all at once: the bits of a single thread."""
    loss_fn = cpo.FusedLinearCPOLoss(OBJECTIVES, memory_budget=40 * 101 * 4)
    batches = [make_batch(2, 30, 24, 101, torch.float32, seed=seed) for seed in range(8)]
    for batch in batches[1:]:
        batch.weight = batches[0].weight
    want = [step(batch, loss_fn) for batch in batches]
    seen, failed = {}, []
    start = threading.Barrier(len(batches))

    def work(k):
        try:
            start.wait()
            for turn in range(20):
                seen[k, turn] = step(batches[k], loss_fn)
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [threading.Thread(target=work, args=(k,)) for k in range(len(batches))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and len(seen) == 20 * len(batches)
    for (k, _), grads in seen.items():
        assert all(torch.equal(g, w) for g, w in zip(grads, want[k], strict=True))
