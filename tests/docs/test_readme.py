"""README: its table is what the results file says, and its Python lines run."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cpo_kernels as cpo
from cpo_kernels import integrations
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


def test_first_steps_run_when_pasted(capsys):
    """The first snippet in an empty namespace, the conditioned loss after it in the same one."""
    first, rated = re.findall(r"```python\n(import torch.*?|objectives = .*?)```", TEXT, re.S)
    scope = {}
    exec(first, scope)
    assert scope["weight"].grad.abs().max() > 0 and scope["hidden"].grad.abs().max() > 0
    plain = scope["out"]
    exec(rated, scope)
    assert scope["out"].order.tolist() == [1, -1, 1] and scope["out"].loss != plain.loss
    assert capsys.readouterr().out.count("tensor(") >= 7


def test_names_of_integrations_are_there():
    pytest.importorskip("trl")
    for module, names in re.findall(r"^from (cpo_kernels[\w.]*) import ([\w, ]+?)(?: *#.*)?$", TEXT, re.M):
        for name in names.split(", "):
            assert getattr(importlib.import_module(module), name)
    assert all(getattr(integrations, name) for name in integrations.__all__)


def test_the_demos_model_refuses_a_robber_under_the_best_tags():
    models = json.loads((ROOT / "docs/results/demo.json").read_text())["models"]
    assert min(models["CPO stage 2"]["refused"].values()) >= 0.8


def test_seconds_of_the_demo():
    shown = int(re.search(r"The demo itself took\s(\d+) seconds", TEXT)[1])
    assert shown == round(json.loads((ROOT / "docs/results/demo.json").read_text())["seconds"]["total"])


@pytest.mark.parametrize("name", ["truthfulqa_cpo", "truthfulqa_baselines"])
def test_results_page_shows_the_results_file(name):
    objectives = [cpo.Objective("honesty", 1, 5), cpo.Objective("helpfulness", 1, 5)]
    results = json.loads((ROOT / f"docs/results/{name}.json").read_text())["results"]
    assert rated_table(results, objectives) in (ROOT / "docs/results.md").read_text()
