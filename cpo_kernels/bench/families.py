"""Every family of implementations by name."""

from cpo_kernels.bench import baselines, head, head_implementations, preference, tokens, trainers, training_step
from cpo_kernels.bench.implementation import Family

HEAD_IMPLEMENTATIONS = {**head_implementations.IMPLEMENTATIONS, **baselines.IMPLEMENTATIONS}
FAMILIES = {
    "head": Family(head.Head, head.Batch, HEAD_IMPLEMENTATIONS, "products", head.truth, head.limits),
    "tokens": tokens.FAMILY,
    "preference": preference.FAMILY,
    "training_step": training_step.FAMILY,
    "trainers": trainers.FAMILY,
}
