"""The backends of the kernels: `reference` (plain PyTorch, any device), `cpu` (C++), `triton` and `cuda` (C++).

Does not import Triton; imports the CUDA extension on its first use.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from cpo_kernels import library, reference
from cpo_kernels.extras import install_line
from cpo_kernels.library import Kernels

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
# Ops for which `auto` prefers another backend to Triton on a GPU, by compute capability. Predicted from the machine
# code, not measured: on Hopper, fused_ with V = 128,256 runs at 88 to 92% of the copy rate in CUDA C++, where the
# blocks of a cluster hold the row in registers between its two sweeps, and at 70 to 88% in Triton, whose second sweep
# reads the L2 cache. The other ops reach 88 to 97% in both.
PREFERRED = {("token_logps_fused_", (9, 0)): "cuda"}

MAPPED_BYTES = 32 << 20  # from which glibc maps every block on its own, and pages of 2 MB are asked for (common.h)
LEAST_BLOCK = 8 << 20  # bytes for which a block of its own is worth the system call


def _load_extension(name: str) -> str:
    """Import a compiled extension: '' on success, else the error."""
    try:
        importlib.import_module(f"cpo_kernels.{name}")
    except ImportError as error:
        return str(error)
    return ""


def _why_missing() -> dict[str, str]:
    """Why a backend cannot be used here; '' when it can. Triton is not imported yet; _C_cuda loads on first use."""
    has_triton = importlib.util.find_spec("triton") is not None
    no_cuda = "this installation has no CUDA C++ extension: build it with nvcc and a torch that has CUDA"
    return {
        "reference": "",
        "cpu": _load_extension("_C"),
        "triton": "" if has_triton else f"the triton package is not installed: {install_line('triton')}",
        "cuda": "" if importlib.util.find_spec("cpo_kernels._C_cuda") else no_cuda,
    }


_MISSING = _why_missing()
if _MISSING["cpu"]:
    warnings.warn(
        f"cpo_kernels runs on its slow PyTorch reference: the C++ extension could not be loaded ({_MISSING['cpu']}). "
        "Reinstall it from its source folder, with a C++ compiler available: "
        "pip install --no-build-isolation --no-deps --force-reinstall .",
        RuntimeWarning,
        stacklevel=2,
    )
if (torch.version.cuda or torch.version.hip) and _MISSING["triton"] and _MISSING["cuda"]:
    warnings.warn(
        f"cpo_kernels runs on its slow PyTorch reference on a GPU: {_MISSING['triton']}", RuntimeWarning, stacklevel=2
    )


def missing(impl: str) -> str:
    """Why a backend cannot be used here; '' when it can."""
    return _MISSING[impl]


def triton_interpreted() -> bool:
    """Whether Triton kernels run interpreted, on CPU tensors; Triton reads this when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_impl(impl: str) -> None:
    """Raise if `impl` is not a backend, or one that is not available: a backend requested by name never falls back."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl != "auto" and missing(impl):
        raise RuntimeError(f"impl={impl!r} is not available: {missing(impl)}. Use impl='auto'")


def _auto_impl(device: torch.device) -> str:
    if device.type == "cpu":
        return "reference" if missing("cpu") else "cpu"
    for backend in ("triton", "cuda"):
        if device.type == "cuda" and not missing(backend):
            return backend
    return "reference"


def resolve_impl(impl: str, device: torch.device) -> str:
    """The backend that `impl` names for tensors on `device`.

    auto: `cpu` for CPU tensors, `triton` (or `cuda`, if Triton is missing) for GPU tensors, else `reference`. On a GPU
    individual ops may come from another backend: `PREFERRED`.
    """
    check_impl(impl)
    if impl == "auto":
        return _auto_impl(device)
    wanted = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(impl, device.type)
    if device.type != wanted and not (impl == "triton" and device.type == "cpu" and triton_interpreted()):
        kind = "CPU tensors" if wanted == "cpu" else "GPU tensors (CPU tensors only under TRITON_INTERPRET=1)"
        kind = "GPU tensors" if impl == "cuda" else kind
        raise ValueError(f"impl={impl!r} takes {kind}, got a tensor on {device}. Use impl='auto'")
    return impl


def kernels(impl: str, tensor: Tensor) -> Kernels:
    """The kernels of the backend that `impl` names for this tensor."""
    backend = resolve_impl(impl, tensor.device)
    if impl == "auto" and backend == "triton" and not missing("cuda"):
        return _preferred_kernels(torch.cuda.get_device_capability(tensor.device))
    return _kernels_of(backend)


def own_matmuls(kernels: Kernels, weight: Tensor) -> Any:
    """The matmuls of the CPU kernels for a weight like this, `library.CPU_SCHEMAS`, or None.

    They take bfloat16 with unit stride over the hidden size, on processors with instructions for it (AVX512_BF16, and
    AMX where the processor has it).
    """
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.stride(-1) == 1
    return kernels if fits and hasattr(kernels, "logits_") and cpu_multiplies_bf16() else None


def unstored_logps(kernels: Kernels, weight: Tensor, softcap: float) -> Any:
    """The CPU kernels if they have `linear_token_logps_fwd` for a weight like this, or None: with AMX, for an even
    hidden size and no softcap."""
    own = own_matmuls(kernels, weight) if softcap == 0 and weight.shape[1] % 2 == 0 else None
    return own if own and hasattr(own, "linear_token_logps_fwd") and cpu_has_tiles() else None


def _constant_when_traced(function: Callable[[], bool]) -> Callable[[], bool]:
    """torch.compiler.assume_constant_result, without its import of torch._dynamo, which takes 1.4 s (torch 2.13)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_traced  # torch.compile cannot trace the import
