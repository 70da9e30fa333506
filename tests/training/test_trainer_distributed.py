"""The trainer on two gloo processes against one: DDP and FSDP2, stops and resumes, errors of one rank.

Models are float64 here, Llama's norm too, so that a wrong divisor or a lost micro-batch cannot hide in rounding. The
processes sum gradients in another order: about 1e-17 in a gradient, which AdamW's first step multiplies by up to
lr / eps = 3e5 where a gradient is itself no larger than eps. TIGHT is ten times that; float32 noise would be 1e-2.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.fsdp import FSDPModule
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cpo_kernels.recipe.config import read_config
from cpo_kernels.training import checkpoints, loop, losses, parallel
from cpo_kernels.training.loop import train
from cpo_kernels.training.models import load_model
from cpo_kernels.training.parallel import whole
from tests.support import tiny
from tests.support.processes import as_launched, exit_codes, free_port, run_processes
from tests.support.tiny import one_thread  # noqa: F401
from tests.training.test_training import RECORDS, TIMES

pytestmark = pytest.mark.distributed

TIGHT = 3e-11
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes/accelerate"

LORA = {"train": "lora", "lora": {"r": 4, "alpha": 8}}
RUNS = {
    "even": {"training": {"batch_size": 6, "tokens_per_microbatch": 300}},
    "one group a step": {"training": {"batch_size": 1}, "conditions": {"per_prompt": 1}},
    "padded": {"training": {"batch_size": 3, "rows": "padded", "tokens_per_microbatch": 250}},
    "checkpointing": {"training": {"batch_size": 3, "gradient_checkpointing": True, "tokens_per_microbatch": 400}},
    "cpsft": {
        "stage": "cpsft",
        "training": {"batch_size": 5, "rows": "padded", "tokens_per_microbatch": 50},
        "loss": {"filter_eps": "auto"},  # exact in float64; the shares in the rows add up all the same
    },
    "chosen tokens": {"loss": {"type": ["sigmoid", "sft"]}, "training": {"tokens_per_microbatch": 300}},
    "lora": {"training": {**LORA, "batch_size": 1, "lr": 1e-2}},
}
UNEVEN = {"one group a step", "padded", "cpsft"}  # in some round a rank has no micro-batch of its own


def exact_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def config_of(stage="cdpo", **sections):
    sections["training"] = {"max_steps": 4, **sections.get("training", {})}
    return tiny.config(stage, **sections)


def train_tiny(**sections):
    """A run from a float64 model: rows without times, whole weights, how many micro-batches counted nothing, report,
    and how many modules FSDP2 has in hand."""
    config = config_of(**sections)
    model = load_model(read_config(config).model, None, tiny.tokenizer())[0].double()
    fillers = []
    real = parallel.share
    loop.share = lambda *args: fillers.extend(w for _, w in real(*args) if not w) or real(*args)
    norm, LlamaRMSNorm.forward = LlamaRMSNorm.forward, exact_norm
    try:
        result = train(config, model=model, tokenizer=tiny.tokenizer(), records=RECORDS)
    finally:
        LlamaRMSNorm.forward, loop.share = norm, real
    rows = [{k: x for k, x in row.items() if k not in TIMES} for row in result.metrics]
    weights = {n: whole(p.detach()).clone() for n, p in result.model.named_parameters()}
    sharded = sum(isinstance(m, FSDPModule) for m in result.model.modules())
    return rows, weights, len(fillers), result.report, sharded


def launched_as(kind):
    """Accelerate's own FSDP2 on a CPU: it asks for it only on accelerators, but its code does not need them."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Sharding(Accelerator):
        def __init__(self, **keys):
            super().__init__(**keys)
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()

    settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})  # as `accelerate launch` does
    AcceleratorState._reset_state(reset_partial_state=True)
    parallel.Accelerator = Sharding if kind == "fsdp2" else Accelerator


def assert_same(found, expected):
    (rows, weights, *_), (expected_rows, expected_weights, *_) = found, expected
    assert [set(row) for row in rows] == [set(row) for row in expected_rows]
    for row, other in zip(rows, expected_rows, strict=True):
        start = row["step"] == 0 or (row["step"] == 1 and "loss" in row)  # no pair has a margin yet but of rounding
        unlike = {"padding", *(["accuracy", "eval_accuracy"] if start else [])}  # micro-batches are cut for two
        for name, x in row.items():
            if name not in unlike:
                assert x == pytest.approx(other[name], rel=1e-8, abs=TIGHT), (row["step"], name)
    if weights.keys() != expected_weights.keys():  # saving merges adapters
        weights, expected_weights = merged(weights), merged(expected_weights)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert float((weight - expected_weights[name]).abs().max()) <= TIGHT, name


