"""LLaMA-Factory's `run_exp` with our head against without it: everything that it logs, and the trained weights (SGD).

No logits may be made where our head runs: the model's own head raises there.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

os.environ.setdefault("WANDB_DISABLED", "true")
pytest.importorskip("llamafactory", reason="LLaMA-Factory has an environment of its own: docs/llamafactory.md")

from llamafactory.train import tuner  # noqa: E402
from llamafactory.train.dpo.trainer import CustomDPOTrainer  # noqa: E402

from cpo_kernels.integrations.llamafactory import TRAINERS, fuse  # noqa: E402
from tests.support.processes import as_launched, free_port, run_processes  # noqa: E402
from tests.support.tiny import PREFERENCES, one_thread, tokenizer  # noqa: E402, F401

DATA = {
    "pairs": [{"instruction": p, "input": "", "chosen": c, "rejected": r} for p, c, r in PREFERENCES],
    "answers": [
        {"instruction": p, "input": "", "output": c, "tag": k % 3 != 1} for k, (p, c, _) in enumerate(PREFERENCES)
    ],
    "texts": [{"text": f"{p}{c}"} for p, c, _ in PREFERENCES],
}
COLUMNS = {
    "pairs": {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}},
    "answers": {"columns": {"prompt": "instruction", "response": "output"}},
    "tagged": {
        "file_name": "answers.json",
        "columns": {"prompt": "instruction", "response": "output", "kto_tag": "tag"},
    },
    "texts": {"columns": {"prompt": "text"}},
}
OF_STAGE = {"dpo": "pairs", "kto": "tagged", "sft": "answers", "pt": "texts"}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj", "learning_rate": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, their tokenizer, and data as LLaMA-Factory reads them."""
    root = tmp_path_factory.mktemp("llamafactory")
    letters = tokenizer()
    for name, options in {
        "Llama": {},
        "Gemma2": {"final_logit_softcapping": 1.5},
        "Cohere": {"logit_scale": 2.5},
    }.items():
        torch.manual_seed(0)
        kind = getattr(transformers, f"{name}ForCausalLM")
        model = kind(kind.config_class(vocab_size=len(letters), pad_token_id=0, eos_token_id=1, **SIZES, **options))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        model.save_pretrained(root / name)
        letters.save_pretrained(root / name)
    for name, rows in DATA.items():
        (root / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json"} | rest for name, rest in COLUMNS.items()}
    (root / "dataset_info.json").write_text(json.dumps(info))
    return root


def arguments(folder: Path, out: Path, stage: str, model: str = "Llama", **options) -> dict:
    data = OF_STAGE[stage]
    return {
        "stage": stage, "do_train": True, "finetuning_type": "full", "model_name_or_path": str(folder / model),
        "dataset": data, "eval_dataset": data, "dataset_dir": str(folder), "template": "default", "cutoff_len": 128,
        "output_dir": str(out), "overwrite_cache": True, "max_steps": 3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 3,
        "learning_rate": 0.03, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 7,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip


class Undo(transformers.TrainerCallback):
    def __init__(self, fused):
        self.fused = fused

    def on_train_begin(self, *args, **kwargs):
        self.fused.undo()


def run(folder: Path, out: Path, fused: bool | dict, monkeypatch, undo: bool = False, **options):
    """(log history, trained weights) of a short training. undo: once the trainer is there."""

    def forward(self, x):
        assert not fused or self.out_features != len(tokenizer()), "full logits were made"
        return F.linear(x, self.weight, self.bias)

    given = arguments(folder, out, **options)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        with fuse(**(fused if isinstance(fused, dict) else {})) if fused else nullcontext() as active:
            tuner.run_exp(given, callbacks=[Undo(active)] if undo else None)
    saved = "adapter_model" if given["finetuning_type"] == "lora" else "model"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return history, load_file(out / f"{saved}.safetensors")


def assert_same(theirs, ours, rel: float = 2e-5, floor: float = 2e-6, logits: float | None = None) -> None:
    """floor: absolute difference that a logged number may have; logits: that of logged logits."""
    assert len(theirs[0]) == len(ours[0]) >= 4  # three steps and an evaluation
    for one, other in zip(theirs[0], ours[0], strict=True):
        names = {n for n in one if not n.endswith(("runtime", "per_second"))}
        assert names == {n for n in other if not n.endswith(("runtime", "per_second"))}
        for name in names:
            limit = logits if logits and "logits" in name else floor
            assert other[name] == pytest.approx(one[name], rel=rel, abs=limit), (name, one["step"])
    assert theirs[1].keys() == ours[1].keys()
    for name, weight in theirs[1].items():
        assert float((ours[1][name] - weight).abs().max()) <= rel * float(weight.abs().max()), name


CASES = {
    "dpo": {"stage": "dpo"},
    "dpo with a smaller budget": {"stage": "dpo"},
    "dpo, ld_alpha, ftx": {"stage": "dpo", "ld_alpha": 0.4, "pref_ftx": 0.3},
    "dpo, label smoothing": {"stage": "dpo", "dpo_label_smoothing": 0.1},
    "dpo, bco": {"stage": "dpo", "pref_bco_weight": 0.5},
    **{f"dpo, {name}": {"stage": "dpo", "pref_loss": name} for name in ("hinge", "ipo", "kto_pair", "orpo", "simpo")},
    "dpo, lora": {"stage": "dpo", **LORA},
    "dpo, lora with a saved head": {"stage": "dpo", **LORA, "additional_target": "lm_head"},
    "dpo, accumulation": {"stage": "dpo", "gradient_accumulation_steps": 2},
    "dpo, softcap": {"stage": "dpo", "model": "Gemma2"},
    "dpo, scale": {"stage": "dpo", "model": "Cohere"},
    "kto": {"stage": "kto", "per_device_train_batch_size": 3},
    "kto, ftx": {"stage": "kto", "per_device_train_batch_size": 3, "pref_ftx": 0.3},
    "kto, lora": {"stage": "kto", "per_device_train_batch_size": 3, **LORA},
    "kto, softcap": {"stage": "kto", "per_device_train_batch_size": 3, "model": "Gemma2"},
    "sft": {"stage": "sft", "gradient_accumulation_steps": 2},
    "sft, lora": {"stage": "sft", **LORA},
    "pt": {"stage": "pt", "packing": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run(folder, tmp_path, monkeypatch, case):
    theirs = run(folder, tmp_path / "theirs", False, monkeypatch, **CASES[case])
    fused = {"memory_budget": 4096} if "budget" in case else True
    sums = 3e-4 if CASES[case]["stage"] == "kto" else None  # KTO logs sums over thousands of logits, of about 0
    assert_same(theirs, run(folder, tmp_path / "ours", fused, monkeypatch, **CASES[case]), logits=sums)
    start = load_file(folder / CASES[case].get("model", "Llama") / "model.safetensors")
    trained = {n.removeprefix("base_model.model."): w for n, w in theirs[1].items() if "lora_A" not in n}
    moved = max(float((w - start.get(n, 0)).abs().max()) for n, w in trained.items())
    assert moved > 1e-4  # a run that learns nothing would agree with anything


def of_two_processes(rank, port, folder, out, fused):
    as_launched(rank, 2, port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "destroy_process_group", lambda: None)  # which run_processes does
        forward, wrapped = DistributedDataParallel.forward, []
        patch.setattr(DistributedDataParallel, "forward", lambda *a, **k: wrapped.append(0) or forward(*a, **k))
        result = run(folder, out, fused, patch, stage="dpo", ddp_backend="gloo")
    assert wrapped
    return result


@pytest.mark.distributed
def test_two_processes(folder, tmp_path):
    """DDP reduces the gradients of what runs in the model's own forward, as our head does."""
    outs = {fused: tmp_path / str(fused) for fused in (False, True)}
    assert_same(*(run_processes(of_two_processes, 2, free_port(), folder, out, f)[0] for f, out in outs.items()))


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_a_trainer_keeps_its_head_after_undo(folder, tmp_path, monkeypatch, stage):
    theirs = run(folder, tmp_path / "theirs", False, monkeypatch, stage=stage)
    assert_same(theirs, run(folder, tmp_path / "ours", True, monkeypatch, undo=True, stage=stage))


def test_bfloat16_autocast(folder, tmp_path, monkeypatch):
    """Under accelerate's autocast, with bfloat16's tolerance."""
    options = {"stage": "dpo", "bf16": True}
    theirs = run(folder, tmp_path / "theirs", False, monkeypatch, **options)
    assert_same(theirs, run(folder, tmp_path / "ours", True, monkeypatch, **options), rel=3e-2, floor=3e-2)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"stage": "rm"}, "cannot serve stage: rm"),
        ({"stage": "sft", "use_dft_loss": True}, "cannot serve use_dft_loss"),
        ({"stage": "sft", "use_eaft_loss": True}, "cannot serve use_eaft_loss"),
        ({"stage": "sft", "use_asft_loss": True}, "cannot serve use_asft_loss"),
        ({"stage": "sft", "compute_accuracy": True}, "cannot serve compute_accuracy"),
        ({"stage": "sft", "label_smoothing_factor": 0.1}, "cannot serve label_smoothing_factor"),
        ({"stage": "pt", "label_smoothing_factor": 0.1}, "cannot serve label_smoothing_factor"),
        ({"stage": "sft", "use_hyper_parallel": True}, "cannot serve use_hyper_parallel"),
    ],
)
def test_what_needs_logits_is_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch, options, match):
    monkeypatch.setitem(OF_STAGE, "rm", "pairs")
    with fuse(), pytest.raises(ValueError, match=match):
        tuner.run_exp(arguments(folder, tmp_path, **{"model": "none", **options}))


