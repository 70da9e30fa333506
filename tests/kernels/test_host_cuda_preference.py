"""The CUDA kernels of sequence_sum and preference on the CPU (tests/host_cuda): parity with the float64 oracle through
the cases of `cpo-kernels check` and of test_kernels.py, and a program under the sanitizers.
"""

import ctypes

import pytest
import torch

from cpo_kernels import reference
from cpo_kernels.check.preference import preference_cases
from cpo_kernels.check.run import run_case
from tests.kernels import test_kernels
from tests.support.host_emulation import COMPILER, LIBRARY_FLAGS, HostBackend, compile_host

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def address(tensor):
    return tensor.data_ptr() if tensor.numel() else None


class HostKernels:
    """The two ops of the host emulation, with the signatures of library.py."""

    def __init__(self, library: ctypes.CDLL, threads: int, seed: int = 0):
        self.library, self.threads = library, threads
        library.set_seed(ctypes.c_uint64(seed))

    def sequence_sum(self, token_logps, cu_seqlens, token_weights, average):
        tensors = [t.contiguous() for t in (token_logps, cu_seqlens, token_weights)]
        pointers = [ctypes.c_void_p(address(t)) for t in tensors]
        out = token_logps.new_empty(cu_seqlens.shape[0] - 1)
        sizes = [ctypes.c_int64(n) for n in (token_logps.shape[0], out.shape[0])]
        is_double = ctypes.c_bool(token_logps.dtype == torch.float64)
        self.library.sequence_sum(is_double, *pointers, ctypes.c_bool(average), *sizes, ctypes.c_void_p(out.data_ptr()))
        return out

    def preference(
        self, seq_logps, ref_logps, lengths, pairs, scores, conditions, objectives, pair_weights, pair_betas, margins,
        loss_types, loss_weights, options, num_pairs, chosen_tokens,
    ):  # fmt: skip
        floats = (seq_logps, ref_logps, scores, conditions, objectives, pair_weights, pair_betas, margins)
        floats, lengths, pairs = [t.contiguous() for t in floats], lengths.contiguous(), pairs.contiguous()
        count, sequences = pairs.shape[0], seq_logps.shape[0]
        results = [seq_logps.new_empty(shape) for shape in ((), count, sequences, count, count, count)]
        order, counts = pairs.new_empty(count, dtype=torch.int8), pairs.new_empty(3)
        sizes = (count, sequences, scores.shape[1] if scores.dim() == 2 else 0, len(loss_types))
        orders = torch.full((12 * count,), 2**62)
        self.library.preference(
            self.threads,
            (ctypes.c_void_p * 8)(*map(address, floats)),
            (ctypes.c_bool * 8)(*(t.dtype == torch.float64 for t in floats)),
            ctypes.c_void_p(address(lengths)),
            ctypes.c_void_p(address(pairs)),
            (ctypes.c_int64 * 4)(*sizes),
            (ctypes.c_int64 * len(loss_types))(*loss_types),
            (ctypes.c_double * len(loss_weights))(*loss_weights),
            (ctypes.c_double * len(options))(*options),
            ctypes.c_double(num_pairs),
            ctypes.c_double(chosen_tokens),
            (ctypes.c_void_p * 6)(*(t.data_ptr() for t in results)),
            ctypes.c_void_p(order.data_ptr()),
            ctypes.c_void_p(counts.data_ptr()),
            ctypes.c_void_p(address(orders)),
        )
        return *results, order, counts


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("host_cuda") / "preference_ops.so"
    return ctypes.CDLL(compile_host("tests/host_cuda/preference_ops.cpp", target, *LIBRARY_FLAGS))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES = {case.name: case for case in preference_cases()}


@pytest.mark.parametrize("name", CASES)
def test_check_cases(name, library):
    """The block size of the GPU."""
    result = run_case(HostBackend(HostKernels(library, 256, seed=len(name))), CASES[name])
    assert result["status"] == "passed", result["wrong"][:3] or result["reason"]


@pytest.mark.parametrize("threads", [64, 256])
def test_any_order_of_threads_gives_the_same_bits(library, threads):
    batch = large_batch(400, 150)
    runs = [HostKernels(library, threads, seed).preference(*batch.values()) for seed in range(4)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0, equal_nan=True)


def large_batch(pairs, sequences, **change):
    """Several tiles of pairs and blocks of sequences, the losses that couple the batch among them."""
    batch = test_kernels.make_batch(3, count=pairs, sequences=sequences, objectives=6)
    names = list(reference.LOSS_TYPES)
    losses = ["aot", "sigmoid", "aot_unpaired", "sft", "aot"]
    batch |= dict(loss_types=[names.index(n) for n in losses], loss_weights=[1.0, 0.5, 2.0, 0.1, 0.3])
    return {**test_kernels.without(batch, "pair_betas"), **change}


