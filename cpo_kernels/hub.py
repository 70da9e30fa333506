"""Whether a name is there, as a path here or on the Hugging Face hub: said within seconds, where transformers and
datasets try for a minute."""

from __future__ import annotations

from pathlib import Path


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
