"""The newest, the pinned and the lowest supported versions of what we adapt to, each tried with one wheel.

    .venv/bin/python -m tools.version_matrix [--rows newest lowest ...] [--work build/versions]

Builds the wheel once, with the torch of the Python that runs this, and gives each row of `ROWS` a new virtual
environment below WORK, which is deleted afterwards. "lowest" is the lower bound of pyproject.toml, "newest" what pip
has, bounds or no bounds; every other version is the one of constraints.txt. A torch that pip has only as a CUDA build
is not tried: its rows say so where torch is their point, and take the pinned torch otherwise.

Prints the table and writes benchmarks/results/versions.json, from which `python -m benchmarks.plot` fills docs/trl.md.
Rows that are not asked for keep what the file says of them. Exits with 1 where a row failed.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from cpo_kernels.environment import commit
from tools.wheel_matrix import build_wheel, torch_release

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "versions.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
EXTRAS = ("train", "data", "trl", "peft")
# Row -> "newest" or "lowest" for some packages, "*" for all; the others are pinned.
ROWS: dict[str, dict[str, str]] = {
    "pinned": {},
    "newest": {"*": "newest"},
    "newest torch": {"torch": "newest"},
    "lowest": {"*": "lowest"},
    "lowest torch": {"torch": "lowest"},
    "lowest transformers": {"transformers": "lowest"},
    "lowest TRL": {"trl": "lowest"},
    "lowest PEFT": {"peft": "lowest"},
}
# What touches other packages: TRL's trainers, the heads of transformers' classes, adapters, and the head itself.
TESTS = (
    "tests/integrations/test_causal_lm.py",
    "tests/integrations/test_trl_head.py",
    "tests/integrations/test_trl_trainer.py",
    "tests/training/test_adapters.py",
    "tests/head/test_products.py",
)
UNAVAILABLE = "not available here"
Row = dict[str, Any]


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def needs(wheel: Path) -> dict[str, Requirement]:
    """Package -> what the wheel's metadata asks for, of itself and of EXTRAS."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    wanted = [Requirement(text) for text in asked]
    return {
        need.name: need for need in wanted if any(not need.marker or need.marker.evaluate({"extra": e}) for e in EXTRAS)
    }


