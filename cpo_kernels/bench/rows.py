"""Hidden states, head and labels of a workload: random, peaked like a trained model's, or of a real model on real
text."""

import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpo_kernels.bench.training_step import model_config, token_groups
from cpo_kernels.bench.workload import Head

ROWS = ("random", "peaked", "real")


class HeadRows(NamedTuple):
    """In float32; sequences lie response by response, the first of every group first."""

    hidden: Tensor  # [S, T, H], T: position t predicts label t
    weight: Tensor  # [V, H]
    labels: Tensor  # [S, T], -100 at prompts and padding


def random_rows(w: Head, device: torch.device) -> HeadRows:
    """Normal random numbers: the softmax is so flat that gradients have no live columns."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(w.sequences, w.length, w.hidden, generator=g, device=device)
    weight = torch.randn(w.vocab, w.hidden, generator=g, device=device).mul_(w.hidden**-0.5)
    return HeadRows(
        hidden, weight, _labels(w, torch.randint(w.vocab, (w.sequences, w.length), generator=g, device=device))
    )


# Of word frequencies f_v = -ZIPF log(rank), the spread of the logits around them, its own spread, the label's rise. On
# 384 rows of V = 49,152 and H = 576 these leave 6% of the columns live at 2^-12 (sets of 128 rows) and 1.4% of the
# probability to the rest; the rows of SmolLM2-135M-Instruct on UltraFeedback 7% and 1.4%.
ZIPF, SPREAD, OF_SPREAD, RISE = 1.4, 2.4, 0.5, 8.0


def peaked_rows(w: Head, device: torch.device) -> HeadRows:
    """Rows with the live shares of a trained model: frequent words in every row, plus a few words specific to each.

    The last feature carries the frequencies: z = spread_t * normal + f_v, and the label's z is raised.
    """
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(w.vocab, w.hidden, generator=g, device=device)
    rank = torch.randperm(w.vocab, generator=g, device=device)
    weight[:, -1] = -ZIPF * torch.log1p(rank.float())
    shape = w.sequences, w.length
    labels = torch.multinomial(weight[:, -1].exp(), w.sequences * w.length, replacement=True, generator=g).view(shape)
    normal = torch.randn(*shape, 1, generator=g, device=device)
    hidden = torch.randn(*shape, w.hidden, generator=g, device=device) * (SPREAD * w.hidden**-0.5)
    hidden *= torch.exp(OF_SPREAD * normal)
    hidden += weight[labels] * (2 * RISE / w.hidden * torch.rand(*shape, 1, generator=g, device=device))
    hidden[..., -1] = 1.0
    return HeadRows(hidden, weight, _labels(w, labels))


def _labels(w: Head, labels: Tensor) -> Tensor:
    labels[:, : w.prompt] = -100
    return labels


def real_rows(w: Head, device: torch.device) -> HeadRows:
    """The last hidden states of `w.model` on the first pairs of `w.data`, and its head. Cached in the temporary folder,
    since every implementation has its own process."""
    key = repr((w.model, Path(w.data).resolve(), Path(w.data).stat().st_mtime_ns, w.groups, w.length, w.prompt))
    path = Path(tempfile.gettempdir()) / f"cpo_kernels_rows_{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        torch.save(tuple(_run_model(w)), path)
    return HeadRows(*(t.to(device) for t in torch.load(path)))


def _run_model(w: Head) -> HeadRows:
    from cpo_kernels.training.models import load_model

    model = load_model(model_config(w.model))[0].float().eval()
    groups = token_groups(w.text)
    texts = [(prompt, responses[side]) for side in range(2) for prompt, responses in groups]
    hidden, labels = [], []
    with torch.no_grad():
        for prompt, response in texts:
            states = model.base_model(torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0, :-1]
            hidden.append(states)
            labels.append(torch.tensor((-100,) * (len(prompt) - 1) + response))
    weight = model.get_output_embeddings().weight.detach()
    padded = pad_sequence(hidden, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
    return HeadRows(padded[0], weight, padded[1])


MAKERS = {"random": random_rows, "peaked": peaked_rows, "real": real_rows}
