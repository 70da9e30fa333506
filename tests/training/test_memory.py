"""Memory that the C library keeps for the next step."""

import ctypes
import subprocess
import sys

import pytest

from cpo_kernels import cli
from cpo_kernels.training import loop, memory

FAULTS = """
import resource, torch
from cpo_kernels.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
returned = faults()
assert keep_freed_memory()
faults()
print(faults(), returned)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's malloc"
)
def test_a_freed_block_is_written_again_without_page_faults():
    """64 MiB are 16,384 pages, or 32 huge ones."""
    out = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    kept, returned = map(int, out.split())
    assert kept < 16 < returned


@pytest.mark.parametrize("flag, gpu, kept", [(None, False, 1), (None, True, 0), ("yes", True, 1), ("0", True, 0)])
def test_training_on_a_cpu_keeps_it(tmp_path, monkeypatch, flag, gpu, kept):
    calls = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    if flag is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    else:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)

    def train(config):
        raise ValueError("far enough")

    monkeypatch.setattr(loop, "train", train)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: sft\nmodel: {name: x}\ndata: {train: [{path: x.jsonl}]}\n")
    assert cli.main(["train", str(recipe)]) == 2 and len(calls) == kept