def lowest(need: Requirement) -> str:
    """The version after >=; a package without such a bound raises ValueError."""
    bounds = [part.version for part in need.specifier if part.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{need.name}{need.specifier}: pyproject.toml must give it one lower bound, >=X")
    return bounds[0]


def requirements(row: dict[str, str], needed: dict[str, Requirement], pinned: dict[str, str]) -> dict[str, str]:
    """Package -> what pip is asked for."""
    asked = {}
    for name, need in needed.items():
        wanted = row.get(name, row.get("*", "pinned"))
        if wanted == "pinned":
            asked[name] = f"=={pinned[name]}" if name in pinned else str(need.specifier)
        else:
            asked[name] = f"=={lowest(need)}" if wanted == "lowest" else ""
    return asked


def identity(asked: dict[str, str]) -> frozenset[Any]:
    """Equal where pip would install the same: 1.16 is 1.16.0, and 2.13.0+cpu is 2.13.0."""
    return frozenset(
        (name, Version(Version(spec[2:]).public) if spec.startswith("==") else spec) for name, spec in asked.items()
    )


def cpu_torch(asked: dict[str, str], pinned: str) -> tuple[str, str]:
    """torch as pip is asked for it, never a CUDA build; and why that one cannot be had, or ''."""
    version, why = torch_release(sys.executable, f"torch{asked['torch']}")
    return (f"=={pinned}", why) if why else (f"=={version}", "")


def outcome(report: Path) -> Row:
    """Counts of pytest's XML report, and the names of the tests that failed."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{report} holds no test suite")
    failures = [
        f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    return {
        "result": "failed" if failures or total == skipped else "passed",
        "passed": total - skipped - len(failures),
        "skipped": skipped,
        "failures": failures,
    }


def installed(python: Path) -> dict[str, str]:
    ask = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES}}}))"
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", ask], text=True))
    return found


def tried(asked: dict[str, str], wheel: Path, place: Path) -> Row:
    """Installs what is asked for and the wheel below `place`, runs the tests there, away from our source tree."""
    python, source = place / "venv" / "bin" / "python", place / "source"
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    kept = pins()
    tools = [f"{name}=={kept[name]}" for name in ("pytest", "hypothesis")]
    done = subprocess.run(
        [*install, *(name + spec for name, spec in asked.items()), *tools], stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        return {"result": "not installable", "why": " ".join(re.findall(r"ERROR: (.*)", done.stderr)) or done.stderr}
    subprocess.run([*install, "--no-deps", wheel], check=True)
    shutil.copytree(ROOT / "tests", source / "tests")
    (source / "pytest.ini").write_text("[pytest]\n")  # not our pyproject.toml above build/, which needs plugins
    report = place / "report.xml"
    command = [python, "-m", "pytest", "-q", "--tb=short", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-k", "not compile", f"--junitxml={report}", *TESTS]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(source)}
    subprocess.run(command, cwd=source, env=environment)
    return {"versions": installed(python), **outcome(report)}


def cell(row: Row, name: str, needed: dict[str, str]) -> str:
    version = row.get("versions", {}).get(name, "")
    outside = version and not Requirement(f"{name}{needed[name]}").specifier.contains(Version(version).public)
    return f"{version} (outside our bounds)" if outside else version


def table(content: Row) -> str:
    """A line for each row, then the reasons of those that were not tried."""
    lines = [f"| | {' | '.join(PACKAGES)} | tests |", "|---" * (len(PACKAGES) + 2) + "|"]
    notes = []
    for name, row in content["rows"].items():
        text = row["result"]
        if "passed" in row:
            text = f"{row['passed']} passed" + (f", **{len(row['failures'])} failed**" if row["failures"] else "")
            text += f", {row['skipped']} skipped" if row["skipped"] else ""
        if row.get("why"):
            notes.append(f"{name}: {row['why']}.")
        lines.append(f"| {name} | {' | '.join(cell(row, p, content['bounds']) for p in PACKAGES)} | {text} |")
    commits = ", ".join(dict.fromkeys(row["commit"] for row in content["rows"].values()))
    days = sorted({row["date"][:10] for row in content["rows"].values()})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return "\n".join([*lines, "", *notes, f"{when}, commit {commits}; `make versions`."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "versions", help="1.5 GB at a time")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tried_at = commit()  # now: a row takes minutes
    wheel = build_wheel(args.work.resolve() / "wheel")
    needed, pinned = needs(wheel), pins()
    kept = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    done: dict[Any, Row] = {}  # what pip was asked for -> its row
    for name in args.rows:
        asked = requirements(ROWS[name], needed, pinned)
        asked["torch"], why = cpu_torch(asked, pinned["torch"])
        key = identity(asked)
        if why and list(ROWS[name]) == ["torch"]:
            row = {"result": UNAVAILABLE, "why": why}
        elif key in done:
            row = done[key]
        else:
            print(f"== {name}: {' '.join(p + s for p, s in asked.items())}", flush=True)
            place = args.work.resolve() / name.replace(" ", "-")
            shutil.rmtree(place, ignore_errors=True)
            try:
                row = done[key] = tried(asked, wheel, place)
            finally:
                shutil.rmtree(place)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        kept[name] = {**row, "date": now, "commit": tried_at}
        rows = {r: kept[r] for r in ROWS if r in kept}
        content = {
            "command": "python -m tools.version_matrix",
            "bounds": {p: str(needed[p].specifier) for p in PACKAGES},
            "tests": TESTS,
            "rows": rows,
        }
        OUT.write_text(json.dumps(content, indent=2) + "\n")
    print(table(content))
    for name in args.rows:
        for failure in kept[name].get("failures", ()):
            print(f"{name}: {failure}")
    return 1 if any(kept[name]["result"] in ("failed", "not installable") for name in args.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
