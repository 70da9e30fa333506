"""Every key of a recipe with its default and a line of help. `cpo-kernels train --keys` prints them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STAGES = ("cpsft", "cdpo", "sft", "dpo")


SEEDS = "[0, 4294967296)"  # epochs add multiples of 2**32


def key(default: Any, help: str, range: str | None = None) -> Any:
    """A key of a config. `range` is the interval of a number, or of each number in a list or dict, such as [0, 1): a
    square bracket includes its end. Every numeric key has one."""
    metadata = {"help": help, "range": range}
    if isinstance(default, (list, dict, type)):
        factory = default if isinstance(default, type) else lambda: type(default)(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def in_range(value: float, range: str) -> bool:
    """Whether the number is in an interval as in `key`; NaN is in none."""
    low, high = map(float, range[1:-1].split(", "))
    return (low < value or (range[0] == "[" and value == low)) and (
        value < high or (range[-1] == "]" and value == high)
    )


@dataclass
class ModelConfig:
    name: str | None = key(None, "folder or hub name; package:NAME is the folder of an installed package")
    gguf_file: str | None = key(None, "GGUF file in that folder; found automatically if it is the only model there")
    config: dict[str, Any] | None = key(None, "build from scratch instead: {model_type: llama, hidden_size: 64, ...}")
    tokenizer: str | None = key(None, "folder, hub name or package:NAME of the tokenizer; default: the model's")
    quantize: str | None = key(None, "4bit: NF4 weights under adapters (QLoRA; bitsandbytes)")
    attention: str | None = key(
        None, "sdpa | segments | flex_attention | flash_attention_2 | eager; default: the model's choice"
    )


@dataclass
class FieldMap:
    prompt: str = key("prompt", "field of the prompt (a.b reads nested fields, here and below)")
    input: str | None = key(None, "field of text appended to the prompt after a blank line, such as Alpaca's input")
    system: str | None = key(None, "field of a system message before the prompt")
    ignore: list[str] = key([], "columns and message keys that do not matter to the model")
    responses: str = key("responses", "layout records: field of the list of responses")
    response: str | None = key(None, "field of a response's text; default text (records), response (answers)")
    ratings: dict[str, Any] | None = key(
        None,
        "objective: field, or {field, threshold, above, below}, or {field, map: {value: rating}}; "
        "default: the field `ratings`, a dict of objectives",
    )
    chosen: str = key("chosen", "layout pairs: field of the preferred response")
    rejected: str = key("rejected", "layout pairs: field of the other response")
    score_chosen: str | None = key("score_chosen", "layout pairs: rating of the preferred response, where a row has it")
    score_rejected: str | None = key("score_rejected", "layout pairs: rating of the other response")


@dataclass
class SourceConfig:
    path: str = key("", "file (.jsonl, .json, .parquet, .csv, also .gz; * for several), folder or hub name")
    layout: str | None = key(None, "layout of its rows; default: data.layout")
    split: str = key("train", "split of a folder or hub data set, such as train[:1000]")
    subset: str | None = key(None, "configuration of a hub data set")
    data_dir: str | None = key(None, "folder in a hub data set, such as harmless-base of Anthropic/hh-rlhf")
    streaming: bool = key(False, "read while downloading and keep nothing on disk")
    rows: int | None = key(None, "only this many rows from the start; default: all", "[1, inf)")


@dataclass
class DataConfig:
    train: list[SourceConfig] = key([], "sources: paths or hub names, or {path, layout, split, ...}")
    eval: list[SourceConfig] = key([], "held-out sources; empty: eval_share of the training prompts is held out")
    eval_share: float = key(
        0.05, "share of the prompts held out for evaluation (a prompt is never on both sides)", "[0, 1)"
    )
    split_seed: int = key(0, "seed of that split; separate from `seed` so that runs can share a split", SEEDS)
    layout: str = key(
        "records",
        "records (responses in a list) | answers (one a row) | pairs (chosen, rejected: TRL's format) | rated_pairs "
        "(the same with chosen_scores, rejected_scores: a rating for each objective), or a published schema: "
        "ultrafeedback | ultrasafety | helpsteer | pku_saferlhf | hh_rlhf | helpsteer3",
    )
    fields: FieldMap = key(FieldMap, "field names of the files")
    on_bad_line: str = key("error", "error | skip (skip counts and reports)")
    max_prompt_tokens: int = key(
        512, "longer prompts are left out and counted (truncation could lose the tags)", "[1, inf)"
    )
    max_tokens: int = key(
        1024, "prompt and response together; longer responses are truncated at the end and counted", "[1, inf)"
    )


@dataclass
class TemplateConfig:
    prompt: str = key(
        "{tags}{prompt}", "text of the prompt; `chat`: the tokenizer's chat template, with the tags first"
    )
    answer_prefix: str = key("", "text before the response, such as the space after `A:`")
    tags: str = key("<{name}: {value}> ", "one tag; the paper's spacing is `< {name}: {value} > `")
    system: str | None = key(None, "system message, with prompt: chat")


@dataclass
class MixConfig:
    sampler: str = key("attained", "attained | best | grid | none")
    share: float = key(1.0, "share of the draws, relative to the other entries", "[0, inf)")
    count: int | None = key(
        None, "instead of shares: number of pairs (cdpo) or responses (cpsft) of this entry", "[0, inf)"
    )
    objectives: list[str] | None = key(None, "objectives that conditions may name; default: all")
    levels: dict[str, float] | None = key(None, "only responses with these ratings: {honesty: 5}", "(-inf, inf)")
    rated: list[str] | None = key(None, "only responses rated on all of these; default: those in `objectives`")
    values: dict[str, list[float]] | None = key(
        None, "grid: {objective: [values]}; default: the ratings that occur in the data", "(-inf, inf)"
    )


@dataclass
class ConditionsConfig:
    mixture: list[MixConfig] = key([MixConfig()], "where conditions come from, with shares")
    per_prompt: int = key(1, "cdpo: number of conditions of a prompt in a batch, over the same responses", "[1, inf)")
    responses: int | None = key(
        None, "cdpo, dpo: responses of a prompt in a batch, one rating class after another; default: all", "[2, inf)"
    )
    pairs: int | None = key(
        None, "cdpo, dpo: at most this many pairs per prompt and condition; default: all non-tied pairs", "[1, inf)"
    )
    draws: int = key(
        1, "cdpo, dpo: how often a prompt is drawn, each time with new responses and conditions", "[1, inf)"
    )
    anew: bool = key(False, "draw conditions, responses and pairs anew in every epoch, not once for all epochs")
    balance: bool = key(False, "draw rating classes (all ratings of a response together) equally often")
    class_weights: list[dict[str, float]] = key(
        [], "weights other than 1 for classes: [{honesty: 1, helpfulness: 1, weight: 0.1}]", "(-inf, inf)"
    )
    strip_best: float = key(
        0.5, "share of best-on-everything conditions shown without tags (no tag means best)", "[0, 1]"
    )
    sft_responses: str = key("best", "sft: train on the best responses of a prompt | all")


@dataclass
class ObjectiveConfig:
    name: str = key("", "its name in ratings and tags")
    low: float = key(1.0, "lowest rating", "(-inf, inf)")
    high: float = key(5.0, "highest rating; higher is better", "(-inf, inf)")
    weight: float = key(1.0, "omega, its weight in the value R", "[0, inf)")
    strength: float = key(1.0, "lambda, strength of a condition on it", "[0, inf)")


@dataclass
class LossConfig:
    beta: float = key(0.1, "strength of the pull to the reference model", "(0, inf)")
    type: list[str] = key(["sigmoid"], "cdpo, dpo: loss type, or a list of types that are summed")
    weights: list[float] | None = key(None, "weights of the types in that list", "(0, inf)")
    filter_eps: float | str | None = key(
        None,
        "auto, or a threshold: the hidden states' gradient is exact where |onehot - softmax| reaches it; the rest is "
        "one "
        "mean column",
        "(0, 1)",
    )
    filter_head_grad: bool = key(False, "with filter_eps: also filter the gradient of the head")
    options: dict[str, Any] = key({}, "further options of FusedLinearCPOLoss: {label_smoothing: 0.1, tau: 1, ...}")


@dataclass
class LoraKeys:
    r: int = key(64, "rank", "[1, inf)")
    alpha: int = key(64, "adapters are scaled by alpha / r", "[1, inf)")
    dropout: float = key(0.0, "dropout before an adapter", "[0, 1)")
    targets: list[str] = key(["all-linear"], "names of layers, or all-linear: all linear layers but the head")


@dataclass
class TrainingConfig:
    train: str = key(
        "all", "all | body (all but embeddings and head) | last_k (the last k layers and the final norm) | lora (peft)"
    )
    lora: LoraKeys = key(LoraKeys, "the adapters of train: lora")
    k: int = key(4, "number of layers trained with train: last_k", "[1, inf)")
    epochs: float = key(1.0, "passes over the prepared data; may be a fraction", "(0, inf)")
    max_steps: int | None = key(None, "optimizer steps; overrides epochs; 0 or null: use epochs", "[0, inf)")
    batch_size: int = key(
        16,
        "per optimizer step, on all processes: responses (cpsft, sft), prompts with all their groups (cdpo, dpo)",
        "[1, inf)",
    )
    tokens_per_microbatch: int = key(
        2048, "tokens per forward pass and process; larger steps accumulate gradients", "[1, inf)"
    )
    window: int = key(
        1, "number of steps whose examples are sorted by length together: less padding, less randomness", "[1, inf)"
    )
    rows: str = key(
        "shared",
        "shared (each prompt is encoded once for all its responses, several prompts per row) | packed (each response "
        "with "
        "its prompt, end to end) | padded (one response per row: any model)",
    )
    lr: float = key(1e-5, "peak learning rate", "(0, inf)")
    schedule: str = key("linear", "decay to zero after warm-up: linear | cosine | constant (none)")
    warmup: float = key(0.1, "warm-up steps; below 1: a share of all steps", "[0, inf)")
    optimizer: str = key("adamw", "adamw | adamw_8bit, paged_adamw, paged_adamw_8bit (bitsandbytes)")
    betas: list[float] = key([0.9, 0.999], "AdamW", "[0, 1)")
    weight_decay: float = key(0.0, "AdamW, on matrices only", "[0, inf)")
    clip: float = key(1.0, "largest gradient norm; 0: no clipping", "[0, inf)")
    gradient_checkpointing: bool = key(False, "keep one activation per layer and recompute the rest: less memory")
    compile: bool = key(False, "torch.compile the body, once for all lengths")
    precision: str = key("bf16", "bf16 (autocast; parameters stay float32) | fp32")
    eval_every: int = key(0, "steps between evaluations; 0: only at the start and the end", "[0, inf)")
    eval_size: int = key(
        128, "held-out responses (cpsft, sft) or prompts (cdpo, dpo) per evaluation; 0: all", "[0, inf)"
    )
    checkpoint_every: int = key(0, "steps between checkpoints; 0: none", "[0, inf)")
    keep: int = key(2, "number of newest checkpoints to keep", "[1, inf)")
    resume: bool = key(False, "continue from the newest checkpoint in run_dir")
    overwrite: bool = key(False, "delete an earlier run in run_dir")
    save_model: bool = key(True, "save model and tokenizer in run_dir/model at the end")
    progress: bool = key(True, "progress bars")
    trackers: list[str] = key([], "also log metrics to these: tensorboard, wandb")


@dataclass
class Config:
    stage: str = key("cdpo", "cpsft | cdpo | sft | dpo")
    run_dir: str | None = key(
        None, "folder for config, metrics, versions, checkpoints and model; null: nothing is written"
    )
    seed: int = key(0, "seed of conditions, draws, order and initial weights", SEEDS)
    cache_dir: str | None = key(None, "folder of the reference log-probs; default: run_dir/reference")
    objectives: list[ObjectiveConfig] = key([], "the rated objectives")
    model: ModelConfig = key(ModelConfig, "where the model comes from")
    data: DataConfig = key(DataConfig, "where the records come from")
    template: TemplateConfig = key(TemplateConfig, "how prompt, tags and response become text")
    conditions: ConditionsConfig = key(ConditionsConfig, "how conditions, responses and pairs are drawn")
    loss: LossConfig = key(LossConfig, "preference loss")
    training: TrainingConfig = key(TrainingConfig, "the loop")


CHOICES = {
    "stage": STAGES,
    "data.on_bad_line": ("error", "skip"),
    "conditions.sft_responses": ("best", "all"),
    "training.train": ("all", "body", "last_k", "lora"),
    "training.optimizer": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"),
    "model.quantize": (None, "4bit"),
    "training.rows": ("shared", "packed", "padded"),
    "model.attention": (None, "sdpa", "segments", "flex_attention", "flash_attention_2", "eager"),
    "training.schedule": ("linear", "cosine", "constant"),
    "training.precision": ("bf16", "fp32"),
}
SHORTHAND = {ModelConfig: "name", SourceConfig: "path"}  # `model: NAME` means `model: {name: NAME}`
# the key that is meant when a section gets a single value: --data FILE
MEANT = {DataConfig: "train", LossConfig: "type", TemplateConfig: "prompt", ConditionsConfig: "mixture"}
MEANT |= {TrainingConfig: "train", LoraKeys: "r"}
