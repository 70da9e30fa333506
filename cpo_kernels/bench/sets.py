"""Named sets of measurements for `--set`, most important first, since a time limit may cut off the end."""

from dataclasses import dataclass, replace
from typing import Any

from cpo_kernels.bench import tokens
from cpo_kernels.bench.growth import Growth
from cpo_kernels.bench.preference import Preference
from cpo_kernels.bench.tokens import Tokens
from cpo_kernels.bench.trainers import TRAINERS, TrainerStep
from cpo_kernels.bench.training_step import TrainingStep
from cpo_kernels.bench.workload import Head, head


@dataclass(frozen=True)
class Run:
    """One workload with `implementations` of its family, () for all."""

    family: str
    workload: Any
    implementations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Set:
    """rounds, turn_s, answer_s, limit_s: see `side_by_side.Bench`; limit_s bounds the whole set."""

    runs: tuple[Run, ...]
    growth: tuple[Growth, ...]
    cold_starts: int
    rounds: int
    turn_s: float
    answer_s: float
    limit_s: float


def modes(base: Head, *modes: str) -> tuple[Run, ...]:
    return tuple(Run("head", replace(base, mode=mode)) for mode in modes)


def dtypes(base: Head, *modes_of_each: str) -> tuple[Run, ...]:
    return tuple(run for dtype in ("bfloat16", "float32") for run in modes(replace(base, dtype=dtype), *modes_of_each))


def trainers(**sizes: Any) -> tuple[Run, ...]:
    return tuple(Run("trainers", TrainerStep(trainer=name, **sizes)) for name in TRAINERS)


BOTH, ALL = ("trainable", "frozen"), ("trainable", "frozen", "forward")
CLOSEST = ("products", "ours", "ours_two_pass", "naive_unmasked", "torch_chunked", "cce", "liger", "trl_unmasked")

OPS = tuple(name for name in tokens.IMPLEMENTATIONS if not name.startswith("compiled"))
FEW = ("products", "ours", "naive_unmasked")
KERNELS = tuple(name for name in OPS if name == "copy" or name.endswith(("_cpu", "_triton", "_cuda")))

# ----------------------------------------------- ci: tiny and odd, every kind of workload, in about half a minute

TINY = Head("tiny", hidden=48, vocab=1999, groups=2, length=17, prompt=8, dtype="float32")
CI = Set(
    runs=(
        *(replace(run, implementations=FEW) for run in modes(TINY, *ALL)),
        Run("head", replace(TINY, dtype="bfloat16", responses=4, reference="computed"), FEW),
        Run("head", replace(TINY, softcap=5.0, mode="frozen", reference="computed"), FEW),
        Run("tokens", Tokens(rows=37, vocab=1999, softcap=5.0, dtype="float32"), KERNELS),
        Run("preference", Preference(pairs=16)),
        Run("training_step", TrainingStep(dtype="float32"), ("trl", "shared")),
        Run("trainers", TrainerStep(trainer="grpo", dtype="float32")),
    ),
    growth=(Growth(TINY, "groups", (2, 4)),),
    cold_starts=1, rounds=2, turn_s=0.0, answer_s=120, limit_s=600,
)  # fmt: skip

# ----------------------------------------------------- default: for a CPU; README's table is its start

QWEN, SMOL = head("qwen2.5-0.5b"), head("smollm2-135m", length=256, prompt=128)
LONG = head("smollm2-135m", groups=4, length=128, prompt=64)
STEP = TrainingStep("smollm2-135m", groups=2, length=384, prompt=192)
FOUR = replace(STEP, groups=1, responses=4, length=256, prompt=128)
DEFAULT = Set(
    runs=(
        *dtypes(QWEN, *BOTH),
        *(replace(run, implementations=CLOSEST) for run in dtypes(SMOL, *BOTH)),
        *(replace(run, implementations=CLOSEST) for run in modes(QWEN, "forward")),
        Run("head", replace(QWEN, groups=2, responses=4), CLOSEST),
        Run("head", replace(QWEN, reference="computed"), CLOSEST),
        Run("head", replace(QWEN, prompt=0, groups=2), CLOSEST),
        Run("head", replace(QWEN, groups=32), ("products", "ours", "ours_two_pass", "cce")),  # several chunks
        Run("tokens", Tokens(rows=512, vocab=151936)),
        Run("tokens", Tokens(rows=512, vocab=151936, dtype="float32")),
        Run("preference", Preference()),
        Run("training_step", STEP),
        Run("training_step", FOUR),
        *trainers(model="smollm2-135m", groups=2, length=384, prompt=192),
    ),
    growth=(
        Growth(LONG, "groups", (8, 32, 128, 256)),  # 1k to 32k labelled tokens
        Growth(LONG, "length", (128, 512, 2048)),
        Growth(replace(LONG, groups=8), "vocab", (16384, 49152, 147456)),
        Growth(replace(LONG, groups=8), "hidden", (288, 576, 1152, 2304)),
    ),
    cold_starts=3, rounds=5, turn_s=0.3, answer_s=30, limit_s=7200,
)  # fmt: skip

