"""What every case of `cpo-kernels check` uses: backends, tolerances, and the comparison with the oracle."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.backends import dispatch
from cpo_kernels.check import limits

GPU_BACKENDS = ("triton", "cuda")


class Skip(Exception):
    """A case that cannot run here; its text says what it needs."""


@dataclass
class Backend:
    """A backend on a device."""

    name: str
    device: torch.device

    @property
    def kernels(self) -> Any:
        return dispatch.kernels(self.name, torch.empty(0, device=self.device))

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def truncates(self) -> bool:
        """Triton's interpreter rounds float32 to bfloat16 toward zero; GPUs round to nearest."""
        return self.name == "triton" and not self.on_gpu

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """The CPU backend splits a few long rows over its threads."""
        return (1, 3) if self.name == "cpu" else (torch.get_num_threads(),)

    def tolerance(self, dtype: torch.dtype) -> limits.Tolerance:
        bounds = (limits.TOKENS_ON_GPU if self.on_gpu else limits.TOKENS)[dtype]
        if self.truncates and dtype == torch.bfloat16:
            return bounds._replace(grad=2 * bounds.grad)
        return bounds


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Findings:
    """What one case measures: the worst error as a multiple of its tolerance, and everything that is wrong."""

    worst: float = 0.0
    where: str = ""
    wrong: list[str] = field(default_factory=list)

    def require(self, what: str, condition: Any) -> None:
        if not bool(condition):
            self.wrong.append(what)

    def same(self, what: str, actual: Tensor, expected: Tensor) -> None:
        """Equal bits; NaN equals NaN."""
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            self.wrong.append(f"{what}: {describe(actual)} instead of {describe(expected)}")
            return
        different = (actual != expected) & ~(actual.isnan() & expected.isnan())
        if bool(different.any()):
            self.wrong.append(f"{what}: {values_at(different, actual, expected)}")

    def close(self, what: str, actual: Tensor, expected: Tensor, tolerance: float, floor: float | Tensor = 1.0) -> None:
        """|actual - expected| <= tolerance * (|expected| + floor) per element; NaN and infinities in the same place."""
        if actual.shape != expected.shape:
            self.wrong.append(f"{what}: shape {list(actual.shape)} instead of {list(expected.shape)}")
            return
        actual, expected = actual.detach().double(), expected.detach().double()
        odd = (actual.isnan() != expected.isnan()) | ((actual.isinf() | expected.isinf()) & (actual != expected))
        if bool(odd.any()):
            self.wrong.append(f"{what}: {values_at(odd, actual, expected)}")
            return
        error = (actual - expected).abs() / (expected.abs() + floor)
        error = torch.where(expected.isfinite(), error, 0.0)
        if not error.numel():
            return
        worst = float(error.max())
        detail = values_at(error == error.max(), actual, expected) if worst > tolerance else ""
        self.measured(what, worst, tolerance, detail)

    def refuses(self, what: str, call: Callable[[], Any], pattern: str) -> None:
        """`call` raises an error whose text matches."""
        try:
            call()
        except (RuntimeError, ValueError) as error:
            self.require(f"{what}: the error is {str(error)!r}, not {pattern!r}", re.search(pattern, str(error)))
        else:
            self.wrong.append(f"{what} was taken, instead of {pattern!r}")

    def measured(self, what: str, error: float, tolerance: float, detail: str = "") -> None:
        """An error that the case computed itself."""
        ratio = error / tolerance
        if not ratio <= self.worst:
            self.worst, self.where = ratio, what
        if not ratio <= 1:
            self.wrong.append(f"{what}: error {error:.2e} exceeds {tolerance:.1e}" + (f", {detail}" if detail else ""))


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def values_at(where: Tensor, actual: Tensor, expected: Tensor) -> str:
    """The first place where `where` holds, and what stands there."""
    index = tuple(where.nonzero()[0].tolist())
    more = int(where.sum()) - 1
    at = f"at {list(index)} " if index else ""
    return f"{at}got {float(actual[index]):.9g}, want {float(expected[index]):.9g}" + (
        f" ({more} more)" if more else ""
    )


@dataclass
class Case:
    """`name` is group/what; `run` fills a `Findings` or raises."""

    name: str
    run: Callable[[Backend, Findings], None]
    quick: bool = False

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def relative_error(actual: Tensor, truth: Tensor, norm: float = float("inf")) -> float:
    """|actual - truth| over |truth| in a vector norm (by default the largest element), in float64; inf for NaN."""
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double(), truth.detach().double()
    error = torch.linalg.vector_norm(actual - truth, norm) / torch.linalg.vector_norm(truth, norm).clamp(min=1e-300)
    return float(error.nan_to_num(nan=float("inf")))


def need_memory(backend: Backend, size: int) -> None:
    """On a GPU skips where `size` bytes are not free; on a CPU where so much would really be touched."""
    gib = size / 2**30
    if backend.on_gpu:
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(backend.device)[0] < size:
            raise Skip(f"needs {gib:.1f} GiB of free GPU memory")
    elif gib > 4.5:
        raise Skip(f"needs a GPU with {gib:.1f} GiB free")
