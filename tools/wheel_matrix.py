"""One abi3 wheel, tried with every Python on this machine and every torch that pip has as a CPU build.

    .venv/bin/python -m tools.wheel_matrix [--torch 2.10 2.13 ...] [--python python3.12 ...]

Builds the wheel with the torch of the Python that runs this, and gives it to tools/check_wheel.sh in a new environment
for each combination. What cannot be tried is listed with the reason: a torch that pip does not have for that Python, or
has only as a CUDA build (set PIP_EXTRA_INDEX_URL to an index of CPU builds). Exits with 1 where a combination failed,
or none could be tried.
"""

import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCHES = [f"2.{minor}" for minor in range(10, 16)]
PYTHONS = [f"python3.{minor}" for minor in range(10, 15)]


def pythons() -> dict[str, str]:
    """Version -> path of the CPythons on PATH and of pyenv's."""
    found = {}
    places = [*os.environ["PATH"].split(os.pathsep), *glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin"))]
    for name in PYTHONS:
        for path in filter(None, (shutil.which(name, path=place) for place in places)):
            ask = "import platform, ensurepip; print(platform.python_version())"
            done = subprocess.run([path, "-c", ask], capture_output=True, text=True)
            if done.returncode == 0:
                found.setdefault(done.stdout.strip(), path)
    return found


def torch_release(python: str, requirement: str) -> tuple[str, str]:
    """The torch that pip has for this Python ('': none), and why it cannot be tried ('': it is a CPU build)."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--quiet",
        "--report",
        "-",
    ]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    if done.returncode:
        return "", (re.findall(r"ERROR: (.*)", done.stderr) or [done.stderr.strip()])[0]
    release = json.loads(done.stdout)["install"][0]["metadata"]
    cuda = [need for need in release.get("requires_dist", []) if re.match(r"(nvidia|cuda)-", need)]
    return release["version"], f"pip has torch {release['version']} only as a CUDA build" if cuda else ""


def build_wheel(folder: Path) -> Path:
    """Our wheel, built with the torch of the Python that runs this; other wheels in the folder are removed."""
    for path in folder.glob("*.whl"):
        path.unlink()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=TORCHES, help=f"minor versions; default: {' '.join(TORCHES)}")
    parser.add_argument("--python", nargs="+", help="paths; default: 3.10 and newer on PATH and in ~/.pyenv")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        wheel = build_wheel(Path(work))
        for version, python in {p: p for p in args.python}.items() if args.python else pythons().items():
            for torch in args.torch:
                _, result = torch_release(python, f"torch=={torch}.*")
                place = Path(work, f"{version}-{torch}".replace("/", "_"))
                if not result:
                    command = [ROOT / "tools" / "check_wheel.sh", f"{torch}.*", place]
                    done = subprocess.run(command, env={**os.environ, "PYTHON": python, "WHEEL": str(wheel)})
                    result = "FAILED" if done.returncode else "works"
                    shutil.rmtree(place, ignore_errors=True)
                rows.append((version, torch, result))
    print(f"\n{wheel.name}")
    for version, torch, result in rows:
        print(
            f"Python {version:8} torch {torch:6} {result if result in ('works', 'FAILED') else f'not tried: {result}'}"
        )
    results = [result for *_, result in rows]
    return 1 if "FAILED" in results or "works" not in results else 0


if __name__ == "__main__":
    sys.exit(main())
