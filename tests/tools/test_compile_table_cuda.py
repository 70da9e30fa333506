"""The compile table sees what it is there for: narrow accesses in a loop, spills, local memory."""

import shutil
import subprocess

import pytest

pytest.importorskip("triton", reason="its disassembler reads the machine code")

from tools.compile_table import cuda_table as table

SOURCE = """
__device__ float sum(float v) { return v; }
__device__ float sum(float4 v) { return v.x + v.y + v.z + v.w; }
template <typename T>
__global__ void scan_kernel(const T* x, float* out, int n) {
  float total = 0;
  for (int i = threadIdx.x; i < n; i += 256) total += sum(x[i]);
  out[threadIdx.x] = total;
}
template __global__ void scan_kernel<float>(const float*, float*, int);
template __global__ void scan_kernel<float4>(const float4*, float*, int);

__global__ void local_kernel(const int* at, float* out) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[at[i]] = out[i];
  for (int i = 0; i < 64; ++i) out[i] = values[i];
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_faults_of_machine_code(tmp_path):
    (tmp_path / "kernels.cu").write_text(SOURCE)
    subprocess.run(["nvcc", "-cubin", "-arch=sm_90", "kernels.cu", "-o", "kernels.cubin"], cwd=tmp_path, check=True)
    rows = {str(row["kernel"]): row for row in table.readable(table.read(tmp_path / "kernels.cubin"))}
    assert set(rows) == {"scan_kernel<float>", "scan_kernel<float4>", "local_kernel"}
    assert "narrow accesses in a loop: 32x" in table.faults(rows["scan_kernel<float>"])[0]
    assert table.faults(rows["scan_kernel<float4>"]) == []
    assert any("local_bytes" in fault for fault in table.faults(rows["local_kernel"]))


def test_a_changed_number_is_a_difference():
    kept = table.table([{"kernel": "a<1>", "registers": 40}, {"kernel": "gone", "registers": 8}], "13.0")
    seen = table.table([{"kernel": "a<1>", "registers": 41}], "13.0")
    assert table.differences(kept, seen) == ["a<1>: was 40,,,,,, is 41,,,,,", "gone: was 8,,,,,, is absent"]
