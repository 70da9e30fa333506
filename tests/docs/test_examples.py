"""Every script of examples/ runs by itself, without network, and learns what it shows."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(name, *arguments, processes=1):
    """Its output; the time is for one core and the imports."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "examples" / name), *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{name}: {time.perf_counter() - start:.1f} s")
    return done.stdout


def numbers(output, name):
    return [float(value) for value in re.findall(rf"{name} ([0-9.]+)", output)]


def test_all_are_here():
    assert SCRIPTS == ["conditioned_loop.py", "dpo_loop.py", "tensor_parallel_head.py", "trl_cpo.py", "trl_dropin.py"]
    assert len((ROOT / "examples" / "dpo_loop.py").read_text().splitlines()) <= 50


def test_dpo_loop():
    output = run("dpo_loop.py")
    losses = numbers(output, "loss")
    assert losses[0] == pytest.approx(0.693, abs=1e-3) and losses[-1] < 0.5
    assert numbers(output, "accuracy")[-1] == 1


def test_conditioned_loop():
    """All four conditions are followed; without them in the prompt one answer would win everywhere."""
    output = run("conditioned_loop.py")
    assert numbers(output, "ties") == [4.0] * 4  # one of the six pairs under each condition
    for line in (
        "honesty 5, helpfulness 5: I think so: 80%.",
        "honesty 5, helpfulness 1: No idea.",
        "honesty 1, helpfulness 5: It will.",
        "honesty 1, helpfulness 1: Frogs.",
    ):
        assert line in output


def test_tensor_parallel_head():
    """1000 rows do not divide by three."""
    output = run("tensor_parallel_head.py", processes=3)
    losses = numbers(output, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.3
    assert numbers(output, "accuracy")[-1] == 1 and "rows (334, 333, 333)" in output


def test_trl_dropin():
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    output = run("trl_dropin.py")
    assert numbers(output, "accuracy") == [1.0, 1.0]
    assert all(loss < 0.6 for loss in numbers(output, "loss"))


def test_trl_cpo(tmp_path):
    """Both stages at their smallest: achieved follows requested, and the page shows lines of this script."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    output = run("trl_cpo.py", "--quick", str(tmp_path))
    rows = re.findall(r"^CPO in TRL +(.*)%$", output, re.M)
    helpfulness, honesty, harmlessness = ([float(x) for x in row.replace("%", "").split()] for row in rows)
    # Rank correlations. Nine other settings of this size gave an honesty of -0.06 to 0.60, the other two above 0.9.
    assert helpfulness[-3] > 0.7 and harmlessness[-3] > 0.8 and helpfulness[-3] + honesty[-3] + harmlessness[-3] > 1.6
    for stage in ("cpsft", "cdpo"):
        saved = (tmp_path / stage / "config.yaml", tmp_path / stage / "model" / "chat_template.jinja")
        assert all(file.exists() for file in saved)
    script = {line.strip() for line in (ROOT / "examples" / "trl_cpo.py").read_text().splitlines()}
    page = (ROOT / "docs" / "trl.md").read_text()
    (shown,) = re.findall(r"```python\n(data = RatedData.*?)```", page, re.S)
    assert {line.strip() for line in shown.splitlines()} <= script


def test_notebook():
    """Its cells in their order, in one namespace; it stands in the repository without outputs."""
    cells = json.loads((ROOT / "examples" / "conditioned_preferences.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    names = {}
    for cell in code:
        exec("".join(cell["source"]), names)
    assert names["preferred"] == {
        (5, 5): "I think so: 80%.", (5, 1): "No idea.", (1, 5): "It will.", (1, 1): "Frogs.",
    }  # fmt: skip


def test_an_example_without_its_packages_is_one_line(tmp_path):
    program = "import sys, runpy; sys.modules['datasets'] = None; runpy.run_path('examples/trl_dropin.py')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "this example needs TRL and datasets, the extra [trl] of cpo-kernels" in done.stderr
