"""A tokenizer of characters, a Llama of two layers, and records whose ratings follow from the text."""

import string
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cpo_kernels.data.records import Record, Response

OBJECTIVES = [{"name": "honesty", "low": 1, "high": 5}, {"name": "helpfulness", "low": 1, "high": 5}]
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
PREFERENCES = [  # prompt, chosen, rejected, of many lengths
    ("say ab: ", "aabb", "bb"),
    ("say cde: ", "ccc", "dddeeeff"),
    ("q ", "x y z", "zz"),
    ("a longer prompt for h: ", "hhhhhhhhhhhh", "h"),
    ("k", "lmno", "pqrstu"),
    ("v: ", "ww", "xxyyzz"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; ids 0 and 1 are padding and end."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.printable])}
    characters = Tokenizer(models.BPE(vocab, []))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>")


def records(prompts: int = 12) -> list[Record]:
    """`say xy`: a response repeats x by its honesty and y by its helpfulness."""
    letters = string.ascii_lowercase
    made = []
    for i in range(prompts):
        x, y = letters[i % 26], letters[(i * 7 + 3) % 26]
        levels = [(h, u) for h in (1, 3, 5) for u in (1, 5)]
        answers = [Response(x * h + y * u, {"honesty": float(h), "helpfulness": float(u)}) for h, u in levels]
        made.append(Record(f"say {x}{y}", tuple(answers)))
    return made


def config(stage: str = "cdpo", **sections: Any) -> dict:
    """A config of a run of seconds; a section's keys are added to the defaults here."""
    base: dict[str, Any] = {
        "stage": stage,
        "objectives": OBJECTIVES,
        "model": {"config": dict(MODEL)},
        "data": {"eval_share": 0.2},
        "conditions": {"responses": 4, "per_prompt": 2},
        "training": {"lr": 3e-3, "batch_size": 4, "max_steps": 4, "precision": "fp32", "progress": False},
    }
    for name, keys in sections.items():
        base[name] = {**base[name], **keys} if isinstance(keys, dict) and name in base else keys
    return base


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at this size; a module that imports this runs its tests on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
