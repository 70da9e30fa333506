"""Every family of subjects by name."""

from cpo_kernels.bench import baselines, head, head_subjects, preference, tokens, training_step
from cpo_kernels.bench.subject import Family

HEAD_SUBJECTS = {**head_subjects.SUBJECTS, **baselines.SUBJECTS}
FAMILIES = {
    "head": Family(head.Head, head.Batch, HEAD_SUBJECTS, "products", head.truth, head.limits),
    "tokens": tokens.FAMILY,
    "preference": preference.FAMILY,
    "training_step": training_step.FAMILY,
}
