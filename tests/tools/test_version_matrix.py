"""tools/version_matrix.py asks pip for the right versions, never for a CUDA build, and reports what the tests said."""

import json
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import version_matrix, wheel_matrix

METADATA = """Metadata-Version: 2.4
Name: cpo-kernels
Requires-Dist: torch>=2.10
Provides-Extra: train
Requires-Dist: transformers<6,>=5.0; extra == "train"
Requires-Dist: tqdm<5,>=4.66; extra == "train"
Provides-Extra: docs
Requires-Dist: mkdocs; extra == "docs"
"""
PINNED = {"torch": "2.13.0", "transformers": "5.23.0"}


@pytest.fixture
def needed(tmp_path):
    wheel = tmp_path / "cpo.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("cpo_kernels-0.1.0.dist-info/METADATA", METADATA)
    return version_matrix.needs(wheel)


@pytest.mark.parametrize(
    "row, want",
    [
        ({}, {"torch": "==2.13.0", "transformers": "==5.23.0", "tqdm": "<5,>=4.66"}),
        ({"*": "lowest"}, {"torch": "==2.10", "transformers": "==5.0", "tqdm": "==4.66"}),
        ({"*": "newest"}, {"torch": "", "transformers": "", "tqdm": ""}),
        ({"transformers": "lowest"}, {"torch": "==2.13.0", "transformers": "==5.0", "tqdm": "<5,>=4.66"}),
    ],
    ids=str,
)
def test_what_pip_is_asked_for(needed, row, want):
    assert version_matrix.requirements(row, needed, PINNED) == want


def test_rows_that_ask_for_the_same_are_tried_once():
    asked = {"trl": "==1.16", "torch": "==2.13.0+cpu", "tqdm": "<5,>=4.66"}
    assert version_matrix.identity(asked) == version_matrix.identity(asked | {"trl": "==1.16.0", "torch": "==2.13.0"})
    for other in ({"trl": "==1.16.1"}, {"tqdm": ""}, {"torch": "==2.14.0"}):
        assert version_matrix.identity(asked) != version_matrix.identity(asked | other)


def test_a_package_without_a_lower_bound_is_refused():
    with pytest.raises(ValueError, match="peft<1: pyproject.toml must give it one lower bound"):
        version_matrix.lowest(Requirement("peft<1"))


@pytest.mark.parametrize(
    "release, want",
    [
        (("2.13.0+cpu", ""), ("==2.13.0+cpu", "")),
        (("2.14.1", "only as a CUDA build"), ("==2.13.0", "only as a CUDA build")),
        (("", "No matching distribution"), ("==2.13.0", "No matching distribution")),
    ],
)  # fmt: skip
def test_torch_is_never_a_cuda_build(monkeypatch, release, want):
    asked_for = []
    monkeypatch.setattr(version_matrix, "torch_release", lambda _, text: asked_for.append(text) or release)
    assert version_matrix.cpu_torch({"torch": "==2.10"}, "2.13.0") == want and asked_for == ["torch==2.10"]


@pytest.mark.parametrize(
    "needs, want",
    [
        (["filelock", 'nvidia-cublas==13; platform_system == "Linux"'], "pip has torch 2.14.1 only as a CUDA build"),
        (["filelock", "cuda-toolkit[cublas]==13"], "pip has torch 2.14.1 only as a CUDA build"),
        (["filelock", "sympy"], ""),
    ],
)
def test_a_cuda_build_is_known_by_what_it_needs(monkeypatch, needs, want):
    report = json.dumps({"install": [{"metadata": {"version": "2.14.1", "requires_dist": needs}}]})
    done = type("Done", (), {"returncode": 0, "stdout": report, "stderr": ""})
    monkeypatch.setattr(wheel_matrix.subprocess, "run", lambda *_, **__: done)
    assert wheel_matrix.torch_release("python", "torch") == ("2.14.1", want)


def report(path, *cases):
    skipped = sum("skipped" in case for case in cases)
    found = "".join(f'<testcase classname="tests.test_a" name="{i}">{c}</testcase>' for i, c in enumerate(cases))
    path.write_text(f'<testsuites><testsuite tests="{len(cases)}" skipped="{skipped}">{found}</testsuite></testsuites>')
    return version_matrix.outcome(path)


def test_what_the_tests_said(tmp_path):
    path = tmp_path / "report.xml"
    assert report(path, "", "", "<skipped/>") == {"result": "passed", "passed": 2, "skipped": 1, "failures": []}
    failed = report(path, "", "<failure/>", "<error/>")
    assert failed == {"result": "failed", "passed": 1, "skipped": 0, "failures": ["test_a::1", "test_a::2"]}
    assert report(path, "<skipped/>")["result"] == "failed"  # nothing was tried
    assert report(path)["result"] == "failed"


def test_the_table():
    stamp = {"date": "2026-11-29T04:00:00+00:00", "commit": "abc"}
    bounds = dict.fromkeys(version_matrix.PACKAGES, ">=1,<6")
    versions = dict.fromkeys(version_matrix.PACKAGES, "5.2.0") | {"trl": "6.0.1", "torch": "2.13.0+cpu"}
    ran = {"result": "failed", "versions": versions, "passed": 7, "skipped": 2, "failures": ["a::b"]}
    absent = {"result": version_matrix.UNAVAILABLE, "why": "only CUDA"}
    text = version_matrix.table(
        {"bounds": bounds, "rows": {"newest": ran | stamp, "newest torch": absent | stamp}}
    ).splitlines()
    assert text[2].endswith(
        "| 6.0.1 (outside our bounds) | 5.2.0 | 5.2.0 | 5.2.0 | 7 passed, **1 failed**, 2 skipped |"
    )
    assert text[2].startswith("| newest | 2.13.0+cpu | 5.2.0 |")
    assert text[3] == "| newest torch |  |  |  |  |  |  | not available here |"
    assert "newest torch: only CUDA." in text


def test_the_results_are_of_these_bounds():
    """A bound of pyproject.toml changes together with the results."""
    tomllib = pytest.importorskip("tomllib")
    content = json.loads(version_matrix.OUT.read_text())
    project = tomllib.loads((version_matrix.ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for extra in version_matrix.EXTRAS for need in project["optional-dependencies"][extra]]
    asked = {need.name: need.specifier for need in map(Requirement, [*project["dependencies"], *extras])}
    assert content["bounds"].keys() == set(version_matrix.PACKAGES)
    for name, bounds in content["bounds"].items():
        assert asked[name] == Requirement(name + bounds).specifier, name
    assert set(content["rows"]) == set(version_matrix.ROWS) and all(
        Path(version_matrix.ROOT, test).exists() for test in content["tests"]
    )
