"""Write the library as a kernel of the Hugging Face Kernel Hub: python tools/hub_kernel.py FOLDER

    FOLDER/build.toml, FOLDER/torch-ext/cpo_kernels/   what kernel-builder takes
    FOLDER/build/torch-{cpu,cuda,rocm}/                what `kernels.get_kernel` loads

Only the core, Triton kernels and PyTorch: data, training and the adapters stay with the package. The Hub loads a
kernel under a name of its own, several versions beside each other and beside an installed package. So the modules
import each other relatively here, and the ops are registered under a name that follows from the sources.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BACKENDS = re.findall(r'"(\w+)"', re.search(r"^backends = (.*)$", (ROOT / "build.toml").read_text(), re.M)[1])


def core_modules() -> dict[str, str]:
    """Path below cpo_kernels/ and text of what `import cpo_kernels` and the Triton kernels are made of."""
    found: dict[str, str] = {}
    wanted = ["", "kernels"]
    while wanted:
        module = ROOT / "cpo_kernels" / wanted.pop()
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        name = str(file.relative_to(ROOT / "cpo_kernels"))
        if name in found or not file.exists():  # the latter: a name that a module defines
            continue
        found[name] = file.read_text()
        for package, names in re.findall(r"^ *from cpo_kernels([.\w]*) import (.+)$", found[name], re.M):
            folder = package[1:].replace(".", "/")
            wanted += [folder, *(f"{folder}/{one}".strip("/") for one in re.findall(r"\w+", names))]
    return dict(sorted(found.items()))


def hub_source(text: str, depth: int, namespace: str) -> str:
    """A module whose imports are relative, `depth` folders below the package, and whose ops are `namespace`'s."""
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*)from cpo_kernels import", rf"\1from {dots} import", text, flags=re.M)
    text = re.sub(r"^(\s*)from cpo_kernels\.", rf"\1from {dots}", text, flags=re.M)
    text = re.sub(r'(import_module|find_spec)\((f?)"cpo_kernels\.([^"]+)"\)', rf'\1(\2"{dots}\3", __package__)', text)
    for before in ("torch.ops.cpo_kernels", '"cpo_kernels::', 'Library("cpo_kernels"'):
        text = text.replace(before, before.replace("cpo_kernels", namespace))
    return text


def write(folder: Path) -> None:
    sources = core_modules()
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:12]
    namespace = f"_cpo_kernels_{digest}"
    package = folder / "torch-ext" / "cpo_kernels"
    for name, text in sources.items():
        target = package / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(hub_source(text, name.count("/"), namespace))
    shutil.copy(ROOT / "build.toml", folder)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(package, variant, dirs_exist_ok=True)
        about = {"id": f"_cpo_kernels_{backend}_{digest}", "name": "cpo-kernels", "version": 1, "python-depends": []}
        about |= {"license": "Apache-2.0", "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
