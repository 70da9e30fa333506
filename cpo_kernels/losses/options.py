"""Options of the preference losses; `LOSS_TYPES` lists which of them each loss type honours."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from cpo_kernels.checks import check_list, check_types
from cpo_kernels.objectives import Objective, objectives_tensor
from cpo_kernels.reference.loss_types import LOSS_TYPES
from cpo_kernels.reference.terms import F_DIVERGENCES, OPTIONS


@dataclass(frozen=True)
class LossOptions:
    """Options of the preference losses. A combination that a loss type would ignore raises ValueError.

    So does a number out of range. A wrong type raises TypeError, and in the classes and functions that take these as
    keywords any other name.

    Args:
        objectives: the objectives that `scores` rate; needed with scores.
        beta: inverse temperature; tau of IPO.
        loss_type: a name of `LOSS_TYPES`, or several, weighted by `loss_weights` (1 each by default).
        label_smoothing: probability that a label is flipped (conservative DPO; robust, exo_pair, aot).
        tau: soft targets q = sigmoid(|dR| / tau); None for hard targets.
        margin: gamma of the margin gamma * |dR| (ODPO).
        tie_margin: pairs with |dR| <= tie_margin are ties: no loss, no gradient, counted.
        f_divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence with coefficient f_alpha.
        discopop_tau, simpo_gamma, alphapo_alpha: the constants of those types; simpo_gamma is also alphapo's margin.
        nll_alpha: weight of the NLL of the chosen response in orpo and contrastive_cpo.
        modpo_weight: w of MODPO, the divisor of its logit.
        ld_alpha: weight of the tokens past the pair's shorter length (LD-DPO); None for 1. Needs disjoint pairs.
        use_weighting: WPO weights, the product of both responses' mean aligned probabilities.
    """

    objectives: tuple[Objective, ...] | None = None
    beta: float = 0.1
    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    tau: float | None = None
    margin: float = 0.0
    tie_margin: float = 1e-6
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    nll_alpha: float = 1.0
    modpo_weight: float = 1.0
    ld_alpha: float | None = None
    use_weighting: bool = False

    def __post_init__(self) -> None:
        types = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        check_list("loss_type", types, str, "names of LOSS_TYPES")
        types = tuple(types)
        object.__setattr__(self, "loss_type", types)
        check_types("a number", **{f.name: getattr(self, f.name) for f in fields(self) if isinstance(f.default, float)})
        check_types("a number", optional=True, tau=self.tau, ld_alpha=self.ld_alpha)
        if not isinstance(self.use_weighting, bool):
            raise TypeError(f"use_weighting must be True or False, got {self.use_weighting!r}")
        if self.objectives is not None:
            objectives_tensor(self.objectives)  # Objectives, whose names differ
        check_list("loss_weights", () if self.loss_weights is None else self.loss_weights, (int, float), "numbers")
        weights = (1.0,) * len(types) if self.loss_weights is None else tuple(map(float, self.loss_weights))
        object.__setattr__(self, "loss_weights", weights)
        if self.objectives is not None:
            object.__setattr__(self, "objectives", tuple(self.objectives))
            if not self.objectives:
                raise ValueError("objectives is empty: omit it for pairs without ratings")
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Real)}
        for name, number in [*numbers.items(), *(("loss_weights", weight) for weight in weights)]:
            if not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {number}")
        if len(weights) != len(types):
            raise ValueError(f"loss_weights {weights} must have one number per loss type {types}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        for name in ("tau", "modpo_weight", "discopop_tau"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.tie_margin < 0 or self.margin < 0:
            raise ValueError(f"tie_margin and margin must be >= 0, got {self.tie_margin} and {self.margin}")
        if self.f_divergence not in F_DIVERGENCES:
            raise ValueError(f"f_divergence must be one of {', '.join(F_DIVERGENCES)}, got {self.f_divergence!r}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        defaults = {f.name: f.default for f in fields(self)}
        always = {"objectives", "beta", "loss_type", "loss_weights", "tie_margin"}
        given = {n for n in defaults if n not in always and getattr(self, n) != defaults[n]}
        if "f_alpha" in given:
            given.remove("f_alpha")
            if self.f_divergence != "alpha_divergence":
                raise ValueError(f"f_alpha only applies with f_divergence='alpha_divergence', got {self.f_alpha}")
        check_options(types, given, self.label_smoothing)

    @classmethod
    def of(cls, options: dict[str, Any]) -> "LossOptions":
        """Options by name; an unknown name raises TypeError with the nearest one."""
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; one of {', '.join(names)}"
                raise TypeError(f"unknown option {name!r}{hint}")
        return cls(**options)

    def shown(self) -> str:
        """Options that differ from the defaults, and always beta and loss type: for the repr of a loss."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name in ("beta", "loss_type")}
        kept |= {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        kept["loss_type"] = self.types[0] if len(self.types) == 1 else list(self.types)
        if len(self.types) == 1 and self.loss_weights == (1.0,):
            del kept["loss_weights"]
        if self.objectives:
            kept["objectives"] = [objective.name for objective in self.objectives]
        return ", ".join(f"{name}={value!r}" for name, value in kept.items())

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(self.loss_type)

    @property
    def needs_reference(self) -> bool:
        return any(LOSS_TYPES[t].needs_reference for t in self.types)

    @property
    def couples_pairs(self) -> bool:
        return any(LOSS_TYPES[t].couples_batch for t in self.types)

    @property
    def opposite(self) -> bool:
        """Whether dloss/dL_rejected = -dloss/dL_chosen for all log-probs."""
        return self.f_divergence == "reverse_kl" and all(LOSS_TYPES[t].opposite for t in self.types)

    @property
    def averages_tokens(self) -> bool:
        """Whether a term is a mean over the tokens of all chosen responses."""
        return not {"sft", "orpo", "contrastive_cpo"}.isdisjoint(self.types)

    def numbers(self) -> tuple[list[int], list[float], list[float]]:
        """(loss type ids, weights, options) as the kernels take them."""
        names = list(LOSS_TYPES)
        values = {name: getattr(self, name) for name in OPTIONS}
        values["f_divergence"] = F_DIVERGENCES.index(self.f_divergence)
        values["tau"] = self.tau or 0.0
        options = [float(values[name]) for name in OPTIONS]
        return [names.index(t) for t in self.types], list(self.loss_weights or ()), options


# Options that shape the preference term: every type of a list must honour them, `sft` (which has none)
# excepted.
_TERM_OPTIONS = frozenset({"tau", "margin", "f_divergence", "pair_betas"})
# Options that change the log-probs or the weight of a pair: every type of a list must honour them.
_PAIR_OPTIONS = frozenset({"pair_weights", "use_weighting", "ld_alpha"})


# Names of losses elsewhere, and what they are here.
OTHER_NAMES = {
    "dpo": "DPO is 'sigmoid'",
    "cpo": "Contrastive Preference Optimization is 'contrastive_cpo', Controllable is 'sigmoid' with objectives",
    "cdpo": "Controllable DPO is 'sigmoid' with objectives, conservative DPO is 'sigmoid' with label_smoothing",
    "rdpo": "robust DPO is 'robust'",
    "odpo": "ODPO is 'sigmoid' with margin",
    "wpo": "WPO is 'sigmoid' with use_weighting",
    "ld_dpo": "LD-DPO is 'sigmoid' with ld_alpha",
    "ln_dpo": "DPO on log-probs per token is 'sigmoid_norm'",
    "rpo": "DPO plus NLL is ['sigmoid', 'sft'] with loss_weights",
    "dpop": "DPO-Positive is not available; ['sigmoid', 'sft'] also keeps the chosen response likely",
    "slic": "SLiC is 'hinge'",
    "cpo_simpo": "CPO-SimPO is ['simpo', 'sft'] with loss_weights",
    "kto": "KTO takes single responses: cpo_kernels.FusedLinearKTOLoss, or cpo_kernels.kto_loss from log-probs; for "
    "pairs 'bco_pair' and 'apo_zero' are nearest",
    "nll": "the NLL of chosen responses is 'sft'; that of any labels is cpo_kernels.linear_nll",
}
ALSO = {
    "controllable_dpo": "cdpo",
    "robust_dpo": "rdpo",
    "dpo_norm": "ln_dpo",
    "dpo_positive": "dpop",
    "slic_hf": "slic",
}
ALSO |= {"cross_entropy": "nll", "cposimpo": "cpo_simpo", "controllable_cpo": "cpo"}


def loss_type_hint(name: str) -> str:
    """What an unknown `loss_type` probably means, as the beginning of a sentence; '' if nothing is near."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_").strip("_")
    stem = plain.removesuffix("_pair").removesuffix("_loss")
    for key in (plain, stem):
        if (key := ALSO.get(key, key)) in OTHER_NAMES:
            return f"{OTHER_NAMES[key]}; "
    near = [name for name in (plain, stem) if name in LOSS_TYPES][:1]
    near = near or [name for name in LOSS_TYPES if stem and name.startswith(stem)]
    near = near or difflib.get_close_matches(plain, LOSS_TYPES, 1)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def check_options(loss_types: Sequence[str], given: Iterable[str], label_smoothing: float = 0.0) -> None:
    """Raise ValueError for an option that `loss_types` would ignore, or that they need but did not get.

    given: names of the options that the caller does not leave "off". An option of a single type (simpo_gamma,
    nll_alpha, ...) and label_smoothing must be honoured by at least one type of the list, an option that affects every
    pair by all of them.
    """
    given = set(given)
    for name in loss_types:
        if name not in LOSS_TYPES:
            raise ValueError(f"unknown loss_type {name!r}; {loss_type_hint(name)}one of {', '.join(LOSS_TYPES)}")
    if not loss_types:
        raise ValueError("loss_type is an empty list")
    honoured = frozenset().union(*(loss.honours for loss in LOSS_TYPES.values()))
    for option in sorted(given):
        if option not in honoured:
            raise ValueError(f"unknown option {option!r}; one of {', '.join(sorted(honoured))}")
        deaf = [name for name in loss_types if option not in LOSS_TYPES[name].honours]
        if option in _TERM_OPTIONS and set(deaf) != set(loss_types):
            deaf = [name for name in deaf if name != "sft"]
        if deaf and (option in _TERM_OPTIONS | _PAIR_OPTIONS or len(deaf) == len(loss_types)):
            able = [name for name, loss in LOSS_TYPES.items() if option in loss.honours]
            raise ValueError(
                f"{option} does not apply to loss_type {', '.join(map(repr, deaf))}; it works with {', '.join(able)}"
            )
    if {"tau", "label_smoothing"} <= given:
        raise ValueError("tau and label_smoothing both set the soft target: give only one of them")
    if not 0 <= label_smoothing < 1 or ("robust" in loss_types and label_smoothing >= 0.5):
        raise ValueError(f"label_smoothing must be in [0, 1), below 0.5 for 'robust'; got {label_smoothing}")
    if "exo_pair" in loss_types and not label_smoothing > 0:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0 (its paper uses 1e-3), got 0")
