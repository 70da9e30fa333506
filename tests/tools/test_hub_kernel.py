"""The Kernel Hub's form of the library, loaded from a local folder as the Hub's loader does, beside the package."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cpo_kernels
from tests.support.heads import make_batch, relative_error

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "tools" / "hub_kernel.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    """What `kernels` does with a folder: the package under the id of its metadata."""
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with pytest.warns(RuntimeWarning, match="C\\+\\+ extension could not be loaded"):  # it has none
        spec.loader.exec_module(module)
        assert module.LOSS_TYPES  # the first public name imports them all
    return module


def check(kernel):
    """Loss and gradients are those of the package."""
    batch, results = make_batch(), []
    for library in (kernel, cpo_kernels):
        loss_fn = library.FusedLinearCPOLoss(beta=0.3, memory_budget=18 * 101 * 8)
        loss = loss_fn(batch.hidden, batch.weight, batch.labels, batch.bias, ref_logps=batch.ref_logps).loss
        loss = loss + library.linear_token_logps(batch.hidden, batch.weight.detach(), batch.labels).square().sum()
        results.append([loss, *torch.autograd.grad(loss, batch.leaves)])
    for seen, want in zip(*results, strict=True):
        assert relative_error(seen, want) < 1e-12


def test_it_computes_what_the_package_does(kernel):
    assert kernel.__file__ != cpo_kernels.__file__ and set(kernel.__all__) == set(cpo_kernels.__all__)
    check(kernel)
    batch = make_batch(2, 3, 5, 11, torch.float32)
    logps = kernel.linear_token_logps(batch.hidden, batch.weight, batch.labels, impl="triton")  # in the interpreter
    want = cpo_kernels.linear_token_logps(batch.hidden, batch.weight, batch.labels)
    assert relative_error(logps, want) < 1e-6


def test_nothing_of_it_imports_the_package(folder):
    for path in (folder / "torch-ext").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert node.__dict__.get("level") or not any(n.startswith("cpo_kernels") for n in named), path
        text = path.read_text()
        assert '"cpo_kernels::' not in text and "torch.ops.cpo_kernels" not in text and '"cpo_kernels.' not in text


def test_the_hubs_own_loader(folder):
    kernels = pytest.importorskip("kernels")
    from kernels._rust import Build

    assert len(Build.open(ROOT).general.backends) == 3
    check(kernels.get_local_kernel(folder, backend="cpu"))
