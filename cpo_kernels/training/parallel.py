"""One process, DDP, FSDP2 or ZeRO-3: all that differs between them. `accelerate launch` or torchrun says which it is.

Every rank holds the data and draws the same steps; a step's micro-batches go round the ranks. The loss is divided by
what the whole step holds, so gradients are summed over ranks, never averaged. Ranks run equally many micro-batches,
since each forward pass is a collective: a rank that is out of them runs the last one once more, times zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from accelerate.utils.environment import get_int_from_env, parse_flag_from_env
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpo_kernels.recipe.keys import Config
from cpo_kernels.training.adapters import merged_weights
from cpo_kernels.training.losses import StageLoss

T = TypeVar("T")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_accelerator() -> Accelerator:
    handler = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(kwargs_handlers=[handler])


def launched_processes() -> int:
    """How many processes the launcher started, from the variables of torchrun and MPI that accelerate reads."""
    launchers = ("", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
    sizes: list[int] = [get_int_from_env([f"{name or 'WORLD_'}SIZE" for name in launchers], 1)]
    sizes += [1 + get_int_from_env([f"{name}{rank}" for name in launchers], 0) for rank in ("RANK", "LOCAL_RANK")]
    return max(sizes)


def check_launcher(accelerator: Accelerator, config: Config) -> None:
    """Raises ValueError where the launcher's settings and the recipe's cannot both hold."""
    state, kind, training = accelerator.state, accelerator.distributed_type, config.training
    fsdp, deepspeed = kind == DistributedType.FSDP, kind == DistributedType.DEEPSPEED
    launched = launched_processes()
    refused = {
        f"{launched} processes, but accelerate found no GPU or no LOCAL_RANK, so that each trains by itself; start "
        "one, or let torchrun start them, with ACCELERATE_USE_CPU=true where processes share the work of a CPU": (
            launched > 1 and accelerator.num_processes == 1
        ),
        f"mixed_precision: {state.mixed_precision}; set it to no: training.precision decides": (
            state.mixed_precision != "no"
        ),
        "gradient_accumulation_steps; leave it at 1: training.batch_size and tokens_per_microbatch decide": (
            accelerator.gradient_accumulation_steps != 1
        ),
        "FSDP or DeepSpeed on CPUs, where accelerate runs DDP in their place": (
            kind == DistributedType.MULTI_CPU
            and (parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))
        ),
        "fsdp_version: 1; set it to 2": fsdp and not accelerator.is_fsdp2,
        "fsdp_cpu_ram_efficient_loading; set it to false: every rank reads and hashes the weights": (
            fsdp and state.fsdp_plugin.cpu_ram_efficient_loading
        ),
        "DeepSpeed, whose checkpoints are pickles; set training.checkpoint_every: 0, or shard with FSDP2": (
            deepspeed and (training.checkpoint_every > 0 or training.resume)
        ),
        "DeepSpeed, which does not train adapters here; take DDP or FSDP2 for training.train: lora": (
            deepspeed and training.train == "lora"
        ),
        f"{kind.value}, which takes no model.quantize and only training.optimizer: adamw; take DDP": (
            kind in SHARDED and (config.model.quantize is not None or training.optimizer != "adamw")
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"the launcher asks for {reason}")
    if deepspeed:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else transformers splits weights as it reads them, before they are hashed
        settings = state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # must be a number; nothing reads it
        settings["gradient_clipping"] = training.clip


def prepare(loss: StageLoss, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Any:
    """Wrap the loss's module for what was launched; the optimizer of the parameters that the model then has."""
    if accelerator.distributed_type == DistributedType.NO:
        return optimizer
    loss.module, wrapped = accelerator.prepare(loss.module, optimizer)
    return wrapped.optimizer


def share(parts: Sequence[T], accelerator: Accelerator) -> list[tuple[T, float]]:
    """This rank's micro-batches with their weights: 1, or 0 for one that another rank counts."""
    ranks, rank = accelerator.num_processes, accelerator.process_index
    mine = [(part, 1.0) for part in parts[rank::ranks]]
    return mine + [(part, 0.0) for part in parts[-1:] if len(mine) * ranks < len(parts)]


def accumulation(module: Any, last: bool) -> AbstractContextManager[Any]:
    """Of a micro-batch's forward and backward pass: DDP exchanges gradients only in the last one of a step. FSDP2 and
    ZeRO-3 do so in each, so that no rank holds all gradients."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def backward(value: Tensor, module: Any, accelerator: Accelerator, last: bool) -> None:
    """Gradients of `value` summed over ranks, from wrappers that average them."""
    value = value * accelerator.num_processes
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        module.set_gradient_accumulation_boundary(last)
        module.backward(value)
    else:
        value.backward()


def update(
    named: Sequence[tuple[str, nn.Parameter]],
    optimizer: Any,
    lr: float,
    clip: float,
    accelerator: Accelerator,
    module: Any,
) -> float:
    """One optimizer step; returns the gradient norm before clipping. A norm that is not finite changes nothing, but
    under ZeRO-3, which learns its norm in the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        module.step()
        return float(module.get_global_grad_norm())
    norm = float(whole(accelerator.clip_grad_norm_([p for _, p in named], clip or math.inf)))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor (DTensor) put together, on every rank; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def to_save(model: Any, module: Any, adapted: Any, accelerator: Accelerator) -> tuple[Any, dict[str, Tensor] | None]:
    """(what saves itself, weights that take the place of its own or None). Adapters are merged, except over a quantized
    base. The weights of a sharded model come whole to the main process's CPU; it stays as it is."""
    if accelerator.distributed_type not in SHARDED:
        if adapted is None or getattr(model, "hf_quantizer", None):
            return model if adapted is None else adapted, None
        return adapted.merge_and_unload(), None
    weights = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        gathered = accelerator.get_state_dict(module) or {}  # empty on the other ranks
        weights = {name.removeprefix("model."): tensor for name, tensor in gathered.items()}
    else:
        for name, tensor in model.state_dict().items():
            tensor = whole(tensor)
            if accelerator.is_main_process:
                weights[name] = tensor.cpu()
    return model, weights if adapted is None else merged_weights(weights, adapted)


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """An exception of one rank ends all of them, at the end of the block. The block may hold no collective."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    errors = gather_object([failed and f"{type(failed).__name__}: {failed}"])
    if failed is not None:
        raise failed
    for rank, text in enumerate(errors):
        if text:
            raise ValueError(f"rank {rank} stopped with {text}")


def check_same(accelerator: Accelerator, **values: Any) -> None:
    """Raises ValueError on all ranks where they do not hold the same; `values` by what the message calls them."""
    every = gather_object([values])
    for name, value in values.items():
        if any(other[name] != every[0][name] for other in every):
            raise ValueError(f"the ranks hold different {name}, by rank {[v[name] for v in every]}; here {value}")