def test_ray_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("USE_RAY", "1")
    with fuse(), pytest.raises(ValueError, match="cannot serve USE_RAY"):
        tuner.run_exp(arguments(folder, tmp_path, "dpo"))


def test_an_adapter_on_the_head_is_refused(folder, tmp_path):
    with fuse(), pytest.raises(ValueError, match="Remove 'lm_head' from target_modules"):
        tuner.run_exp(arguments(folder, tmp_path, "dpo", **{**LORA, "lora_target": "q_proj,lm_head"}))


def test_a_trainer_with_a_forward_of_its_own_is_refused():
    class Mine(CustomDPOTrainer):
        def concatenated_forward(self, *args, **kwargs):
            raise NotImplementedError

    with fuse(), pytest.raises(TypeError, match="Mine replaces CustomDPOTrainer.concatenated_forward"):
        Mine(model=None)


def test_undo_and_wrong_options():
    before = {kind: kind.__init__ for kind in TRAINERS}
    parse = tuner.get_train_args
    with pytest.raises(TypeError, match="memroy_budget"):
        fuse(memroy_budget=1)
    with pytest.raises(ValueError, match="scale must be positive"):
        fuse(scale=0.0)
    fused = fuse()
    assert all(kind.__init__ is not init for kind, init in before.items())
    with pytest.raises(RuntimeError, match="active already"):
        fuse()
    fused.undo()
    fused.undo()
    assert all(kind.__init__ is init for kind, init in before.items()) and tuner.get_train_args is parse
    with fuse():
        pass
