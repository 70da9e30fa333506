"""Building blocks of `loss_types`: options, pairs whose chosen response is known, scores of f-divergences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# Order in which `preference` takes its options, with the defaults of `LossOptions`.
OPTION_DEFAULTS: dict[str, float] = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "tau": 0.0,  # soft target q = sigmoid(|gap| / tau); 0 = hard
    "margin": 0.0,  # gamma of gamma * |gap|
    "tie_margin": 1e-6,
    "f_divergence": 0,  # index into F_DIVERGENCES
    "f_alpha": 0.5,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "alphapo_alpha": 0.25,
    "nll_alpha": 1.0,
    "modpo_weight": 1.0,
}
OPTIONS = tuple(OPTION_DEFAULTS)

# exp(80) is finite in float32: exponents of forward_kl, alpha_divergence and alphapo are clamped here, with gradient 0
# beyond.
MAX_EXPONENT = 80.0


@dataclass
class Pairs:
    """n non-tied pairs whose chosen and rejected responses are known. Every tensor is `[n]`."""

    chosen: Tensor  # L_w
    rejected: Tensor  # L_l
    chosen_ref: Tensor
    rejected_ref: Tensor
    beta: Tensor
    gap: Tensor  # |Delta R|; inf where there are no scores
    options: Mapping[str, float]
    chosen_length: Tensor | None = None  # tokens, at least 1
    rejected_length: Tensor | None = None
    chosen_margin: Tensor | float = 0.0  # MODPO's w_{-k} . m(y)
    rejected_margin: Tensor | float = 0.0
    nll_scale: Tensor | float | None = None  # number of pairs / number of chosen tokens

    def set_lengths(self, chosen: Tensor, rejected: Tensor, num_pairs: float) -> None:
        self.chosen_length, self.rejected_length = chosen.clamp(min=1), rejected.clamp(min=1)
        self.nll_scale = num_pairs / float(chosen.sum().clamp(min=1))

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.chosen_ref

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.rejected_ref

    @property
    def chosen_score(self) -> Tensor:
        return f_score(self.chosen_ratio, self.options["f_divergence"], self.options["f_alpha"])

    @property
    def rejected_score(self) -> Tensor:
        return f_score(self.rejected_ratio, self.options["f_divergence"], self.options["f_alpha"])

    @property
    def delta(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        if self.chosen_length is None or self.rejected_length is None:
            raise ValueError("this loss type divides by the number of tokens: give the lengths of the sequences")
        return chosen / self.chosen_length, rejected / self.rejected_length

    def nll(self) -> Tensor:
        if self.nll_scale is None:
            raise ValueError("the NLL term divides by the number of chosen tokens: give the lengths of the sequences")
        return -self.chosen * self.nll_scale

    def soft_logistic(self, u: Tensor) -> Tensor:
        """-q log sigmoid(v) - (1 - q) log sigmoid(-v) with v = u - margin |gap|.

        q = sigmoid(|gap| / tau), or 1 - label_smoothing without tau. The margin is ODPO's offset (Amini
        et al. 2024, arXiv 2402.10571); label smoothing is conservative DPO's (Mitchell 2023).
        """
        v = u - self.offset()
        tau = self.options["tau"]
        q = torch.sigmoid(self.gap / tau) if tau else 1 - self.options["label_smoothing"]
        return -q * F.logsigmoid(v) - (1 - q) * F.logsigmoid(-v)

    def offset(self) -> Tensor | float:
        margin = self.options["margin"]
        return margin * self.gap if margin else 0.0


def f_score(ratio: Tensor, f_divergence: float, alpha: float) -> Tensor:
    """f'(e^ratio) up to constants that cancel in a pair, ratio = log pi - log pi_ref.

    reverse_kl: ratio;  forward_kl: 1 - e^-ratio;  js_divergence: log 2 + log sigmoid(ratio);
    alpha_divergence: (e^((alpha - 1) ratio) - 1) / (alpha - 1), which is `ratio` at alpha = 1.
    f-DPO, Wang et al. 2023 (arXiv 2309.16240).
    """
    name = F_DIVERGENCES[int(f_divergence)]
    if name == "forward_kl":
        return -torch.expm1((-ratio).clamp(max=MAX_EXPONENT))
    if name == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if name == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * ratio).clamp(max=MAX_EXPONENT)) / (alpha - 1)
    return ratio
