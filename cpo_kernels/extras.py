"""The `pip install` line for a missing optional package: the requirements of its extra, read from this installation's
metadata. So the line works anywhere and installs tested versions."""

from __future__ import annotations

import importlib.util
import re
import shlex
from importlib import metadata

# import name -> the extra of pyproject.toml that brings it
EXTRAS = dict.fromkeys(
    ("transformers", "accelerate", "safetensors", "yaml", "tqdm", "numpy", "huggingface_hub"), "train"
)
EXTRAS |= {"matplotlib": "plot", "datasets": "data", "trl": "trl", "peft": "peft", "bitsandbytes": "quantized"}
EXTRAS |= {"flash_attn": "flash", "tensorboard": "track", "psutil": "bench", "triton": "triton"}


def install_line(module: str) -> str:
    """The `pip install ...` line of the extra that provides `module`, or of `module` itself if no extra does.

    >>> install_line("trl")
    "pip install 'trl<2,>=1.16' 'datasets<6,>=4.7'"
    """
    if module not in EXTRAS:
        return f"pip install {module}"
    extra = EXTRAS[module]
    try:
        lines = metadata.requires("cpo-kernels") or []
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return f"pip install --no-build-isolation '.[{extra}]'"
    wanted = re.compile(rf"""\bextra\s*==\s*['"]{extra}['"]""")
    parts = (line.partition(";") for line in lines)
    return shlex.join(["pip", "install", *(name.strip() for name, _, marker in parts if wanted.search(marker))])


def explained(error: ModuleNotFoundError, what: str) -> ModuleNotFoundError:
    """`error` with the line that installs the package, if one of our extras provides it; other errors unchanged."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return error
    text = (
        f"{what} needs {error.name}: install cpo-kernels with its extra [{EXTRAS[module]}], or {install_line(module)}"
    )
    return ModuleNotFoundError(text, name=error.name)


def need(what: str, *modules: str) -> None:
    """Raise ModuleNotFoundError for the first of `modules` that is not installed. Imports none of them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise explained(ModuleNotFoundError(f"No module named {module!r}", name=module), what)
