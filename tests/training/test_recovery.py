"""What a run survives: SIGKILL at any moment, a full disk, cut files. What stops it: numbers that are not finite."""

import contextlib
import errno
import fcntl
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from cpo_kernels.recipe.config import read_config
from cpo_kernels.training import loop as loop_module
from cpo_kernels.training.checkpoints import checkpoints
from cpo_kernels.training.loop import train
from cpo_kernels.training.models import fingerprint, load_model
from cpo_kernels.training.reference import read_cache
from cpo_kernels.training.rundir import hold
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401
from tests.training.test_training import RECORDS, TIMES, curve, run, values

ROOT = Path(__file__).parents[2]


def test_killed_runs_end_as_an_unbroken_one(tmp_path):
    """Same curve, same final weights, after kills at random moments of every kind of event."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.support.killed_runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    whole = found["whole"]
    assert len(found["killed"]) == 7 and whole["events"]["save_file"] == 6  # three checkpoints of two files
    for entry in found["killed"]:
        single = len(entry["kills"]) == 1
        assert entry["signals"][0] == signal.SIGKILL and (single or entry["signals"].count(signal.SIGKILL) >= 2), entry
        rows, expected = (
            [{k: x for k, x in row.items() if k not in TIMES} for row in result["metrics"]]
            for result in (entry["result"], whole)
        )
        assert rows == expected, entry["kills"]
        assert entry["result"]["weights"] == whole["weights"], entry["kills"]


@contextlib.contextmanager
def other_process(folder):
    """Another process that writes into the run directory `folder`."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            folder.mkdir(exist_ok=True)
            lock = hold(folder / "lock")
            os.write(told, b"1")
            time.sleep(600)
            lock.close()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"1"
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_one_process_writes_into_a_run_directory(tmp_path, monkeypatch):
    """From its first file to its last one, whatever the other was told; a killed one holds nothing."""
    folder = tmp_path / "run"
    ways: list[dict] = [{}, {"resume": True}, {"overwrite": True}]
    with other_process(folder) as child:
        for way in ways:
            with pytest.raises(
                ValueError, match=rf"another process is writing there \(process {child} on .*\): stop it or"
            ):
                run(**settings(tmp_path, **way))
    whole = run(**settings(tmp_path))  # the lock's file is still there
    assert not (folder / "lock").exists() and (folder / "model").exists()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    real = loop_module.load_data
    for way in ways[1:]:  # the other one begins while this one reads its data
        with contextlib.ExitStack() as stack:
            monkeypatch.setattr(
                loop_module,
                "load_data",
                lambda *given, s=stack: s.enter_context(other_process(folder)) and real(*given),
            )
            with pytest.raises(ValueError, match="another process is writing there"):
                run(**settings(tmp_path, **way))
        (folder / "lock").unlink()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(loop_module, "load_data", real)
    assert curve(run(**settings(tmp_path, overwrite=True))) == curve(whole)
    with pytest.raises(FloatingPointError):  # what stops with an error lets go too
        run(**settings(tmp_path, overwrite=True, lr=1e30))
    assert not (folder / "lock").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.warns(UserWarning, match="lock cannot be locked .*No locks available.* run one process in this folder"):
        run(**settings(tmp_path))


