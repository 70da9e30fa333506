"""Documentation: every public name has a docstring, examples and snippets run, the site builds without broken links."""

import doctest
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cpo_kernels
from cpo_kernels import integrations
from tests.support import tiny
from tests.support.heads import make_batch

ROOT = Path(__file__).parents[2]
MODULES = (
    "losses.fused",
    "losses.kto",
    "ops.token_logps",
    "losses.preference",
    "objectives",
    "head.strategy",
    "backends.vocab_parallel",
)


def test_every_public_name_is_documented():
    for name in cpo_kernels.__all__:
        value = getattr(cpo_kernels, name)
        if not callable(value):
            continue
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name  # a dataclass writes its signature
        for method, function in inspect.getmembers(value, inspect.isfunction):
            if not method.startswith("_") and function.__qualname__.startswith(name):
                assert function.__doc__, f"{name}.{method}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"cpo_kernels.{name}")
    extra = {"torch": importlib.import_module("torch")}
    failed, _ = doctest.testmod(module, extraglobs=extra, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_the_site_builds(tmp_path):
    """`--strict`: a link or anchor that leads nowhere fails. Constructors show their arguments, tables their rows."""
    pytest.importorskip("material")
    env = {**os.environ, "PYTHON": sys.executable, "NO_MKDOCS_2_WARNING": "1"}
    command = (ROOT / "tools" / "docs.sh", tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-2000:]
    pages = "".join(page.read_text() for page in (tmp_path / "api").glob("*.html"))
    for name in [*cpo_kernels.__all__, *integrations.__all__]:
        assert re.search(rf'id="cpo_kernels\.[\w.]*\b{name}"', pages) or name == "LOSS_TYPES", name
    for argument in ("memory_budget", "tie_margin", "ignore_index", "head_softcap"):
        assert argument in pages
    assert "Initialize internal Module state" not in pages
    assert all(f"<code>{name}</code>" in (tmp_path / "loss_types.html").read_text() for name in cpo_kernels.LOSS_TYPES)
    index = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert {"index.html", "getting_started.html", "concepts.html"} <= {entry["location"] for entry in index["docs"]}


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in menu, page


def test_links_between_files():
    """Of README and docs as they are read in the repository: files and headings that are there."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            if path.startswith("https:"):
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


def snippets(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


def test_getting_started(tmp_path, monkeypatch):
    """Its data and recipe are read as shown; its Python lines use a model that was trained with them."""
    from cpo_kernels.training.loop import train

    monkeypatch.chdir(tmp_path)
    (data,), (recipe,), (scorer, use) = (snippets("getting_started.md", kind) for kind in ("json", "yaml", "python"))
    names = {}
    exec(scorer, names)
    assert names["score"](["Who?", "When?"], ["I do not know.", "x" * 900]) == [[5.0, 1.35], [3.0, 5.0]]
    Path("ratings.jsonl").write_text(data * 8)
    Path("recipe.yaml").write_text(recipe)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}"
    overrides = [
        f"model={{config: {json.dumps(tiny.MODEL)}}}",
        "run_dir=runs/cdpo",
        "stage=cdpo",
        "training.max_steps=1",
    ]
    train("recipe.yaml", tokenizer=tokenizer, overrides=[*overrides, "training.progress=false"])
    exec(use, {})


def test_own_loop(monkeypatch):
    """The model's loop as pasted; the plan as shown, but for what is this batch's: vocabulary, dtype, device."""
    model, planned = snippets("own_loop.md")
    names = {}
    exec(model, names)
    assert names["out"].loss.isfinite() and names["policy"].lm_head.weight.grad.abs().max() > 0
    batch = make_batch(dtype=torch.float32, bias=False)
    for shown, here in {"151936": "101", "torch.bfloat16": "torch.float32, device='cpu'", '"cuda"': '"cpu"'}.items():
        assert shown in planned
        planned = planned.replace(shown, here)
    scope = {name: getattr(batch, name) for name in ("hidden", "weight", "labels", "ref_logps")}
    objectives = [cpo_kernels.Objective("a", 1, 5), cpo_kernels.Objective("b", 1, 5, weight=2.0)]
    given = {"scores": 1 + 4 * torch.rand(4, 2), "conditions": 1 + 4 * torch.rand(3, 2)}
    given["pairs"] = torch.tensor([[0, 1], [2, 3], [1, 3]])
    scope |= given | {"torch": torch, "loss_fn": cpo_kernels.FusedLinearCPOLoss(objectives)}
    exec(planned, scope)
    heads = (batch.hidden, batch.weight, batch.labels)
    want = scope["loss_fn"](*heads, ref_logps=batch.ref_logps, **given)
    assert torch.equal(scope["out"].loss, want.loss)


def test_unpaired_responses():
    """KTO's snippet of the loss types, as shown."""
    (snippet,) = snippets("loss_types.md")
    batch, other = make_batch(dtype=torch.float32, bias=False), make_batch(dtype=torch.float32, bias=False, seed=1)
    scope = {name: getattr(batch, name) for name in ("hidden", "weight", "labels", "ref_logps")}
    scope |= {f"kl_{name}": getattr(other, name) for name in ("hidden", "labels")}
    scope |= {"cpo": cpo_kernels, "ref_kl_logps": other.ref_logps - 60, "desirable": torch.arange(4) > 1}
    exec(snippet, scope)
    assert scope["kl"] > 0 and batch.weight.grad.abs().max() > 0


def test_the_values_of_concepts():
    """The table of R is what `value` computes."""
    objectives = [cpo_kernels.Objective("honesty", 1, 5), cpo_kernels.Objective("helpfulness", 1, 5)]
    rows = re.findall(
        r"^\| \"(?:.*?)\" \| (\d) \| (\d) \| (.*?) \| (.*?) \|$", (ROOT / "docs/concepts.md").read_text(), re.M
    )
    assert len(rows) == 2
    for honesty, helpfulness, *shown in rows:
        for condition, text in zip(([5, 5], [5, 1]), shown, strict=True):
            want = cpo_kernels.value([float(honesty), float(helpfulness)], condition, objectives).item()
            assert float(text.strip("*").replace("−", "-")) == want


def test_repr_of_a_loss():
    assert repr(cpo_kernels.FusedLinearCPOLoss()) == "FusedLinearCPOLoss(beta=0.1, loss_type='sigmoid')"
    types = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]}
    fused = cpo_kernels.FusedLinearCPOLoss(beta=0.2, **types, softcap=30.0, impl="cpu")
    assert repr(fused) == (
        "FusedLinearCPOLoss(beta=0.2, loss_type=['sigmoid', 'sft'], loss_weights=(1.0, 0.5), softcap=30.0, impl='cpu')"
    )
    rated = cpo_kernels.CPOLoss([cpo_kernels.Objective("honesty", 1, 5)], loss_type="hinge", margin=0.5)
    assert repr(rated) == "CPOLoss(beta=0.1, loss_type='hinge', objectives=['honesty'], margin=0.5)"
