"""Memory that the C library keeps for the next step."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from cpo_kernels.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
faults()
kept = faults()
assert keep_freed_memory(False)
faults()
print(kept, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc's malloc")
def test_a_freed_block_is_written_again_without_page_faults():
    """64 MiB are 16,384 pages, or 32 huge ones."""
    out = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    kept, returned = map(int, out.split())
    assert kept < 16 < returned
