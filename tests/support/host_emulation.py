"""Builds programs from the CUDA kernel sources as plain C++ (tests/host_cuda), and runs them under the sanitizers."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import library
from cpo_kernels.check.compare import Backend

ROOT = Path(__file__).parents[2]
TOKENS, PREFERENCES = "tests/host_cuda/token_logps_ops.cpp", "tests/host_cuda/preference_ops.cpp"
COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17",
    "-DCPO_HOST_CUDA",
    "-Itests/host_cuda",
    "-pthread",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
)
# Fibers are switched by longjmp between stacks, which fortified C libraries refuse.
LIBRARY_FLAGS = ("-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE")


def compile_host(source: str, target: Path, *flags: str, root: Path = ROOT) -> Path:
    subprocess.run([COMPILER, *FLAGS, *flags, source, "-o", target], cwd=root, check=True)
    return target


def run_sanitized(source: str, target: Path, sanitizer: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """Builds a program of real threads with thread or address,undefined, and runs it. It runs for a second at any -O,
    and compiles for 7 (live_columns_main.cpp) without it, for 23 at -O1."""
    flags = ("-O0", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-DCPO_HOST_THREADS")
    program = compile_host(source, target, *flags, root=root)
    return subprocess.run([program], capture_output=True, text=True, timeout=300)


def broken_copy(folder: Path, file: str, there: str, instead: str) -> Path:
    """A copy of the sources in which csrc/cuda/<file> has `instead` for `there`."""
    for part in ("csrc", "tests/host_cuda"):
        shutil.copytree(ROOT / part, folder / part)
    changed = folder / "csrc" / "cuda" / file
    text = changed.read_text()
    assert there in text, f"{file} has no {there!r}"
    changed.write_text(text.replace(there, instead))
    return folder


def bites(source: str, folder: Path, sanitizer: str, file: str, there: str, instead: str) -> bool:
    """Whether the program of a broken copy fails under the sanitizer."""
    done = run_sanitized(source, folder / "main", sanitizer, root=broken_copy(folder, file, there, instead))
    return done.returncode != 0 and bool(re.search("ThreadSanitizer|AddressSanitizer|runtime error", done.stderr))


def address(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of token_logps_ops.cpp


class Machine(ctypes.Structure):
    """Threads of a block of the token kernels, multiprocessors, whether it has clusters, and the order of threads."""

    _fields_ = [(name, ctypes.c_int64) for name in ("block", "multiprocessors", "clusters", "seed")]


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "rows", "stride", "width", "columns", "ignore_index")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("logits", "labels", "anchors")),
    ]


class HostTokens:
    """The token ops of the host emulation, with the signatures of library.py."""

    def __init__(self, tokens: ctypes.CDLL, block: int, multiprocessors: int, clusters: int, seed: int = 0) -> None:
        self.tokens, self.machine = tokens, Machine(block, multiprocessors, clusters, seed)

    def call(self, logits, labels, anchors, ignore_index, scale, softcap, vocab_size):
        sizes = (*logits.shape[:1], logits.stride(0), logits.shape[1], vocab_size, ignore_index)
        kind = DTYPES.index(logits.dtype)
        return ctypes.byref(Call(kind, *sizes, scale, softcap, *map(address, (logits, labels, anchors))))

    def forward(self, logits, labels, head, extras, anchors, overwrite):
        labels, rows, acc = labels.contiguous(), logits.shape[0], library.acc_dtype(logits.dtype)
        outputs = [torch.empty(shape, dtype=acc) for shape in (rows, rows, (4, rows) if extras else 0)]
        if rows:
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in outputs]
            self.tokens.host_forward(
                ctypes.byref(self.machine), self.call(logits, labels, anchors, *head), overwrite, extras, *pointers
            )
        return tuple(outputs)

    def token_logps_fwd(self, logits, labels, ignore_index, scale, softcap, vocab_size, extras, anchors=None):
        return self.forward(logits, labels, (ignore_index, scale, softcap, vocab_size), extras, anchors, False)

    def token_logps_fused_(self, logits, labels, ignore_index, scale, softcap, vocab_size, extras, anchors=None):
        return self.forward(logits, labels, (ignore_index, scale, softcap, vocab_size), extras, anchors, True)

    def token_logps_bwd_(
        self, logits, labels, lse, grad, ignore_index, scale, softcap, vocab_size, anchors=None, entropies=None
    ):
        labels, lse, grad = labels.contiguous(), lse.contiguous(), grad.contiguous()
        if len(labels):
            pointers = [ctypes.c_void_p(address(t)) for t in (lse, grad, entropies)]
            call = self.call(logits, labels, anchors, ignore_index, scale, softcap, vocab_size)
            self.tokens.host_backward(ctypes.byref(self.machine), call, *pointers)


class HostPreference:
    """sequence_sum and preference of the host emulation, with the signatures of library.py."""

    def __init__(self, preferences: ctypes.CDLL, threads: int, seed: int = 0) -> None:
        self.preferences, self.threads = preferences, threads
        preferences.set_seed(ctypes.c_uint64(seed))

    def sequence_sum(self, token_logps, cu_seqlens, token_weights, average):
        tensors = [t.contiguous() for t in (token_logps, cu_seqlens, token_weights)]
        pointers = [ctypes.c_void_p(address(t)) for t in tensors]
        out = token_logps.new_empty(cu_seqlens.shape[0] - 1)
        sizes = [ctypes.c_int64(n) for n in (token_logps.shape[0], out.shape[0])]
        is_double = ctypes.c_bool(token_logps.dtype == torch.float64)
        self.preferences.sequence_sum(
            is_double, *pointers, ctypes.c_bool(average), *sizes, ctypes.c_void_p(out.data_ptr())
        )
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
        self.preferences.preference(
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


class HostKernels(HostTokens, HostPreference):
    """All five. Blocks of preference have 64 threads beside token kernels of 64, else the 256 of a GPU."""

    def __init__(
        self, tokens: ctypes.CDLL, preferences: ctypes.CDLL, block: int, multiprocessors: int, clusters: int, seed: int
    ) -> None:
        HostTokens.__init__(self, tokens, block, multiprocessors, clusters, seed)
        HostPreference.__init__(self, preferences, 64 if block == 64 else 256, seed)


class HostBackend(Backend):
    """A backend of `cpo-kernels check` with the kernels of the host emulation: a GPU's rules on CPU tensors."""

    def __init__(self, kernels: Any) -> None:
        super().__init__("cuda", torch.device("cpu"))
        self._kernels = kernels

    @property
    def kernels(self) -> Any:
        return self._kernels
