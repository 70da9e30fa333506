"""The snippets of docs/migration.md: before and after give the same loss and gradients."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cpo_kernels as cpo
from tests.support.heads import make_batch, relative_error

TEXT = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))
SNIPPETS = [
    (f"{title} {k // 2 + 1}", *blocks[k : k + 2])
    for title, text in SECTIONS.items()
    for blocks in [re.findall(r"```python\n(.*?)```", text, re.S)]
    for k in range(0, len(blocks), 2)
]


def names(tmp_path):
    batch = make_batch(dtype=torch.float32, bias=False)
    given = {name: getattr(batch, name) for name in ("hidden", "weight", "labels", "ref_logps")}
    given |= {"cpo": cpo, "torch": torch, "F": F, "beta": 0.3, "ref_hidden": (batch.hidden * 0.9).detach()}
    given |= {"desirable": torch.tensor([True, False, False, True]), "kl": torch.tensor(0.4)}
    return given | {"folder": str(tmp_path)}


def trl_names():
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.support.trl_runs import DATA, TOKENIZER, make

    settings = {"bf16": False, "use_cpu": True, "max_steps": 2, "logging_steps": 1, "optim": "sgd", "report_to": []}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False, "learning_rate": 0.03}
    return {"model": make, "tokenizer": TOKENIZER, "dataset": datasets.Dataset.from_dict(DATA), "settings": settings}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("title", "before", "after"), SNIPPETS, ids=[title for title, *_ in SNIPPETS])
def test_before_and_after(title, before, after, tmp_path):
    if "liger" in before:
        pytest.importorskip("liger_kernel")
    results = []
    for snippet in (before, after):
        given = names(tmp_path) | (trl_names() if "trl" in snippet else {})
        exec(snippet, given)
        if isinstance(given["loss"], float):
            weights = dict(given["trainer"].model.named_parameters())
            results.append([torch.tensor(given["loss"]), *(weights[name].detach() for name in sorted(weights))])
        else:
            results.append([given["loss"], *torch.autograd.grad(given["loss"], (given["hidden"], given["weight"]))])
    for b, a in zip(*results, strict=True):
        assert float(b.abs().max()) > 0 and relative_error(a, b) < 2e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "orpo"])
def test_trls_cpo_and_orpo_trainers_in_other_settings(loss_type, adapter, tmp_path):
    """Contrastive CPO and ORPO with and without LoRA: accumulation, checkpointing and evaluation log the same."""
    pairs = [pair for title, *pair in SNIPPETS if title.startswith("TRL's CPO and ORPO")]
    logs = []
    for snippet in pairs[loss_type == "orpo"]:
        given = names(tmp_path) | trl_names()
        given["settings"] |= {"gradient_checkpointing": True, "per_device_train_batch_size": 2}
        given["settings"] |= {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
        from tests.support.trl_runs import lora

        given["adapter"] = lora() if adapter else None
        snippet = snippet.replace('loss_type="simpo"', f'loss_type="{loss_type}"').replace(" simpo_gamma=0.4,", "")
        whole = "train_dataset=dataset, eval_dataset=dataset, peft_config=adapter"
        exec(snippet.replace("train_dataset=dataset", whole), given)
        logs.append(given["trainer"].state.log_history)
    assert len(logs[0]) == len(logs[1]) == 5
    for before, after in zip(*logs, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            if "logits" not in name and "runtime" not in name and "per_second" not in name:
                assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-5), name


def test_every_section_has_pairs_of_snippets():
    assert list(SECTIONS) == [
        "Your own DPO loss", "Supervised fine-tuning", "Liger", "TRL", "TRL's CPO and ORPO trainers"
    ]  # fmt: skip
    assert len(SNIPPETS) == 9
