"""Reference log-probs, computed once and cached on disk.

One JSON file per reference model (named by the hash of its weights and config and by the precision), one entry per
sequence. The key hashes the tokens of (prompt with its condition's tags, response), so it covers data, tokenizer,
template and conditions. The file holds a hash of its entries, which is verified on reading.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from cpo_kernels.data.packing import Encoded, Unit
from cpo_kernels.files import atomic_text
from cpo_kernels.training.losses import StageLoss
from cpo_kernels.training.parallel import share, together

CHUNK = 8  # responses of one prompt scored together
SAVE_EVERY = 200  # micro-batches between writes of the cache


def sequence_key(prompt: Sequence[int], response: Sequence[int]) -> str:
    return blake2b(array("q", [len(prompt), *prompt, *response]).tobytes(), digest_size=16).hexdigest()


def data_hash(sets: Sequence[Sequence[Unit]]) -> str:
    """Hash of tokens, pairs, ratings and conditions, in order."""
    hashed = blake2b(digest_size=8)
    for group in (group for units in sets for unit in units for group in unit):
        numbers = [*group.prompt, *chain(*group.responses), *chain(*group.pairs)]
        hashed.update(array("q", numbers).tobytes() + array("d", [*chain(*group.scores), *group.condition]).tobytes())
    return hashed.hexdigest()


def with_reference(
    sets: Sequence[Sequence[Unit]],
    loss: StageLoss,
    cache: Path | None,
    accelerator: Accelerator,
    quiet: bool,
    wanted: Callable[[Encoded], bool] = lambda group: True,
) -> tuple[list[list[Unit]], dict[str, int]]:
    """The sets of units with `ref_logps` of the wanted groups filled in, how many sequences were scored, and how many
    came from the cache. `cache` is the JSON file of this reference model; only the main process reads and writes it."""
    main = accelerator.is_main_process
    with together(accelerator):
        cached_logps = read_cache(cache) if main and cache and cache.exists() else {}
    (cached_logps,) = broadcast_object_list([cached_logps])
    cache_hits: set[str] = set()
    missing: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}
    for group in (group for units in sets for unit in units for group in unit if wanted(group)):
        for response in group.responses:
            key = sequence_key(group.prompt, response)
            if key in cached_logps:
                cache_hits.add(key)
            else:
                missing.setdefault(group.prompt, {})[key] = response
    todo = []
    for prompt, responses in missing.items():
        texts = list(responses.values())
        todo += [Encoded(prompt, tuple(texts[i : i + CHUNK]), (), (), []) for i in range(0, len(texts), CHUNK)]
    batches = share(loss.parts(todo, accelerator.num_processes), accelerator)
    fresh: dict[str, float] = {}
    for number, (groups, _) in enumerate(tqdm(batches, "reference", disable=quiet or not batches), 1):
        logps = iter(loss.seq_logps(loss.collate(groups)).tolist())
        fresh |= {sequence_key(g.prompt, r): next(logps) for g in groups for r in g.responses}
        if number % SAVE_EVERY == 0 or number == len(batches):
            for part in gather_object([fresh]):
                cached_logps |= part
            fresh = {}
            with together(accelerator):
                if main and cache:
                    write_cache(cached_logps, cache)
    filled = [[tuple(_fill(g, cached_logps) if wanted(g) else g for g in unit) for unit in units] for units in sets]
    return filled, {"scored": sum(map(len, missing.values())), "cached": len(cache_hits)}


def write_cache(logps: dict[str, float], path: Path) -> None:
    atomic_text(json.dumps({"hash": _hash(logps), "logps": logps}), path)


def read_cache(path: Path) -> dict[str, float]:
    try:
        saved = json.loads(path.read_text())
        logps: dict[str, float] | None = saved["logps"]
        whole = saved["hash"]
    except (ValueError, KeyError, TypeError):
        logps, whole = None, ""
    if logps is None or _hash(logps) != whole:
        raise ValueError(
            f"{path} is not a complete cache of reference log-probs: delete it, and they are computed again"
        )
    return logps


def _hash(logps: dict[str, float]) -> str:
    return blake2b(json.dumps(logps, sort_keys=True).encode(), digest_size=16).hexdigest()


def _fill(group: Encoded, logps: dict[str, Any]) -> Encoded:
    return replace(group, ref_logps=tuple(logps[sequence_key(group.prompt, r)] for r in group.responses))
