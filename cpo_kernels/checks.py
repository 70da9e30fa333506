"""The types of what the public functions take; one message for each kind."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KINDS: dict[str, Any] = {"a tensor": Tensor, "a number": numbers.Real, "an integer": numbers.Integral}


def check_types(kind: str, optional: bool = False, **values: Any) -> None:
    """TypeError for a value that is not `kind` (None passes where `optional`), and for a sparse tensor."""
    for name, value in values.items():
        if optional and value is None:
            continue
        if not isinstance(value, KINDS[kind]):
            raise TypeError(f"{name} must be {kind}, got {type(value).__name__} {value!r:.60}")
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {value.layout}: use {name}.to_dense()")


def check_list(name: str, values: Any, kind: Any, of: str) -> None:
    """TypeError where `values` is not a list or tuple of `kind`, which the message calls `of`."""
    if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
        raise TypeError(f"{name} must be a list of {of}, got {values!r:.80}")
