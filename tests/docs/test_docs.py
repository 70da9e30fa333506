"""The API reference is made of the docstrings (`make docs`): each public name has one, and its examples run."""

import doctest
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cpo_kernels

ROOT = Path(__file__).parents[2]
MODULES = (
    "losses.fused",
    "ops.token_logps",
    "losses.preference",
    "objectives",
    "head.strategy",
    "backends.vocab_parallel",
)
INTEGRATIONS = ("fused_head", "heads", "transformers", "trl")


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


def test_the_reference_builds(tmp_path):
    pytest.importorskip("pdoc")
    pytest.importorskip("trl")
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    command = (ROOT / "tools" / "docs.sh", tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and "Warn:" not in done.stderr, done.stderr[-2000:]
    page = (tmp_path / "cpo_kernels.html").read_text()
    for name in cpo_kernels.__all__:
        assert f'id="{name}"' in page, name
    for name in INTEGRATIONS:
        assert (tmp_path / "cpo_kernels" / "integrations" / f"{name}.html").exists()
    assert not (tmp_path / "cpo_kernels" / "bench.html").exists()
