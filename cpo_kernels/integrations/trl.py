"""TRL's trainers with our fused head; its DPOTrainer also with conditioned preferences where the data is rated.

    with fuse():                                                  # every trainer of TRL: see `trl_head`
        trainer = trl.GRPOTrainer(model, reward, train_dataset=data, ...)
    trainer = FusedDPOTrainer(model, ref_model, FusedDPOConfig("out", loss_type="ipo"), train_dataset=data, ...)

Without `objectives` TRL computes loss and metrics as before, from our token log-probs: 2 matrix products with a frozen
head (LoRA), 3 with a trainable one (4 if the logits exceed `memory_budget`), only on labelled positions.

With `objectives` the dataset holds `chosen_scores` and `rejected_scores`, K ratings each (None: not rated), and
optionally `condition`, K levels (None: not conditioned), and `objectives`, the K names, which must be the config's, in
its order. The prompt must carry the condition's tags (`cpo_kernels.TagTemplate`). The response with the higher value
under the condition is preferred, whichever column it stands in; ties give no loss. See `cpo_kernels.preference_loss`.
`RatedData` makes such rows from rated responses, with token ids: a row's `prompt_ids`, `chosen_ids` and `rejected_ids`
are taken as they are.

Written for TRL 1.16.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.checks import check_list
from cpo_kernels.extras import explained

try:
    import trl
    from trl.trainer.utils import get_config_model_id
except ModuleNotFoundError as error:
    raise explained(error, __name__) from error

from cpo_kernels.head.strategy import check_filter
from cpo_kernels.integrations.conditioned import RATING_KEYS, conditioned_loss
from cpo_kernels.integrations.trl_head import (
    FusedGRPOTrainer,
    FusedKTOTrainer,
    FusedRLOOTrainer,
    FusedSFTTrainer,
    fuse,
    fused_construction,
)
from cpo_kernels.losses.options import LossOptions
from cpo_kernels.losses.preference import CPOLoss
from cpo_kernels.objectives import Objective

__all__ = [
    "FusedDPOConfig", "FusedDPOTrainer", "FusedGRPOTrainer", "FusedKTOTrainer", "FusedRLOOTrainer", "FusedSFTTrainer",
    "fuse",
]  # fmt: skip
RATING_COLUMNS = ("chosen_scores", "rejected_scores", "condition")
NAMES_COLUMN = "objectives"
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
NOT_IN_TRL = {"simpo", "orpo", "contrastive_cpo", "alphapo", "modpo"}
SMOOTHED_BY_TRL = {"robust", "exo_pair", "aot", "aot_unpaired"}


@dataclass
class FusedDPOConfig(trl.DPOConfig):
    """`DPOConfig` and what ours adds.

    objectives: the rated objectives: `Objective`s, dicts of their fields, or a JSON list of such dicts. Turns on the
        conditioned loss. `label_smoothing` then reaches every loss type that honours it (TRL's sigmoid ignores it).
    tau, margin, tie_margin: see `LossOptions`; need objectives.
    head_softcap, head_scale: what the model does to x W^T + b, for a model class that is not in `heads.HEADS`.
    memory_budget, impl, filter_eps, filter_head_grad: see `linear_token_logps`; filter_eps is "auto" or a number.
    """

    objectives: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "Rated objectives as a JSON list of {name, low, high, weight, strength}."}
    )
    tau: float | None = field(default=None, metadata={"help": "Soft targets sigmoid(|dR| / tau)."})
    margin: float = field(default=0.0, metadata={"help": "gamma of the margin gamma * |dR|."})
    tie_margin: float = field(default=1e-6, metadata={"help": "Pairs with |dR| at most this are ties."})
    head_softcap: float | None = field(default=None, metadata={"help": "Softcap of the logits of an unknown model."})
    head_scale: float | None = field(default=None, metadata={"help": "Scale of the logits of an unknown model."})
    memory_budget: int | None = field(default=None, metadata={"help": "Bytes of logits held at a time."})
    impl: str = field(default="auto", metadata={"help": "Backend of the kernels: auto, reference, cpu, triton, cuda."})
    filter_eps: str | None = field(
        default=None, metadata={"help": "Gradients on the live columns of the vocabulary: auto, or a number in (0, 1)."}
    )
    filter_head_grad: bool = field(default=False, metadata={"help": "With filter_eps: the head's gradient as well."})

    def __post_init__(self) -> None:
        if self.objectives is not None:
            self.objectives = [asdict(o) if isinstance(o, Objective) else o for o in objective_list(self.objectives)]
        super().__post_init__()
        loss_options(self)
        check_filter(**filter_options(self))


def objective_list(given: Any) -> list[Objective | dict[str, Any]]:
    """What `objectives` holds, read from JSON where it is text, each checked; a dict may leave out weight, strength."""
    example = 'write [{"name": "honesty", "low": 1, "high": 5}]'
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"objectives {given!r:.80} are no JSON ({error}): {example}") from None
    if not isinstance(given, (list, tuple)) or not all(isinstance(o, (Objective, dict)) for o in given):
        raise TypeError(
            f"objectives must be a list of Objectives or of dicts of their fields, got {given!r:.80}: {example}"
        )
    names = [f.name for f in fields(Objective)]
    for o in given:
        if isinstance(o, dict) and not {"name", "low", "high"} <= o.keys() <= set(names):
            raise ValueError(f"an objective has name, low, high, and may have weight, strength; got {o!r:.80}")
    return list(given)


OWN_FIELDS = tuple(f for f in fields(FusedDPOConfig) if f.name not in {g.name for g in fields(trl.DPOConfig)})


def own(args: Any, name: str) -> Any:
    """A field that `FusedDPOConfig` adds; its default where `args` is a plain `DPOConfig`."""
    return getattr(args, name, next(f.default for f in OWN_FIELDS if f.name == name))


def filter_options(args: Any) -> dict[str, Any]:
    """filter_eps, a number where its text is one, and filter_head_grad."""
    eps = own(args, "filter_eps")
    try:
        eps = eps if eps is None else float(eps)
    except ValueError:
        pass  # "auto", or refused by name
    return {"filter_eps": eps, "filter_head_grad": own(args, "filter_head_grad")}


def loss_options(args: Any) -> LossOptions:
    """The options of the loss, checked: what a loss type would ignore raises."""
    types = args.loss_type
    check_list("loss_type", types, str, "names of LOSS_TYPES")
    if foreign := NOT_IN_TRL & set(types):
        raise ValueError(f"loss_type {', '.join(sorted(foreign))} is not a DPO loss of TRL: use FusedLinearCPOLoss")
    if args.padding_free:
        raise ValueError("padding_free is ignored by TRL 1.16: leave it False; padding costs the head nothing here")
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor is ignored by TRL's DPOTrainer: set it to 0; label_smoothing is that of preferences"
        )
    objectives = own(args, "objectives")
    options = LossOptions.of(
        {
            "objectives": None if objectives is None else tuple(Objective(**o) for o in objectives),
            "beta": args.beta,
            "loss_type": tuple(types),
            "loss_weights": None if args.loss_weights is None else tuple(args.loss_weights),
            "label_smoothing": args.label_smoothing,
            "f_divergence": args.f_divergence_type,
            "f_alpha": args.f_alpha_divergence_coef,
            "discopop_tau": args.discopop_tau,
            "ld_alpha": args.ld_alpha,
            "use_weighting": args.use_weighting,
            **{name: own(args, name) for name in ("tau", "margin", "tie_margin")},
        }
    )
    if objectives is None:
        for name in ("tau", "margin", "tie_margin"):
            if own(args, name) != next(f.default for f in OWN_FIELDS if f.name == name):
                raise ValueError(f"{name} applies only to rated pairs: give objectives")
        if args.label_smoothing and not SMOOTHED_BY_TRL & set(types):
            raise ValueError(
                f"label_smoothing is ignored by TRL for loss_type {', '.join(types)}: set it to 0, or use robust"
            )
        if args.use_weighting and "hinge" in types:
            raise ValueError("use_weighting with loss_type hinge fails in TRL's backward: use another loss_type")
    return options


@dataclass
class RatedPreferences:
    """A collator that adds `scores` [2P, K] (the chosen column first) and `conditions` [P, K]; NaN where None."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    objectives: tuple[Objective, ...]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [rating_rows(example, self.objectives) for example in examples]
        chosen, rejected, conditions = ([row[column] for row in rows] for column in RATING_COLUMNS)
        batch = dict(self.collator(examples))
        batch["scores"] = torch.tensor(chosen + rejected, dtype=torch.float64)
        batch["conditions"] = torch.tensor(conditions, dtype=torch.float64)
        return batch


def rating_rows(example: Mapping[str, Any], objectives: Sequence[Objective]) -> dict[str, list[float]]:
    """The row of each of RATING_COLUMNS in one example, K numbers; NaN where None. Raises ValueError for others, and
    where the example names other objectives, or in another order."""
    names = [o.name for o in objectives]
    if (named := example.get(NAMES_COLUMN)) is not None and list(named) != names:
        raise ValueError(
            f"the numbers are of {', '.join(map(str, named))}, but objectives of FusedDPOConfig are "
            f"{', '.join(names)}: give them in the order of the data"
        )
    return {column: _rating_row(example.get(column), column, objectives) for column in RATING_COLUMNS}


def _rating_row(values: Any, column: str, objectives: Sequence[Objective]) -> list[float]:
    if values is None and column == "condition":
        return [math.nan] * len(objectives)
    given = values.tolist() if hasattr(values, "tolist") else values  # of a dataset that gives arrays or tensors
    if not isinstance(given, (list, tuple)) or len(given) != len(objectives):
        names = ", ".join(o.name for o in objectives)
        raise ValueError(f"{column} must hold one number (or None) for each of {names}, got {values!r:.80}")
    row = []
    for o, value in zip(objectives, given, strict=True):
        try:
            if isinstance(value, (bool, dict, list)):
                raise ValueError
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{column}: {o.name} is {value!r:.40}, not a number (None where there is none)") from None
        if not (math.isnan(number) or o.low <= number <= o.high):
            raise ValueError(f"{column}: {o.name} is {number}, outside [{o.low}, {o.high}]")
        row.append(number)
    return row


class FusedDPOTrainer(trl.DPOTrainer):
    """`trl.DPOTrainer` with the same arguments; `args` may be a `FusedDPOConfig`. See the module's docstring.

    Raises ValueError, naming the option and the fix, for whatever it or TRL would not honour.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = FusedDPOConfig(f"{name.split('/')[-1]}-DPO")
        self.rated = loss_options(args)
        head = {
            "softcap": own(args, "head_softcap"),
            "scale": own(args, "head_scale"),
            "memory_budget": own(args, "memory_budget"),
            "impl": own(args, "impl"),
            **filter_options(args),
        }
        with fused_construction(**head):
            super().__init__(model, ref_model, args, *rest, **kwargs)
        self.cpo_loss: CPOLoss | None = None
        if self.rated.objectives is None:
            return
        if self._is_vision_dataset:
            raise ValueError("objectives with a dataset of images are not supported: leave objectives out")
        # ld_alpha and WPO's weights act on tokens, before the loss.
        names = {f.name for f in fields(LossOptions)} - {"ld_alpha", "use_weighting"}
        self.cpo_loss = CPOLoss(impl=own(args, "impl"), **{name: getattr(self.rated, name) for name in names})
        self.data_collator = RatedPreferences(self.data_collator, self.rated.objectives)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"the {dataset_name} dataset is empty")
        columns = first.keys() & set(RATING_COLUMNS)
        if self.rated.objectives is None and columns:
            raise ValueError(
                f"the {dataset_name} dataset has {', '.join(sorted(columns))}, which need objectives in "
                "FusedDPOConfig: give them, or remove the columns"
            )
        if self.rated.objectives is not None and (missing := {*RATING_COLUMNS[:2]} - columns):
            raise ValueError(
                f"objectives need the ratings of both responses: the {dataset_name} dataset has no column "
                f"{', '.join(sorted(missing))}"
            )
        if self.rated.objectives is not None and hasattr(dataset, "select_columns") and hasattr(dataset, "__len__"):
            read = sorted(columns | first.keys() & {NAMES_COLUMN})
            for number, example in enumerate(dataset.select_columns(read)):  # not of a stream, whose rows come
                try:
                    rating_rows(example, self.rated.objectives)
                except ValueError as error:
                    raise ValueError(f"the {dataset_name} dataset, row {number}: {error}") from None
        if not first.keys() >= set(TOKEN_COLUMNS):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None or args.truncation_mode != "keep_start":
            return dataset
        return dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)  # as TRL: others have no response

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first and self.rated.objectives is not None:
            columns: Any = self._signature_columns
            columns.extend((*RATING_COLUMNS, NAMES_COLUMN))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL names the cache by the data and the model, but not by what else changes the log-probs: `ld_alpha`, what
        the collator cuts off, and the precision."""
        args: Any = self.args
        parameters = self._precompute_model_hash
        cut, precision = (args.max_length, args.truncation_mode), self.accelerator.mixed_precision
        self._precompute_model_hash: Any = (parameters, self.ld_alpha, cut, precision)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = parameters

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = {key: value for key, value in inputs.items() if key not in RATING_KEYS}
        logps: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, inputs)
        return logps

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.cpo_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        return conditioned_loss(self, model, inputs, return_outputs)
