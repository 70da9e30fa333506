"""Workloads of the head by name: sizes, and where the rows come from."""

from dataclasses import dataclass
from typing import Any

import torch

from cpo_kernels.bench.training_step import TrainingStep

# name -> hidden size, vocabulary, cap of the logits
HEADS = {
    "smollm2-135m": (576, 49152, None),
    "qwen2.5-0.5b": (896, 151936, None),
    "qwen2.5-7b": (3584, 152064, None),
    "gemma-2-9b": (3584, 256000, 30.0),
    "llama-3-8b": (4096, 128256, None),
}
MODES = ("trainable", "frozen", "forward")


@dataclass(frozen=True)
class Head:
    """`groups` prompts with `responses` each, all pairs of a group; `prompt` of the `length` tokens are the prompt.

    mode: head `trainable`, `frozen` (LoRA: only hidden states need a gradient) or `forward` (no gradient).
    rows: `random`; `peaked`, with the live columns of a trained model; or `real`, of `model` on the pairs of `data`, as
        in `TrainingStep`: responses as they come, cut where prompt and response exceed `length`.
    reference: its log-probs are `given`, or `computed` in the step from its hidden states: with its own head if the
        head is trained, else with the same one.
    """

    head: str
    hidden: int
    vocab: int
    softcap: float | None = None
    groups: int = 4
    responses: int = 2
    length: int = 128
    prompt: int = 64
    dtype: str = "bfloat16"
    mode: str = "trainable"
    reference: str = "given"
    rows: str = "random"
    model: str = ""
    data: str = ""

    @property
    def sequences(self) -> int:
        return self.groups * self.responses

    @property
    def pairs(self) -> int:
        return self.groups * self.responses * (self.responses - 1) // 2

    @property
    def labelled(self) -> int:
        if self.rows == "real":
            return self.text.completion_tokens
        return self.sequences * (self.length - self.prompt)

    @property
    def largest_group(self) -> int:
        """Labelled tokens of one prompt's responses, at most."""
        if self.rows == "real":
            return self.text.largest_group
        return self.responses * (self.length - self.prompt)

    @property
    def text(self) -> TrainingStep:
        """The pairs of real rows."""
        return TrainingStep(self.model, self.groups, 2, self.length, self.prompt, "float32", self.data)

    @property
    def products(self) -> int:
        """Matrix products of labelled x hidden x vocab that cannot be avoided."""
        return {"trainable": 3, "frozen": 2, "forward": 1}[self.mode] + (self.reference == "computed")

    @property
    def gradient_bytes(self) -> int:
        """dX on every position, and dW."""
        size: int = getattr(torch, self.dtype).itemsize
        dx = 0 if self.mode == "forward" else self.sequences * self.length * self.hidden
        return size * (dx + (self.vocab * self.hidden if self.mode == "trainable" else 0))


def head(name: str, **keys: Any) -> Head:
    hidden, vocab, softcap = HEADS[name]
    return Head(name, hidden, vocab, softcap, **keys)
