"""Every implementation computes its family's truth: `pytest benchmarks --benchmark-enable` also times them, roughly.

Figures that are quoted come from `cpo-kernels bench`: there the implementations take turns in processes of their own.
"""

import json
import time
from dataclasses import replace

import pytest
import torch

from cpo_kernels.bench import measure, training_step, trl_steps
from cpo_kernels.bench.families import FAMILIES
from cpo_kernels.bench.implementation import Step
from cpo_kernels.bench.measure import Clock, differences, peak_bytes, project
from cpo_kernels.bench.preference import Preference
from cpo_kernels.bench.tokens import Tokens
from cpo_kernels.bench.trainers import TRAINERS, TrainerStep
from cpo_kernels.bench.training_step import TrainingStep
from cpo_kernels.bench.workload import Head
from tests.support.tiny import one_thread  # noqa: F401

CPU = torch.device("cpu")
# All sizes odd: no tile, vector or chunk divides them.
HEAD = Head("tiny", hidden=47, vocab=1999, groups=3, length=17, prompt=8, dtype="float32")
WORKLOADS = {
    "pairs": HEAD,
    "bfloat16": replace(HEAD, dtype="bfloat16"),
    "frozen": replace(HEAD, mode="frozen", softcap=3.0),
    "forward": replace(HEAD, mode="forward"),
    "groups": replace(HEAD, responses=4),
    "reference": replace(HEAD, reference="computed", responses=3),
    "shared_reference": replace(HEAD, reference="computed", mode="frozen"),
    "tokens": Tokens(rows=13, vocab=1999, softcap=3.0, dtype="float32"),
    "preference": Preference(pairs=16),
    "training_step": TrainingStep(dtype="float32"),
    "training_step_groups": TrainingStep(dtype="float32", responses=3),
    **{f"trainer_{name}": TrainerStep(trainer=name, dtype="float32", groups=3) for name in TRAINERS},
}
COMPILED = {"naive_compiled", "naive_unmasked_compiled", "cce", "liger", "compiled", "compiled_forward"}


def family_of(workload):
    return next(name for name, family in FAMILIES.items() if type(workload) is family.workload)


CASES = [(case, name) for case, w in WORKLOADS.items() for name in FAMILIES[family_of(w)].implementations]


@pytest.mark.parametrize("case, name", CASES, ids=lambda x: x)
def test_implementation_equals_the_truth(benchmark, case, name):
    workload = WORKLOADS[case]
    family = FAMILIES[family_of(workload)]
    if why := family.implementations[name].why_not(workload, CPU):
        pytest.skip(why)
    if name in COMPILED and case not in ("groups", "tokens"):
        pytest.skip("compiles for seconds: once is enough")
    step = family.implementations[name].build(family.tensors(workload, CPU))
    step.prepare()
    outcome = benchmark.pedantic(step.run, setup=step.prepare, rounds=3, warmup_rounds=1)
    if family.implementations[name].bare:
        assert not outcome
        return
    truth = project(family.truth(family.tensors(workload, CPU)))
    found, limits = differences(project(outcome), truth), family.limits(workload)
    assert found, "it computes nothing that can be checked"
    assert all(difference <= limits[key] for key, difference in found.items()), found
    if getattr(workload, "mode", "") == "trainable":
        assert {"loss", "dx", "dw"} <= found.keys()


def test_pairs_of_a_file_pass_through_the_tokenizer(tmp_path, monkeypatch):
    """The first `groups` pairs whose prompt fits, cut to `length`; their tokens are counted without padding."""
    words = trl_steps.word_tokenizer()
    words.chat_template = "{{ messages[0]['content'] }} "
    monkeypatch.setattr(training_step, "tokenizer_of", lambda model: words)
    file = tmp_path / "pairs.jsonl"
    pairs = [("a b", "b", "a a"), ("a " * 9, "a", "b"), ("b", "a b a", "b"), ("a", "a", "a")]
    file.write_text(
        "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), p, strict=True))) + "\n" for p in pairs)
    )
    workload = TrainingStep("given", groups=2, length=4, prompt=3, data=str(file))
    groups = training_step.token_groups(workload)
    assert [(len(prompt), [len(r) for r in responses]) for prompt, responses in groups] == [(2, [2, 2]), (1, [3, 2])]
    assert (workload.prompt_tokens, workload.completion_tokens) == (3, 9)
    rows = Head("given", 8, 16, groups=2, length=4, prompt=3, rows="real", model="given", data=str(file))
    assert (rows.labelled, rows.largest_group) == (9, 5) and replace(rows, rows="random").largest_group == 2
    with pytest.raises(ValueError, match="has 3 pairs with a prompt of at most 3 tokens, but 4 are needed"):
        training_step.token_groups(replace(workload, groups=4))
    with pytest.raises(ValueError, match="needs a model with a tokenizer, and responses=2"):
        training_step.token_groups(replace(workload, model="tiny"))


def test_a_wrong_gradient_shows_in_the_projection():
    truth = {"dw": torch.randn(50, 40)}
    wrong = truth["dw"].clone()
    wrong[7, 3] += 1
    error = differences(project({"dw": wrong}), project(truth))["dw"]
    assert 1e-4 < error and differences(project(truth), project(truth))["dw"] == 0
    wrong[7, 3] = float("nan")
    assert differences(project({"dw": wrong}), project(truth))["dw"] == float("inf")
    with pytest.raises(ValueError, match="dw has 50 elements instead of 49"):
        differences(project({"dw": wrong}), project({"dw": truth["dw"][1:]}))


def test_clock_and_memory():
    kept = []
    step = Step(lambda: kept.append(torch.ones(4 << 20)) or {}, kept.clear, repeats=4)  # 16 MiB
    assert 0 < Clock(CPU).turn(step, 0.01) < 1
    peak = peak_bytes(step, CPU)
    assert peak is None or 15 << 20 < peak < 40 << 20


class StubGpu:
    """A stream that notes what is queued, and when: it works its queue off in order and has seconds of its own."""

    def __init__(self, monkeypatch):
        self.calls, self.work_s, self.sleeps = [], 0.0, []
        stub = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                stub.calls.append("event")
                self.at = stub.work_s

            def synchronize(self):
                stub.calls.append("wait")

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Other:
            def zero_(self):
                stub.calls.append("fill L2")

        def sleep(cycles):
            stub.calls.append("sleep")
            stub.sleeps.append(cycles / measure.CYCLES)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        self.clock = Clock(CPU)
        self.clock.device, self.clock.other = torch.device("cuda"), Other()

    def step(self, host_s, device_s):
        def run():
            self.calls.append("step")
            time.sleep(host_s)
            self.work_s += device_s
            return {}

        return Step(run, lambda: self.calls.append("prepare"), repeats=2)


def test_the_device_is_busy_while_the_step_is_queued(monkeypatch):
    """Both events stand in the queue behind a sleep that outlasts the host, and nothing waits between them."""
    gpu = StubGpu(monkeypatch)
    assert gpu.clock.turn(gpu.step(0.003, 7e-6), 0.0) == pytest.approx(3.5e-6)  # of two repeats
    order = ["prepare", "fill L2", "sleep", "event", "step", "event", "wait"]
    assert gpu.calls == 2 * order
    assert gpu.sleeps[0] == 0 and 0.006 <= gpu.sleeps[1] <= measure.LONGEST_SLEEP_S
    gpu.clock.turn(gpu.step(0.03, 7e-6), 0.0)  # bound by the host
    assert gpu.sleeps[-1] == pytest.approx(measure.LONGEST_SLEEP_S)
