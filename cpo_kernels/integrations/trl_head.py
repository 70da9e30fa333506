"""Our fused head in TRL's trainers: in all of them, or by class.

    with fuse():                                              # or: fused = fuse(); ...; fused.undo()
        trainer = trl.GRPOTrainer(model, reward, args, train_dataset=data)
    trainer.train()
    trainer = FusedGRPOTrainer(model, reward, args, train_dataset=data, head_options={"filter_eps": "auto"})

A trainer gives its models a head during construction, with `add_fused_lm_head`, a name that each module of TRL imports;
the models keep that head. TRL computes loss and metrics as before, from our token log-probs: 2 matrix products with a
frozen head (LoRA), 3 with a trainable one (4 if the logits exceed `memory_budget`), on labelled positions only.

Written for TRL 1.16.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from cpo_kernels.extras import explained

try:
    import trl
    from trl.trainer import utils as trl_utils
except ModuleNotFoundError as error:
    raise explained(error, __name__) from error

from cpo_kernels.integrations.fused_head import add_fused_head, check_options

_LOCK = threading.RLock()
_IN_FORCE: list["Fused"] = []  # the last one gives the options


class Fused:
    """An active replacement. `undo()`, or the end of a `with` block, reverts it; models keep the heads they got."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings, self.heads = settings, 0  # heads: number given so far
        with _LOCK:
            _IN_FORCE.append(self)
            for name, (theirs, ours) in _REPLACED.items():
                _replace(name, theirs, ours)

    def undo(self) -> None:
        with _LOCK:
            if self in _IN_FORCE:
                _IN_FORCE.remove(self)
            for name, (theirs, ours) in _REPLACED.items() if not _IN_FORCE else ():
                _replace(name, ours, theirs)

    def __enter__(self) -> "Fused":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _give_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Has TRL's signature; an argument that TRL does not have raises a TypeError that names it."""
    given: dict[str, Any] = {
        "temperature": temperature,
        "cast_lm_head_to_fp32": cast_lm_head_to_fp32,
        "outputs": outputs,
    }
    if not _IN_FORCE:  # a caller that still holds this function after `undo`
        _REPLACED["add_fused_lm_head"][0](model, **given)
        return
    fused = _IN_FORCE[-1]
    add_fused_head(model, **given, **fused.settings)
    fused.heads += 1


def _hash_module(module: Any) -> str:
    """TRL keys its cache of reference log-probs by the model's weights; add softcap and scale if they are given."""
    given = [_IN_FORCE[-1].settings[name] for name in ("softcap", "scale")] if _IN_FORCE else [None]
    weights: str = _REPLACED["hash_module"][0](module)
    return weights if given.count(None) == len(given) else f"{weights} {given}"


# Name in `trl.trainer.utils`, and in every module that imports it: TRL's function, ours.
_REPLACED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add_fused_lm_head": (trl_utils.add_fused_lm_head, _give_head),
    "hash_module": (trl_utils.hash_module, _hash_module),
}


def _replace(name: str, old: Any, new: Any) -> None:
    """Replace it in every imported module of TRL; later imports take the name from `trl.trainer.utils`."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "trl" and vars(module).get(name) is old:  # no getattr: TRL's packages import lazily
            setattr(module, name, new)


def fuse(
    *,
    softcap: float | None = None,
    scale: float | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
    filter_eps: float | Literal["auto"] | None = None,
    filter_head_grad: bool = False,
) -> Fused:
    """From now on every TRL trainer that asks for a fused head gets ours, until `undo()` of the returned object.

    Of TRL's own trainers these are SFT, DPO, KTO, GRPO, RLOO, the experimental AsyncGRPO, and classes derived from
    them. The options are those of `add_fused_head`. Calls nest; the last active one gives the options.

    A model that is not supported (see `heads`) raises ValueError or TypeError when a trainer is constructed.
    """
    check_options(softcap, scale, memory_budget, impl, filter_eps, filter_head_grad)
    return Fused(
        {
            "softcap": softcap, "scale": scale, "memory_budget": memory_budget, "impl": impl, "filter_eps": filter_eps,
            "filter_head_grad": filter_head_grad,
        }
    )  # fmt: skip


@contextmanager
def fused_construction(**options: Any) -> Iterator[None]:
    """`fuse` during the construction of one trainer; other threads that construct one of ours wait."""
    with _LOCK, fuse(**options) as fused:
        yield
        if not fused.heads:
            raise RuntimeError(
                f"trl {trl.__version__} does not call add_fused_lm_head: this class is written for trl 1.16"
            )


class _FusedTrainer:
    """head_options: the options of `fuse`, for this trainer."""

    def __init__(self, *args: Any, head_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        with fused_construction(**(head_options or {})):
            super().__init__(*args, **kwargs)


class FusedSFTTrainer(_FusedTrainer, trl.SFTTrainer):
    """`trl.SFTTrainer` with our head; `head_options=` takes the options of `fuse`."""


class FusedKTOTrainer(_FusedTrainer, trl.KTOTrainer):
    """`trl.KTOTrainer` with our head; `head_options=` takes the options of `fuse`."""


class FusedGRPOTrainer(_FusedTrainer, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with our head; `head_options=` takes the options of `fuse`."""


class FusedRLOOTrainer(_FusedTrainer, trl.RLOOTrainer):
    """`trl.RLOOTrainer` with our head; `head_options=` takes the options of `fuse`."""
