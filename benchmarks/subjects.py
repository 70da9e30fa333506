"""What is timed: forward and backward of a preference loss through the head, by us, naive PyTorch and the peers.

Each subject takes a workload and returns a function that runs one step and returns (loss, dX, dW or None).
`products` is the floor: the bare matrix products on the labelled rows, without any loss.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import cpo_kernels as cpo

Step = Callable[[], tuple[Tensor, Tensor, Tensor | None]]
BETA = 0.1


@dataclass(frozen=True)
class Shape:
    """A head and a batch: `pairs` pairs of `length` tokens of which `prompt` are the prompt."""

    hidden: int
    vocab: int
    pairs: int
    length: int
    prompt: int

    @property
    def labelled(self) -> int:
        return 2 * self.pairs * (self.length - self.prompt)


HEADS = {"qwen2.5-0.5b": (896, 151936), "smollm2-135m": (576, 49152)}


@dataclass
class Workload:
    shape: Shape
    dtype: torch.dtype
    frozen: bool
    hidden: Tensor = field(init=False)  # [S, T, H]
    weight: Tensor = field(init=False)  # [V, H]
    labels: Tensor = field(init=False)  # [S, T]
    ref_logps: Tensor = field(init=False)  # [S]

    def __post_init__(self) -> None:
        g, s = torch.Generator().manual_seed(0), self.shape
        rows = 2 * s.pairs
        self.hidden = torch.randn(rows, s.length, s.hidden, generator=g).to(self.dtype).requires_grad_()
        weight = torch.randn(s.vocab, s.hidden, generator=g).mul_(s.hidden**-0.5).to(self.dtype)
        self.weight = weight.requires_grad_(not self.frozen)
        self.labels = torch.randint(s.vocab, (rows, s.length), generator=g)
        self.labels[:, : s.prompt] = -100
        self.ref_logps = torch.full((rows,), -11.0 * (s.length - s.prompt))

    def finish(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Backward, and the gradients taken off the leaves."""
        loss.backward()
        result = loss.detach(), self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        return result

    def dpo(self, token_logps: Tensor) -> Tensor:
        """-mean log sigmoid(beta d) from token log-probs [S, T] in float32."""
        d = token_logps.float().sum(1) - self.ref_logps
        chosen, rejected = d.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def products(w: Workload) -> Step:
    """Z = X W^T, dX = G W and, with a trainable head, dW = G^T X on the labelled rows."""
    x = w.hidden.detach()[w.labels != -100]
    weight = w.weight.detach()

    def step():
        g = x @ weight.t()
        return g.new_zeros(()), g @ weight, None if w.frozen else g.t() @ x

    return step


def ours(w: Workload) -> Step:
    loss_fn = cpo.FusedLinearCPOLoss(beta=BETA)
    return lambda: w.finish(loss_fn(w.hidden, w.weight, w.labels, ref_logps=w.ref_logps).loss)


def gathered(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)


def naive(w: Workload) -> Step:
    """Logits of every position, log_softmax in their dtype, gather, mask: the lightest form that users write."""
    return lambda: w.finish(w.dpo(gathered(w.hidden @ w.weight.t(), w.labels) * (w.labels != -100)))


def naive_unmasked(w: Workload) -> Step:
    """The same on the labelled rows alone."""
    keep = w.labels != -100

    def step():
        logps = gathered(w.hidden[keep] @ w.weight.t(), w.labels[keep])
        return w.finish(w.dpo(logps.view(w.labels.shape[0], -1)))

    return step


def cce(w: Workload) -> Step:
    """Cut Cross Entropy, impl="torch_compile": the form that runs on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    def step():
        nll = linear_cross_entropy(w.hidden, w.weight, w.labels, reduction="none", impl="torch_compile")
        return w.finish(w.dpo(-nll))

    return step


def liger(w: Workload) -> Step:
    """Liger's fused linear DPO, compiled; it takes reference hidden states only, so it runs without a reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    return lambda: w.finish(loss_fn(w.weight, w.hidden, w.labels)[0])


def trl(w: Workload) -> Step:
    """TRL's chunked head on every position, as its DPOTrainer runs it."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def step():
        hidden = w.hidden.view(-1, w.hidden.shape[-1])
        targets = w.labels.clamp(min=0).view(-1)
        logps = ChunkedLogProbFunction.apply(hidden, w.weight, None, targets, 1.0, 8192, None, 1.0, ())[0]
        return w.finish(w.dpo(logps.view(w.labels.shape) * (w.labels != -100)))

    return step


SUBJECTS: dict[str, Callable[[Workload], Step]] = {
    "products": products,
    "ours": ours,
    "naive": naive,
    "naive_unmasked": naive_unmasked,
    "cce": cce,
    "liger": liger,
    "trl": trl,
}
PEER_PACKAGES = {"cce": "cut-cross-entropy", "liger": "liger-kernel", "trl": "trl"}


def why_missing(name: str) -> str:
    """Why a subject cannot run here; '' when it can."""
    package = PEER_PACKAGES.get(name)
    try:
        return importlib.metadata.version(package) and "" if package else ""
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