@pytest.mark.parametrize("threads", [64, 256])
@pytest.mark.parametrize("pairs, sequences", [(1, 7), (64, 33), (257, 100), (400, 5000)])
def test_several_tiles(library, monkeypatch, pairs, sequences, threads):
    """5000 sequences: 8 * 32 rows a block of 64 threads, 32 * 32 of 256."""
    kernels = HostKernels(library, threads)
    monkeypatch.setattr(test_kernels, "kernels", lambda: kernels)
    batch = large_batch(max(pairs, 3), sequences)
    batch = {k: v[:pairs] if isinstance(v, torch.Tensor) and k in PER_PAIR else v for k, v in batch.items()}
    test_kernels.check_preference(batch)
    test_kernels.check_preference({**batch, "pairs": batch["pairs"].flip(1), "num_pairs": 11.0, "chosen_tokens": 3.0})


PER_PAIR = ("pairs", "conditions", "pair_weights")


@pytest.mark.parametrize("name", ["no_pairs", "ties_give_nothing", "far_from_the_reference"])
def test_cases_of_test_kernels(library, monkeypatch, name):
    kernels = HostKernels(library, 64)
    monkeypatch.setattr(test_kernels, "kernels", lambda: kernels)
    test = getattr(test_kernels, f"test_{name}")
    for spread in (1.0, 60.0, 1000.0) if name.startswith("far") else (None,):
        test() if spread is None else test(spread)


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs an x86 fma")
def test_objectives_that_cancel_leave_a_tie_without_a_margin(tmp_path):
    """Gains of w x and -w x add up to exactly 0 under a compiler that makes fmas of products and sums, as nvcc does."""
    flags = (*LIBRARY_FLAGS, "-mfma", "-ffp-contract=fast")
    library = ctypes.CDLL(compile_host("tests/host_cuda/preference_ops.cpp", tmp_path / "fma.so", *flags))
    batch = test_kernels.with_options(test_kernels.make_batch(5, objectives=2, sequences=40, count=20), tie_margin=0.0)
    scores = torch.rand(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch["scores"] = torch.cat([scores, scores.flip(1)])
    batch["pairs"] = torch.stack([torch.arange(20), torch.arange(20, 40)], 1)
    batch["conditions"] = torch.full((20, 2), 0.3, dtype=torch.float64)
    batch["objectives"] = torch.tensor([[0.9, 0.9], [1.3, 1.3]], dtype=torch.float64)
    assert HostKernels(library, 64).preference(*batch.values())[7].tolist() == [0, 20, 0]


def test_sequences_that_do_not_exist_give_nan(library):
    batch = test_kernels.without(test_kernels.make_batch(6), "lengths")
    clean = HostKernels(library, 64).preference(*batch.values())
    batch["pairs"] = batch["pairs"].clone()
    batch["pairs"][4] = torch.tensor([5, 7])
    batch["pairs"][7] = torch.tensor([-1, 6])
    batch["pairs"][9] = torch.tensor([2**62, -(2**63)])
    for name in ("sigmoid", "aot", "aot_unpaired"):
        types = [list(reference.LOSS_TYPES).index(name)]
        loss, losses, grad, *metrics, order, counts = HostKernels(library, 64).preference(
            *{**batch, "loss_types": types}.values()
        )
        assert loss.isnan() and order[[4, 7, 9]].tolist() == [1, 1, 1] and counts[0] >= 3
        if name != "aot_unpaired":  # whose two sides come from different pairs
            assert losses[[4, 7, 9]].isnan().all() and grad[[5, 6]].isnan().all()
        if name == "sigmoid":
            others = [p for p in range(11) if p not in (4, 7, 9)]
            for after, before in zip((losses, *metrics, order), clean[1:2] + clean[3:7], strict=True):
                torch.testing.assert_close(after[others], before[others], rtol=0, atol=0, equal_nan=True)


def test_offsets_outside_the_tokens_give_nan(library):
    kernels, logps = HostKernels(library, 256), torch.randn(10)
    cu = torch.tensor([-1, 3, 2, 7, 11, 2**62, 10])
    got = kernels.sequence_sum(logps, cu, torch.empty(0), False)
    assert got.isnan().tolist() == [True, True, False, True, True, True]
    torch.testing.assert_close(got[2], logps[2:7].sum())