# ------------------------------------------------------------------------------------------------ what the ranks run


def caught(function, *args, **keys):
    try:
        function(*args, **keys)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def train_tiny_badly(rank):
    train(config_of(**({"loss": {"bta": 1}} if rank else {})), tokenizer=tiny.tokenizer(), records=RECORDS)


def failing_runs(rank, folder):
    """What each rank raises where one of them, or all, cannot go on."""
    errors = {}
    rated = [{"text": text, "ratings": {"honesty": level, "helpfulness": 3}} for text, level in (("a", 1), ("b", 5))]
    lines = [json.dumps({"prompt": f"say {word}", "responses": rated}) for word in ("ab", "cd", "ef")]
    file = folder / f"data{rank}.jsonl"
    file.write_text("\n".join([*lines, "{broken" if rank else lines[0]]))
    config = config_of(data={"train": [str(file)]})
    errors["bad line"] = caught(train, config, tokenizer=tiny.tokenizer())
    errors["bad key"] = caught(train_tiny_badly, rank)
    errors["no layer"] = caught(train_tiny, training={"train": "last_k", "k": 3 if rank else 1})
    errors["other data"] = caught(train, config_of(seed=rank), tokenizer=tiny.tokenizer(), records=RECORDS)

    real, calls = losses.StageLoss.__call__, []

    def harmed(self, batch, total):
        loss, metrics = real(self, batch, total)
        calls.extend([1] if torch.is_grad_enabled() else [])
        harm = math.nan if rank == 1 and len(calls) == 2 and torch.is_grad_enabled() else 1.0
        return loss * harm, metrics * harm

    losses.StageLoss.__call__ = harmed
    keys = {"run_dir": str(folder / "nan"), "training": {"batch_size": 4, "tokens_per_microbatch": 10**6}}
    errors["nan"] = caught(train_tiny, **keys)
    losses.StageLoss.__call__ = real

    save, calls = loop.save_checkpoint, []

    def full_disk(*args):
        raise OSError("cannot write: no space")

    loop.save_checkpoint = full_disk
    errors["disk"] = caught(train_tiny, run_dir=str(folder / "full"), training={"checkpoint_every": 2})
    loop.save_checkpoint = save
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    errors["sharded"] = caught(train, config_of(), tokenizer=tiny.tokenizer(), records=RECORDS)
    del os.environ["ACCELERATE_USE_FSDP"]
    return errors


def every_run(rank, folder, port):
    as_launched(rank, 2, port)
    found = {}
    for kind in ("ddp", "fsdp2"):
        for name, sections in RUNS.items():
            launched_as(kind)
            place = str(folder / f"{kind} {name} {rank}")
            found[kind, name] = train_tiny(run_dir=place, cache_dir=str(folder / kind), **sections)
    launched_as("ddp")
    found["errors"] = failing_runs(rank, folder)
    return found


RESUMED = {"training": {"max_steps": 6, "checkpoint_every": 2, "eval_every": 3, "batch_size": 3, "resume": True}}


def killed_run(rank, folder, port, kind, at):
    """Dies by SIGKILL: both ranks at their fourth update, or rank 0 amid its second checkpoint."""
    as_launched(rank, 2, port)
    launched_as(kind)
    owner, name = (loop, "update") if at == "update" else (checkpoints, "save_file")
    real, calls = getattr(owner, name), []

    def deadly(*args):
        calls.append(1)
        done = real(*args)
        if len(calls) == 4:
            if at != "update":
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, name, deadly)
    train_tiny(run_dir=str(folder), **RESUMED)


def resumed_run(rank, folder, port, kind):
    as_launched(rank, 2, port)
    launched_as(kind)
    return train_tiny(run_dir=str(folder), **RESUMED)


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_processes(every_run, 2, folder, free_port())


@pytest.fixture(scope="module")
def alone():
    known = {}

    def run(name):
        if name not in known:
            known[name] = train_tiny(**RUNS[name])
        return known[name]

    return run


