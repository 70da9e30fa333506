"""Everything that differs between one process, DDP, FSDP2 and ZeRO-3. `accelerate launch` or torchrun selects one.

Every rank holds the data and draws the same steps; a step's micro-batches are dealt to the ranks in turn. The loss is
divided by the total of the whole step, so gradients are summed over ranks, never averaged. All ranks run the same
number of micro-batches, since each forward pass is a collective: a rank without one left repeats a micro-batch with
weight zero.
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
    """How many processes the launcher started, from the torchrun and MPI variables that accelerate reads."""
    launchers = ("", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
    sizes: list[int] = [get_int_from_env([f"{name or 'WORLD_'}SIZE" for name in launchers], 1)]
    sizes += [1 + get_int_from_env([f"{name}{rank}" for name in launchers], 0) for rank in ("RANK", "LOCAL_RANK")]
    return max(sizes)


def check_launcher(accelerator: Accelerator, config: Config) -> None:
    """Raise ValueError if the launcher's settings contradict the recipe's."""
    state, kind, training = accelerator.state, accelerator.distributed_type, config.training
    fsdp, deepspeed = kind == DistributedType.FSDP, kind == DistributedType.DEEPSPEED
    launched = launched_processes()
    refused = {
        f"{launched} processes, but accelerate found no GPU or no LOCAL_RANK, so each would train alone; start one "
        "process, "
        "or start them with torchrun, and with ACCELERATE_USE_CPU=true if they share a CPU": (
            launched > 1 and accelerator.num_processes == 1
        ),
        f"mixed_precision: {state.mixed_precision}; set it to no and use training.precision": (
            state.mixed_precision != "no"
        ),
        "gradient_accumulation_steps; leave it at 1 and use training.batch_size and tokens_per_microbatch": (
            accelerator.gradient_accumulation_steps != 1
        ),
        "FSDP or DeepSpeed on CPUs, where accelerate would run DDP instead": (
            kind == DistributedType.MULTI_CPU
            and (parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))
        ),
        "fsdp_version: 1; set it to 2": fsdp and not accelerator.is_fsdp2,
        "fsdp_cpu_ram_efficient_loading; set it to false: every rank reads and hashes the weights": (
            fsdp and state.fsdp_plugin.cpu_ram_efficient_loading
        ),
        "DeepSpeed, whose checkpoints are pickles; set training.checkpoint_every: 0 or use FSDP2": (
            deepspeed and (training.checkpoint_every > 0 or training.resume)
        ),
        "DeepSpeed, which does not train adapters here; use DDP or FSDP2 for training.train: lora": (
            deepspeed and training.train == "lora"
        ),
        f"{kind.value}, which supports only training.optimizer: adamw and no model.quantize; use DDP": (
            kind in SHARDED and (config.model.quantize is not None or training.optimizer != "adamw")
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"the launcher asks for {reason}")
    if deepspeed:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else transformers shards weights on loading, before they are hashed
        settings = state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # must be a number; nothing reads it
        settings["gradient_clipping"] = training.clip


def prepare(loss: StageLoss, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Any:
    """Wrap the loss's module as launched. Returns the optimizer of the parameters that the model then has."""
    if accelerator.distributed_type == DistributedType.NO:
        return optimizer
    loss.module, wrapped = accelerator.prepare(loss.module, optimizer)
    return wrapped.optimizer


def share(parts: Sequence[T], accelerator: Accelerator) -> list[tuple[T, float]]:
    """This rank's micro-batches with their weights: 1, or 0 for one that another rank already counts."""
    ranks, rank = accelerator.num_processes, accelerator.process_index
    mine = [(part, 1.0) for part in parts[rank::ranks]]
    return mine + [(part, 0.0) for part in parts[-1:] if len(mine) * ranks < len(parts)]


def accumulation(module: Any, last: bool) -> AbstractContextManager[Any]:
    """Context manager of a micro-batch's forward and backward pass. DDP reduces gradients only in the last one of a
    step. FSDP2 and ZeRO-3 do so in each, so that no rank holds all gradients."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def backward(value: Tensor, module: Any, accelerator: Accelerator, last: bool) -> None:
    """Backward of `value` with gradients summed over ranks, although the wrappers average them."""
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
    """One optimizer step; returns the gradient norm before clipping. A norm that is not finite skips the update, except
    under ZeRO-3, which computes its norm inside the step."""
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
    """A sharded tensor (DTensor) gathered on every rank; other tensors unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def to_save(model: Any, module: Any, adapted: Any, accelerator: Accelerator) -> tuple[Any, dict[str, Tensor] | None]:
    """(model to save, weights that replace its own or None). Adapters are merged, except into a quantized base. The
    weights of a sharded model are gathered on the main process's CPU; the model itself is unchanged."""
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
    """Context manager: an exception on one rank stops all ranks at the end of the block, which must not contain a
    collective."""
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
    """Raise ValueError on all ranks if their values differ. The keys of `values` are the names in the message."""
    every = gather_object([values])
    for name, value in values.items():
        if any(other[name] != every[0][name] for other in every):
            raise ValueError(f"the ranks have different {name}: by rank {[v[name] for v in every]}, here {value}")