# ------------------------------------------------------------------------------------ full: every head: hours

FULL = replace(
    DEFAULT,
    runs=(
        *DEFAULT.runs,
        Run("head", head("qwen2.5-7b"), CLOSEST),
        Run("head", head("gemma-2-9b", mode="frozen"), CLOSEST),
        Run("head", head("llama-3-8b"), CLOSEST),
        *(Run("head", replace(SMOL, prompt=share), CLOSEST) for share in (0, 64, 192)),
        *(Run("head", replace(SMOL, groups=n), CLOSEST) for n in (1, 16)),
    ),
    answer_s=1200,
    limit_s=6 * 3600,
)

# ----------------------------------------------------------------- gpu: one call within 8 minutes on an H100, H200

LEADING = (*CLOSEST, "ours_cuda", "ours_token_logps", "cce_exact", "cce_filtered")
LLAMA = head("llama-3-8b", groups=8, length=1024, prompt=512)  # 8192 labelled tokens
GPU = Set(
    runs=(
        Run("tokens", Tokens(rows=4096, vocab=128256)),
        Run("tokens", Tokens(rows=8, vocab=262144), OPS),  # fewer rows than multiprocessors
        Run("tokens", Tokens(rows=4096, vocab=32000, dtype="float32"), OPS),
        Run("preference", Preference()),
        *modes(LLAMA, "trainable"),
        *(replace(run, implementations=LEADING) for run in modes(LLAMA, "frozen", "forward")),
        Run("head", replace(LLAMA, groups=4, responses=4), CLOSEST),
        Run("head", replace(LLAMA, reference="computed"), CLOSEST),
        Run("head", head("gemma-2-9b", groups=4, length=1024, prompt=512), CLOSEST),
        Run("head", head("qwen2.5-0.5b", groups=8, length=1024, prompt=512), CLOSEST),
        Run("head", head("qwen2.5-7b", groups=8, length=1024, prompt=512, mode="frozen"), CLOSEST),
        Run("training_step", replace(STEP, groups=8, length=1024, prompt=512)),
        *trainers(model="smollm2-135m", groups=8, length=1024, prompt=512),
    ),
    growth=(Growth(replace(LLAMA, groups=2), "groups", (2, 8, 32)),),
    cold_starts=2, rounds=5, turn_s=0.1, answer_s=90, limit_s=480,
)  # fmt: skip

# --------------------------------------------------------- filtered: gradients on the live columns of a trained model

# 1,024 and 4,096 labelled tokens; of real rows about as many in 3 and 12 pairs of UltraFeedback.
FILTERED_IMPLEMENTATIONS = (
    "products", "ours", "ours_filtered", "ours_filtered_head", "ours_token_logps", "ours_token_logps_filtered",
    "naive_unmasked", "torch_chunked", "cce", "cce_filtered", "trl_unmasked",
)  # fmt: skip
PEAKED = head("smollm2-135m", length=512, prompt=256, rows="peaked")
FILTERED = Set(
    runs=tuple(
        Run("head", replace(PEAKED, groups=groups, mode=mode), FILTERED_IMPLEMENTATIONS)
        for groups in (2, 8)
        for mode in BOTH
    ),
    growth=(), cold_starts=0, rounds=5, turn_s=0.3, answer_s=120, limit_s=3600,
)  # fmt: skip

SETS = {"filtered": FILTERED, "ci": CI, "default": DEFAULT, "full": FULL, "gpu": GPU}
