"""README: its table is what the results file says, and its Python lines run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cpo_kernels as cpo
from cpo_kernels.evaluation.tables import rated_table
from tests.support.heads import make_batch, relative_error

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_table_equals_the_results():
    subprocess.run([sys.executable, "-m", "benchmarks.plot", "--check"], cwd=ROOT, check=True)


def test_explain_prints_what_the_readme_shows():
    shown = re.search(r">>> print\((cpo\.explain\(.*\))\)\n(.*)\n", TEXT)
    assert str(eval(shown[1], {"cpo": cpo})) == shown[2]


def test_the_two_lines_compute_what_the_four_do():
    batch = make_batch(dtype=torch.float32, bias=False)
    four, two = re.findall(r"```python\n(logits = .*?|hidden = .*?)```", TEXT, re.S)
    names = {"F": F, "cpo": cpo, "beta": 0.3, "labels": batch.labels, "ref_logps": batch.ref_logps, "batch": {}}
    pad = torch.nn.functional.pad(batch.hidden, (0, 0, 0, 1))  # the last position predicts nothing

    class Out:
        logits, last_hidden_state = pad @ batch.weight.t(), pad

    class Model:
        lm_head = type("Head", (), {"weight": batch.weight})

        def __call__(self, **kwargs):
            return Out

        def model(self, **kwargs):
            return Out

    losses = []
    for lines in (four, two):
        scope = dict(names, model=Model())
        exec(lines, scope)
        losses.append(scope["loss"])
    assert relative_error(losses[1], losses[0]) < 1e-5
    for seen, want in zip(*(torch.autograd.grad(x, batch.leaves) for x in losses[::-1]), strict=True):
        assert relative_error(seen, want) < 1e-4


def test_the_conditioned_loss_runs_with_and_without_its_plan():
    """As shown, but for what is this batch's: vocabulary, dtype, device."""
    batch = make_batch(dtype=torch.float32, bias=False)
    rated, planned = re.findall(r"```python\n(objectives = .*?|plan = .*?)```", TEXT, re.S)
    for shown, here in {"151936": "101", "torch.bfloat16": "torch.float32, device='cpu'", '"cuda"': '"cpu"'}.items():
        assert shown in planned
        planned = planned.replace(shown, here)
    scope = {name: getattr(batch, name) for name in ("hidden", "weight", "labels", "ref_logps")}
    scope |= {"cpo": cpo, "torch": torch, "pairs": torch.tensor([[0, 1], [2, 3], [1, 3]])}
    scope |= {"scores": 1 + 4 * torch.rand(4, 2), "conditions": 1 + 4 * torch.rand(3, 2)}
    exec(rated, scope)
    want = scope["out"]
    exec(planned, scope)
    assert scope["out"] is not want and torch.equal(scope["out"].loss, want.loss)


@pytest.mark.parametrize("name", ["truthfulqa_cpo", "truthfulqa_baselines"])
def test_results_page_shows_the_results_file(name):
    objectives = [cpo.Objective("honesty", 1, 5), cpo.Objective("helpfulness", 1, 5)]
    results = json.loads((ROOT / f"docs/results/{name}.json").read_text())["results"]
    assert rated_table(results, objectives) in (ROOT / "docs/results.md").read_text()