def cpu_multiplies_bf16() -> bool:
    """Whether the CPU kernels' own matmuls are worth calling here."""
    return _extension_says("has_bf16_matmuls")


@_constant_when_traced
def cpu_has_tiles() -> bool:
    """Whether those matmuls multiply tiles, with AMX: then add_product_ is worth calling for sums in bfloat16 too, and
    there is `linear_token_logps_fwd`."""
    return _extension_says("has_tiles")


@cache
def _extension_says(question: str) -> bool:
    return not missing("cpu") and bool(getattr(importlib.import_module("cpo_kernels._C"), question)())


def lists_live_columns(kernels: Kernels, logits: Tensor) -> bool:
    """Whether they have `list_live_columns` and `live_grads_` for logits like these: `torch.ops` has names for them on
    every device."""
    return logits.device.type == "cpu" and hasattr(kernels, "list_live_columns")


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and not yet written; if its storage is large and on a CPU, the system is asked for pages
    of 2 MB."""
    if tensor.device.type == "cpu" and not missing("cpu") and tensor.numel():
        extension = importlib.import_module("cpo_kernels._C")
        bytes_of_block = tensor.untyped_storage().nbytes()
        extension.prefer_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size(), bytes_of_block)
    return tensor


def new_block(like: Tensor, rows: int, width: int) -> Tensor:
    """[rows, width], not written, of a block that is returned to the system when it is freed. On a CPU, glibc maps only
    large blocks on their own: a smaller one is made so large, and what is beyond the rows is never written.

    From the heap, a chunk of 24 MiB would leave its memory there, where what is allocated next often does not fit:
    3,202 x 576 x 49,152, frozen and filtered, needed 75 to 80 MiB in place of 66. But a block is new to every call,
    and its first writing takes 3 ms in pages of 2 MB and up to 15 in others (24 MiB, two cores).
    """
    row_bytes, fills = width * like.element_size(), torch.are_deterministic_algorithms_enabled()  # all that is new
    if like.device.type != "cpu" or fills or not LEAST_BLOCK <= rows * row_bytes < MAPPED_BYTES:
        return prefer_huge_pages(like.new_empty(rows, width))
    return prefer_huge_pages(like.new_empty(-(-MAPPED_BYTES // row_bytes), width)[:rows])


@cache
def _preferred_kernels(capability: tuple[int, int]) -> Kernels:
    """Triton's kernels, except those in PREFERRED if the CUDA extension can be loaded."""
    if _load_extension("_C_cuda"):
        return _kernels_of("triton")
    chosen = {op: PREFERRED.get((op, capability), "triton") for op in library.SCHEMAS}
    return cast(Kernels, SimpleNamespace(**{op: getattr(_kernels_of(b), op) for op, b in chosen.items()}))


def _kernels_of(backend: str) -> Kernels:
    if backend == "triton":
        from cpo_kernels import kernels as triton_kernels

        return triton_kernels
    if backend == "cuda" and (reason := _load_extension("_C_cuda")):
        raise RuntimeError(f"impl='cuda': the CUDA extension could not be loaded: {reason}")
    if backend == "reference":
        return reference
    compiled: Kernels = torch.ops.cpo_kernels  # the extensions register their kernels here when loaded
    return compiled