def settings(tmp_path, **training):
    return {"run_dir": str(tmp_path / "run"), "training": {"checkpoint_every": 2, "max_steps": 4, **training}}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_a_cut_checkpoint_is_refused_and_the_one_before_goes_on(tmp_path, file, harm):
    whole = run(**settings(tmp_path))
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    if harm == "cut":
        os.truncate(newest / file, os.path.getsize(newest / file) // 2)
    else:
        (newest / file).unlink()
    with pytest.raises(ValueError, match=r"step-000004 is incomplete \(.*delete it to resume from the one before"):
        run(**settings(tmp_path, resume=True))
    (newest / file).unlink(missing_ok=True)
    newest.rename(newest.with_name("gone"))
    resumed = run(**settings(tmp_path, resume=True))
    assert curve(resumed) == curve(whole) and fingerprint(resumed.model) == fingerprint(whole.model)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    """Files may not grow beyond a limit, which is how a write fails in its middle."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real, calls = loop_module.save_checkpoint, []

    def limited(*args):
        calls.append(args)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        real(*args)

    monkeypatch.setattr(loop_module, "save_checkpoint", limited)
    try:
        with pytest.raises(OSError, match=r"cannot write .*step-000004: .*free space and resume"):
            run(**settings(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    left = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert left == ["step-000002"]
    resumed = run(**settings(tmp_path, resume=True))
    assert curve(resumed) == curve(run()) and [row["step"] for row in resumed.metrics] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("name, text", [("config.yaml", ""), ("config.yaml", "a: ["), ("metrics.jsonl", "\0\0\n")])
def test_a_damaged_file_of_the_run_is_named(tmp_path, name, text):
    keys = {"checkpoint_every": 2}
    run(run_dir=str(tmp_path), training=keys)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*(is damaged|is not valid YAML)"):
        run(run_dir=str(tmp_path), training=keys | {"resume": True})


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    run(**settings(tmp_path))
    for state in (tmp_path / "run/checkpoints").glob("*/state.json"):
        state.write_text(state.read_text().replace('"steps": 4', '"steps": 9'))
    with pytest.raises(ValueError, match="steps was 9 and is now 4"):
        run(**settings(tmp_path, resume=True))


def test_a_changed_config_of_the_model_is_another_reference():
    model = load_model(read_config(tiny.config()).model, None, tiny.tokenizer())[0]
    before = fingerprint(model)
    model.config.rms_norm_eps = 0.1
    assert fingerprint(model) != before


HARM = {"cut": lambda text: text[:-30], "one digit": lambda text: text.replace("-1", "-2", 1), "other": lambda _: "[]"}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_reference_cache_is_refused(tmp_path, harm):
    keys = {"cache_dir": str(tmp_path), "training": {"max_steps": 1}}
    run(**keys)
    (cache,) = tmp_path.iterdir()
    assert len(read_cache(cache)) > 10
    cache.write_text(HARM[harm](cache.read_text()))
    with pytest.raises(ValueError, match="is not a complete cache of reference log-probs: delete it"):
        run(**keys)


# -------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("where", ["loss", "reported loss", "gradient"])
def test_a_batch_that_is_not_finite_is_saved_and_changes_nothing(tmp_path, monkeypatch, where):
    model = load_model(read_config(tiny.config()).model, None, tiny.tokenizer())[0]
    real, calls, before = loop_module.StageLoss.__call__, [], {}

    def harmed(self, batch, total):
        loss, metrics = real(self, batch, total)
        calls.extend([batch] if torch.is_grad_enabled() else [])
        if len(calls) < 3 or not torch.is_grad_enabled():
            return loss, metrics
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        if where == "gradient":
            return loss * math.inf, metrics
        return (loss * math.nan if where == "loss" else loss), metrics * math.nan

    monkeypatch.setattr(loop_module.StageLoss, "__call__", harmed)
    config = tiny.config("cdpo", **settings(tmp_path, tokens_per_microbatch=10**6))
    pattern = r"at step 3: lower training.lr \(now .*its batch is in .*nonfinite.json"
    with pytest.raises(FloatingPointError, match=pattern):
        train(config, model=model, tokenizer=tiny.tokenizer(), records=RECORDS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    saved = json.loads((tmp_path / "run/nonfinite.json").read_text())
    (part,) = saved["microbatches"]
    assert saved["step"] == 3 and math.isnan(part["loss"]) == (where != "gradient")
    prompts = {tuple(group["prompt"]) for group in part["groups"]}
    assert all(0 <= group["unit"] < 10 for group in part["groups"]) and len(part["groups"]) == len(calls[2].scores) / 4
    assert {tiny.tokenizer().decode(p)[-6:-2] for p in prompts} == {"say "}
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-000002"


# -------------------------------------------------------------------- trackers


def test_metrics_go_to_tensorboard(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = run("cdpo", **settings(tmp_path, trackers=["tensorboard"]))
    events = reader.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in events.Scalars("margin")] == pytest.approx(values(result, "margin"))
    assert [e.step for e in events.Scalars("eval_loss")] == [0, 4]


def test_metrics_go_to_wandb(tmp_path, monkeypatch):
    """Against a stub: what the real one is told."""
    told = []
    stub = types.ModuleType("wandb")
    stub.init = lambda **keys: (
        told.append(keys)
        or types.SimpleNamespace(log=lambda row, step: told.append((step, row)), finish=lambda: told.append("finished"))
    )
    stub.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", stub)
    result = run("cdpo", **settings(tmp_path, trackers=["wandb"]))
    assert told[0]["name"] == "run" and told[0]["config"]["training"]["max_steps"] == 4 and told[-1] == "finished"
    assert [{"step": step, **row} for step, row in told[1:-1]] == result.metrics
    run("cdpo", **settings(tmp_path, trackers=["wandb"], resume=True))
    run("cdpo", **settings(tmp_path, trackers=["wandb"], overwrite=True))
    first, again, another = (t["id"] for t in told if isinstance(t, dict) and "id" in t)
    assert first == again != another  # a folder's name is no id: other runs have it too


def test_trackers_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="training.trackers: 'mlflow' is not one of tensorboard, wandb"):
        run("cdpo", **settings(tmp_path, trackers=["mlflow"]))
    with pytest.raises(ValueError, match="trackers need a run_dir"):
        run("cdpo", training={"trackers": ["tensorboard"]})


def test_metrics_of_a_step():
    result = run("cdpo", conditions={"per_prompt": 2, "strip_best": 0}, training={"max_steps": 2})
    first, second = (row for row in result.metrics if "loss" in row)
    assert first["log_ratio"] == 0 != second["log_ratio"]  # the policy starts as the reference
    assert first["ties"] == 0 and first["asked_nothing"] == 0
    for name in ("honesty", "helpfulness"):
        assert sum(n for key, n in first.items() if key.startswith(f"asked_{name}_")) == 8
    assert first["peak_memory_gib"] > 0.05
    plain = run("dpo", training={"max_steps": 1})
    assert values(plain, "asked_nothing") == [4] and "asked_honesty_5" not in plain.metrics[1]
    assert "log_ratio" not in run("cdpo", loss={"type": "simpo", "beta": 2.0}, training={"max_steps": 1}).metrics[1]