def merged(weights):
    """The weights of LORA's adapters in those of their layers."""
    plain = {n.replace(".base_layer", ""): w for n, w in weights.items() if "lora_" not in n}
    for n in weights:
        if n.endswith(".lora_A.default.weight"):
            stem = n.removesuffix(".lora_A.default.weight")
            plain[f"{stem}.weight"] = (
                plain[f"{stem}.weight"] + 8 / 4 * weights[f"{stem}.lora_B.default.weight"] @ weights[n]
            )
    return plain


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one(ranks, alone, folder, kind, name):
    for rank in range(2):
        assert_same(ranks[rank][kind, name], alone(name))
    assert (ranks[1][kind, name][2] > 0) == (name in UNEVEN)  # rank 1 went without a micro-batch
    assert ranks[0][kind, name][4] == (2 if kind == "fsdp2" else 0)  # both layers; the rest is with the root
    rows = [json.loads(line) for line in (folder / f"{kind} {name} 0/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert not (folder / f"{kind} {name} 1").exists()  # rank 1 wrote nothing
    saved = load_model(read_config({"model": str(folder / f"{kind} {name} 0/model")}).model)[0]
    for n, p in saved.named_parameters():  # read as float32
        torch.testing.assert_close(p.double(), merged(alone(name)[1])[n], atol=1e-7, rtol=1e-7)


def test_the_reference_is_scored_once_over_all_ranks(ranks, folder):
    for kind in ("ddp", "fsdp2"):
        first, again = (ranks[0][kind, name][3]["reference"] for name in ("even", "checkpointing"))
        assert first["cached"] == 0 < first["scored"] and again == {"scored": 0, "cached": first["scored"]}
        assert ranks[1][kind, "even"][3]["reference"] == first
        assert len(list((folder / kind).iterdir())) == 1


def test_an_error_of_one_rank_ends_all(ranks, folder):
    own, other = ranks[1]["errors"], ranks[0]["errors"]
    for name, pattern in {
        "bad line": "data1.jsonl:4",
        "bad key": "unknown key loss.bta; did you mean loss.beta?",
        "no layer": "training.k must be in [1, 2]",
    }.items():
        assert pattern in own[name] and other[name] == f"ValueError: rank 1 stopped with {own[name]}"
    assert own["other data"].startswith("ValueError: the ranks have different weights: by rank [")
    assert own["nan"] == other["nan"] and "FloatingPointError: loss nan" in own["nan"] and "step 2" in own["nan"]
    saved = json.loads((folder / "nan/nonfinite.json").read_text())
    assert sorted(math.isnan(part["loss"]) for part in saved["microbatches"]) == [False, True]
    assert other["disk"] == "OSError: cannot write: no space" and own["disk"].endswith(other["disk"])
    assert own["sharded"] == other["sharded"] and "FSDP or DeepSpeed on CPUs" in own["sharded"]


@pytest.mark.parametrize("kind, at", [("ddp", "checkpoint"), ("fsdp2", "update")])
def test_killed_processes_resume_as_if_unbroken(tmp_path, kind, at):
    """And one process goes on where two were killed."""
    codes = exit_codes(killed_run, 2, tmp_path / "run", free_port(), kind, at)
    assert codes[0] == -signal.SIGKILL and codes[1]  # the other dies with it, or of the lost connection
    left = [path.name for path in checkpoints.checkpoints(tmp_path / "run/checkpoints")]
    assert left == ["step-000002"]
    whole_run = train_tiny(run_dir=str(tmp_path / "whole"), **RESUMED)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert_same(train_tiny(run_dir=str(tmp_path / "copy"), **RESUMED), whole_run)
    for found in run_processes(resumed_run, 2, tmp_path / "run", free_port(), kind):
        assert_same(found, whole_run)


# ------------------------------------------------------------------------------------------------------------- ZeRO-3


def zero3_run(rank, folder, port):
    """DeepSpeed on two CPUs, which accelerate keeps for GPUs as it does FSDP2."""
    as_launched(rank, 2, port)
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE="2")
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType

    given = yaml.safe_load((CONFIGS / "zero3.yaml").read_text())["deepspeed_config"]
    plugin = DeepSpeedPlugin(**given)
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # split small ones too

    class Splitting(Accelerator):
        def __init__(self, **keys):
            super().__init__(**keys)
            deepspeed.init_distributed("gloo")
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
            self.state.deepspeed_plugins = {"default": plugin}
            self.deepspeed_engine_wrapped = None

    parallel.Accelerator = Splitting
    config = config_of(run_dir=str(folder / "run"), **ZERO3)
    refused = {**config, "training": {**config["training"], "checkpoint_every": 1}}
    error = caught(train, refused, tokenizer=tiny.tokenizer(), records=RECORDS)
    result = train(config, tokenizer=tiny.tokenizer(), records=RECORDS)
    return result.metrics, sum(p.numel() for p in result.model.parameters()), error


ZERO3 = {"training": {"batch_size": 3, "tokens_per_microbatch": 300}}


def test_zero3_is_one_process(tmp_path):
    """float32; runs where deepspeed is installed (CI has none)."""
    pytest.importorskip("deepspeed")
    (rows, held, error), (other, *_) = run_processes(zero3_run, 2, tmp_path, free_port())
    one = train(config_of(**ZERO3), tokenizer=tiny.tokenizer(), records=RECORDS)
    assert "checkpoints are pickles" in error
    assert held == 0  # of whole weights: each rank keeps its part elsewhere
    for name in ("loss", "grad_norm", "eval_loss"):
        found, again, expected = ([row[name] for row in run if name in row] for run in (rows, other, one.metrics))
        assert found == again == pytest.approx(expected, rel=1e-5)
    saved = load_model(read_config({"model": str(tmp_path / "run/model")}).model)[0]
    for (name, p), expected in zip(saved.named_parameters(), one.model.parameters(), strict=True):
        apart = (p - expected).abs() > 1e-6  # AdamW: where a gradient is rounding, lr wide
        assert apart.float().mean() < 0.01, name


# ------------------------------------------------------------------------------------------------ launched from a shell


def launch(folder, launcher, **environment):
    """Our command on two CPU processes of a launcher."""
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    answers = [{"prompt": r.prompt, "responses": [vars(a) for a in r.responses]} for r in RECORDS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    config = tiny.config(run_dir=str(folder / "run"), training={"max_steps": 2})
    config["model"]["tokenizer"], config["data"]["train"] = str(folder / "tokenizer"), [str(folder / "data.jsonl")]
    (folder / "recipe.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", *launcher, "-m", "cpo_kernels.cli", "train", str(folder / "recipe.yaml")]
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    )
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_accelerate_launches_the_command(tmp_path):
    settings = ["--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2"]
    launcher = ["accelerate.commands.launch", *settings, "--main_process_port", str(free_port())]
    done = launch(tmp_path, launcher, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("train: prompts 10") == 1  # only the main process speaks
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    config = tiny.config(training={"max_steps": 2})
    one = train(config, tokenizer=tiny.tokenizer(), records=RECORDS)
    assert [row["step"] for row in rows] == [row["step"] for row in one.metrics]
    for name in ("loss", "grad_norm", "eval_loss"):
        found, expected = ([row[name] for row in metrics if name in row] for metrics in (rows, one.metrics))
        assert found == pytest.approx(expected, rel=1e-3)


def test_torchrun_without_gpus_is_refused(tmp_path):
    """Accelerate would start each rank as a run of its own, in one run directory."""
    done = launch(tmp_path, ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())])
    assert (
        done.returncode and "ValueError: the launcher asks for 2 processes, but accelerate found no GPU" in done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_settings_of_the_launcher_that_cannot_be_kept_are_refused(monkeypatch):
    def message(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            return caught(train, config_of(), tokenizer=tiny.tokenizer(), records=RECORDS)
        finally:
            monkeypatch.undo()
            AcceleratorState._reset_state(reset_partial_state=True)

    assert "mixed_precision: bf16; set it to no" in message(ACCELERATE_MIXED_PRECISION="bf16")
    assert "gradient_accumulation_steps; leave it at 1" in message(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2")
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        assert "3 processes, but accelerate found no GPU" in message(**{name: "3"}), name
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        assert "2 processes, but accelerate found no GPU" in message(**{name: "1"}), name
    assert message(WORLD_SIZE="1", RANK="0") == "nothing was raised"


def test_accelerate_reads_the_configs():
    """With a key that it does not know it would stop."""
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    assert {name: str(c.distributed_type.value) for name, c in kinds.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero3": "DEEPSPEED",
    }
    assert all(c.mixed_precision == "no" and c.num_processes == 8 for c in kinds.values())
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2 and kinds["zero3"].deepspeed_config["zero_stage"] == 3
