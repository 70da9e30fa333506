"""The run in which implementations take turns, its results file, and what is made of it."""

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import compare, long_pairs, plot, profile, roofline
from cpo_kernels import environment
from cpo_kernels.bench import arguments, growth, report, run, side_by_side
from cpo_kernels.bench.arguments import PARTS
from cpo_kernels.bench.families import FAMILIES
from cpo_kernels.bench.growth import Growth, exponent
from cpo_kernels.bench.implementation import Family, Implementation, Step
from cpo_kernels.bench.preference import Preference
from cpo_kernels.bench.resume import finished
from cpo_kernels.bench.sets import SETS, Run
from cpo_kernels.bench.side_by_side import Bench, described, summary
from cpo_kernels.bench.trainers import TrainerStep
from cpo_kernels.bench.training_step import TrainingStep
from cpo_kernels.bench.worker import Failed, Serving, Worker
from cpo_kernels.bench.workload import Head
from cpo_kernels.head import strategy

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


class Here(Worker):
    """A worker without a process, which notes the turns."""

    turns: list[str] = []

    def start(self):
        self.serving = Serving(self.arguments[0], self.arguments[1], CPU)

    def begin_load(self, workload):
        """`load` does all of it."""

    def ask(self, command, *arguments, limit_s):
        if not hasattr(self, "serving"):
            self.start()
        if command == "turn":
            self.turns.append(self.arguments[1])
        try:
            return getattr(self.serving, command)(*arguments)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error


def bench(**keys):
    return Bench(CPU, 1, **{"rounds": 3, "turn_s": 0.0, "answer_s": 10, **keys})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The command itself on tiny sizes, as a user runs it."""
    out = tmp_path_factory.mktemp("bench") / "results.json"
    command = [sys.executable, "-m", "cpo_kernels.cli", "bench", "--set", "ci", "--device", "cpu", "--threads", "1"]
    implementations = ["--implementations", "ours", "naive_unmasked", "ours_cuda"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parts = ["--only", "head", "growth", "cold_start"]
    subprocess.run([*command, *parts, *implementations, "--out", str(out)], cwd=ROOT, check=True, env=environment)
    return json.loads(out.read_text())


def test_results_file(results):
    env = results["environment"]
    assert env["versions"]["torch"] and env["commit"] and env["date"] and "--set ci" in results["command"]
    loads = results["workloads"]
    timed = 0
    for result in loads:
        for name, row in result["subjects"].items():
            if name == "ours_cuda":
                assert row["why"] == "needs an NVIDIA GPU, this is cpu"
            if "why" in row:
                continue
            timed += 1
            assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["first_s"] > 0
            assert row["rounds"] == 2 and row["ratio"] > 0
            assert bool(row["differences"]) != FAMILIES[result["family"]].implementations[name].bare
    assert timed == 3 * len(loads) and {r["mode"] for r in loads} == {"trainable", "frozen", "forward"}
    assert [len(g["points"]) for g in results["growth"]] == [2] and results["growth"][0]["seen"]["ours"]["time"]
    assert results["cold_start"]["first"]["first_s"] > 0


def test_tables_and_pictures(results, tmp_path):
    for result in results["workloads"]:
        assert report.table(result).count("\n| ") == len(result["subjects"]) + (result["family"] == "head")
    assert "not measured: needs an NVIDIA GPU" in report.table(results["workloads"][0])
    late = {**results["workloads"][0], "subjects": {"products": {"why": "too late"}, "ours": {"why": "too late"}}}
    assert report.table(late) == "not measured: too late"
    assert plot.readme_table(results).count("× ·") == 2 * 3  # trainable and frozen; floor, ours, naive
    assert report.growth_table(results["growth"]).count("groups (2, 4)") == 3
    plot.draw_head(results, tmp_path / "head.png")
    plot.draw_growth(results["growth"], tmp_path / "growth.png")
    assert (tmp_path / "head.png").stat().st_size > 10_000 and (tmp_path / "growth.png").stat().st_size > 10_000


def test_kernels_in_turns(monkeypatch):
    """Families besides the head, here without processes."""
    monkeypatch.setattr(side_by_side, "Worker", Here)
    for one in SETS["ci"].runs:
        if one.family in ("tokens", "preference"):
            names = one.implementations or FAMILIES[one.family].implementations
            names = [n for n in names if n.endswith(("cpu", "cuda", "copy"))]
            rows = bench().measure(one.family, one.workload, names)
            assert all(("median_s" in row) == (not name.endswith("cuda")) for name, row in rows.items())
            text = report.table({**described(one.family, one.workload, CPU), "subjects": rows})
            assert ("% of copy)" in text) == (one.family == "tokens") and "does not run on cpu" in text


def test_texts_are_checked_against_results():
    text = "a\n<!-- table: x -->\nold\n<!-- end of table -->\nb\n"
    assert plot.fill(text, "x", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="0 tables are marked 'y'"):
        plot.fill(text, "y", "new")


def test_a_result_names_the_limits_of_its_cpu(monkeypatch):
    for name in environment.LIMITS:
        monkeypatch.delenv(name, raising=False)
    whole = environment.describe(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    limited = environment.describe(CPU)
    assert "cpu_limits" not in whole and limited["cpu_limits"] == {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    assert "=" not in environment.processor(whole) and ("AMX" in environment.processor(whole)) == whole["cpu_amx"]
    assert ", ONEDNN_MAX_CPU_ISA=AVX512_CORE), " in environment.processor(limited)


@pytest.mark.parametrize("instructions", ["cpu_capability", "cpu_amx", "cpu_limits"])
def test_compare_sees_what_is_beyond_noise(instructions, results):
    assert compare.changes(results, results)[0] == []
    slower = copy.deepcopy(results)
    first = slower["workloads"][0]["subjects"]
    row = first["ours"]
    for key in ("ratio", "ratio_spread"):
        row[key] = [10 * max(row["ratio_spread"])] * 2 if key == "ratio_spread" else 10 * max(row["ratio_spread"])
    found, compared = compare.changes(results, slower)
    assert [(c.implementation, c.factor > 1) for c in found] == [("ours", True)] and compared > 8
    back, _ = compare.changes(slower, results)
    assert [(c.implementation, c.factor < 1) for c in back] == [("ours", True)]
    # Another machine: times say nothing, ratios do.
    slower["environment"]["cpu"] = "another"
    elsewhere, fewer = compare.changes(results, slower)
    assert [c.implementation for c in elsewhere] == ["ours"] and fewer < compared
    # Other vector instructions: the floor of 16-bit workloads is another.
    slower["environment"][instructions] = "another"
    assert compare.changes(results, slower)[0] == elsewhere  # float32
    before = copy.deepcopy(results)
    for one in (before, slower):
        one["workloads"][0]["dtype"] = "float16"
    others, fewest = compare.changes(before, slower)
    assert others == [] and 0 < fewest < fewer


def test_roofline_shows_floor_and_measurement():
    text = roofline.tables({})
    assert "| `token_logps_fwd` | 1.05e+03 | 2.1 | 244 µs | 350 µs | not measured |" in text
    assert "| `pairs` | 3 | 25.8 | 32.7 ms |" in text
    row = {"median_s": 1.0, "ratio": 0.55, "ratio_spread": [0.5, 0.6]}
    tokens = {"family": "tokens", "rows": 4096, "vocab": 128256, "dtype": "bfloat16", "subjects": {"forward_cuda": row}}
    keys = {"labelled": 8192, "hidden": 4096, "vocab": 128256, "reference": "given", "responses": 2}
    ours = {**row, "ratio": 1.07, "peak_bytes": 2 * 2 * 8192 * 4096 + (1 << 30)}
    head = {"family": "head", **keys, "mode": "frozen", "subjects": {"ours": ours}}
    for name, seconds in (("backward_cuda", 2.0), ("naive", 18.0), ("compiled", 4.5), ("ours", 6.0)):
        tokens["subjects"][name] = {"median_s": seconds}
    text = roofline.tables({"environment": {"gpu": "X"}, "workloads": [tokens, head]})
    assert "cuda 91% of the copy rate" in text and "1.07 (0.50 to 0.60), 1.00 GiB" in text and "measured on X" in text
    assert "cuda 6.0× naive and 1.5× torch.compile, cpo.token_logps 3.0× naive and 0.8× torch.compile" in text


def test_roofline_of_live_columns():
    """Everything live costs no less than the exact products; fewer live columns cost less, dX by what L2 gives."""
    card = roofline.DEVICES[1]
    exact = roofline.head_floor("forward", card)[0]
    assert roofline.live_dx(1.0, card) >= exact and roofline.live_dw(1.0, 1.0, card)[0] >= exact
    assert roofline.live_dx(0.134, card) == pytest.approx(2 * 0.134 * 8192 * 128256 * 4096 * 3 / 256 / 5.5e12)
    for path in roofline.LIVE_PATHS:
        many, few = (sum(roofline.live_head(path, eps, card)) for eps in roofline.LIVE)
        assert few < many < (2 if path == "frozen" else 3) * exact
    assert "| dW filtered | 2⁻¹⁴ |" in roofline.tables({})


def test_figures_of_a_gpu_come_from_both_files(results):
    """gpu.json of the first call and gpu-more.json of the second (tools/gpu.sh), here with the figures of a CPU."""
    first, more = copy.deepcopy(results), copy.deepcopy(results)
    first["environment"]["gpu"] = "a card"
    for row in first["workloads"][1]["subjects"].values():
        row.pop("median_s", None)
        row["why"] = side_by_side.TIME_LIMIT
    del first["workloads"][2]
    first |= {"growth": [], "cold_start": {}}
    whole = plot.with_more(first, more)
    kept = whole["workloads"]
    assert kept[0] is first["workloads"][0] and kept[1] is more["workloads"][1] and kept[-1] is more["workloads"][2]
    assert len(kept) == len(results["workloads"])
    assert whole["growth"] == more["growth"] and whole["cold_start"] == more["cold_start"]
    assert plot.with_more({}, {}) == {} and plot.with_more(first, {}) is first
    text = plot.readme_gpu_table(whole)
    assert text.count("× ·") == 3 * 3 and "forward" in text.splitlines()[0] and "a card, " in text
    assert "`token_logps_fused_` not measured" in text
    row = {"median_s": 1.0, "ratio": 1.1, "ratio_spread": [1.0, 1.2]}
    keys = {"rows": roofline.ROWS, "vocab": roofline.VOCAB, "dtype": "bfloat16"}
    whole["workloads"].append({"family": "tokens", **keys, "subjects": {"fused_cuda": row, "fused_triton": row}})
    assert "`token_logps_fused_` triton 91% of the copy rate, cuda 91% of the copy rate" in plot.readme_gpu_table(whole)
    assert plot.readme_gpu_table({}) == "On a GPU: not measured."


def test_exponent():
    assert exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
    assert exponent([1], [2]) is None and exponent([1, 2], [0, 2]) is None


def test_summary_is_of_the_same_rounds():
    row = summary([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert row["ratio"] == 2.0 and row["ratio_spread"] == [1.0, 3.0] and row["median_s"] == 4.0
    assert "ratio" not in summary([1.0], [])


# ------------------------------------------------------------------------------------------- a run of a family of toys


@pytest.fixture
def toys(monkeypatch):
    """Implementations that are right, wrong, NaN, raise, and refuse."""

    def answers(value):
        return lambda tensors: Step(lambda: {"y": torch.full((3, 4), value)})

    def raises(tensors):
        raise RuntimeError("out of something")

    implementations = {
        "floor": Implementation("floor", lambda tensors: Step(lambda: {})),
        "right": Implementation("right", answers(2.0)),
        "wrong": Implementation("wrong", answers(2.1)),
        "nan": Implementation("nan", answers(float("nan"))),
        "raising": Implementation("raising", raises),
        "absent": Implementation("absent", raises, package="no-such-package"),
        "refusing": Implementation("refusing", raises, refuses=lambda workload, device: "not on a Tuesday"),
    }
    truth = lambda tensors: {"y": torch.full((3, 4), 2.0)}  # noqa: E731
    family = Family(Head, lambda workload, device: None, implementations, "floor", truth, lambda workload: {"y": 1e-3})
    monkeypatch.setitem(FAMILIES, "toys", family)
    monkeypatch.setattr(side_by_side, "Worker", Here)
    Here.turns = []
    return list(implementations)


def test_only_right_results_are_timed_and_nothing_is_dropped(toys):
    workload = Head("tiny", 4, 8)
    rows = bench().measure("toys", workload, toys)
    assert list(rows) == toys
    assert {n for n, r in rows.items() if "median_s" in r} == {"floor", "right"}
    assert rows["wrong"]["why"].startswith("wrong result: y is off by 5.00e-02")
    assert rows["nan"]["why"].startswith("wrong result: y is off by inf")
    assert rows["raising"]["why"] == "RuntimeError: out of something"
    assert rows["absent"]["why"] == "no-such-package is not installed"
    assert rows["refusing"]["why"] == "not on a Tuesday"
    result = described("toys", workload, CPU) | {
        "family": "head",
        "subjects": {"ours": rows["wrong"], "trl": rows["wrong"]},
    }
    assert len(run.wrong_results([result])) == 1  # ours fails the run, a baseline does not


def test_implementations_take_turns_in_changing_order(toys):
    bench().measure("toys", Head("tiny", 4, 8), ["floor", "right"])
    assert Here.turns == ["floor", "right", "floor", "right", "floor", "right"]  # round 1 is moved on and turned around
    Here.turns = []
    bench(rounds=2).measure("toys", Head("tiny", 4, 8), ["right", "floor"])
    assert Here.turns == ["right", "floor", "right", "floor"]


def test_large_implementations_are_in_memory_one_at_a_time(toys, monkeypatch):
    alive, most = set(), []
    monkeypatch.setitem(FAMILIES, "toys", replace(FAMILIES["toys"], apart=lambda workload: True))

    def load(self, workload, limit_s, real=Here.load):
        alive.add(self.arguments[1])
        most.append(len(alive - {"truth"}))
        real(self, workload, limit_s)

    monkeypatch.setattr(Here, "load", load)
    monkeypatch.setattr(Here, "stop", lambda self, limit_s=0: alive.discard(self.arguments[1]))
    rows = bench(rounds=2).measure("toys", Head("tiny", 4, 8), ["floor", "right", "wrong"])
    assert rows["right"]["rounds"] == 2 and rows["right"]["first_s"] and max(most) == 1 and len(most) == 1 + 3 + 2 * 2


def test_implementations_load_side_by_side(toys, monkeypatch):
    events = []
    monkeypatch.setattr(Here, "begin_load", lambda self, workload: events.append("begin"))

    def load(self, workload, limit_s, real=Here.load):
        events.append("load")
        real(self, workload, limit_s)

    monkeypatch.setattr(Here, "load", load)
    bench(rounds=1).measure("toys", Head("tiny", 4, 8), ["floor", "right"])
    assert events == ["load", "begin", "begin", "load", "load"]  # the truth first, alone in memory


def test_only_the_tiny_model_of_a_training_step_stays_loaded():
    for family, workload in (("training_step", TrainingStep()), ("trainers", TrainerStep())):
        assert not FAMILIES[family].apart(workload)
        assert FAMILIES[family].apart(replace(workload, model="smollm2-135m"))
    assert not FAMILIES["head"].apart(Head("tiny", 4, 8))


def test_the_truth_may_take_longer_than_a_implementation(toys, monkeypatch):
    limits = {}

    def ask(self, command, *arguments, limit_s, real=Here.ask):
        limits[command] = limit_s
        return real(self, command, *arguments, limit_s=limit_s)

    monkeypatch.setattr(Here, "ask", ask)
    bench(deadline=time.monotonic() + 1000).measure("toys", Head("tiny", 4, 8), ["floor", "right"])
    assert limits["first"] == limits["check"] == 10 and limits["keep"] == 600
    bench(deadline=time.monotonic() + 100).measure("toys", Head("tiny", 4, 8), ["floor", "right"])
    assert 90 < limits["keep"] <= 100


def test_a_slow_start_is_no_failure(toys, monkeypatch):
    """Loading imports transformers and TRL or reads a model: minutes where nothing is cached, also before each turn."""
    monkeypatch.setitem(FAMILIES, "toys", replace(FAMILIES["toys"], apart=lambda workload: True))
    limits = []

    def load(self, workload, limit_s, real=Here.load):
        limits.append(limit_s)
        real(self, workload, limit_s)

    monkeypatch.setattr(Here, "load", load)
    bench(deadline=time.monotonic() + 1000, answer_s=1).measure("toys", Head("tiny", 4, 8), ["floor", "right"])
    assert len(limits) == 3 + 2 * 3 and min(limits) == side_by_side.LOAD_S >= 300
    limits.clear()
    bench(deadline=time.monotonic() + 50, answer_s=1).measure("toys", Head("tiny", 4, 8), ["floor"])
    assert 40 < limits[0] <= 50  # within the run's own limit


def test_the_file_is_written_after_every_implementation_and_round(toys, tmp_path, monkeypatch):
    """What a signal cuts off is there, and --resume measures the rest."""
    seen = []
    monkeypatch.setattr(run, "write", lambda out, content: seen.append(copy.deepcopy(content["workloads"])))
    runs = (Run("toys", Head("tiny", 4, 8), ("floor", "right")),)
    monkeypatch.setitem(SETS, "ci", replace(SETS["ci"], runs=runs, growth=(), rounds=2))
    monkeypatch.setattr(run.report, "title", lambda result: "toys")
    monkeypatch.setattr(run.report, "table", lambda result: "")
    monkeypatch.setattr(run, "wrong_results", lambda results: [])
    monkeypatch.setattr(arguments, "PARTS", ("toys",))
    run.main(["--set", "ci", "--device", "cpu", "--only", "toys", "--out", str(tmp_path / "results.json")])
    implementations = [workload["subjects"] for (workload,) in seen]
    assert [[row.get("rounds", row.get("why")) for row in rows.values()] for rows in implementations] == [
        [side_by_side.TIME_LIMIT] * 2, [side_by_side.TIME_LIMIT] * 2, [1, 1], [2, 2], [2, 2],
    ]  # fmt: skip
    assert "first_s" in implementations[0]["floor"] and "first_s" not in implementations[0]["right"]
    assert not finished(seen[0][0], ["floor", "right"]) and finished(seen[-1][0], ["floor", "right"])


def test_rounds_before_the_time_limit_count(toys, monkeypatch):
    one = bench(rounds=5)
    monkeypatch.setitem(FAMILIES, "toys", replace(FAMILIES["toys"], apart=lambda workload: True))

    def ask(self, command, *arguments, limit_s, real=Here.ask):
        if command == "turn" and Here.turns.count("right") == 2:
            one.deadline = time.monotonic() - 1
        return real(self, command, *arguments, limit_s=limit_s)

    monkeypatch.setattr(Here, "ask", ask)
    rows = one.measure("toys", Head("tiny", 4, 8), ["floor", "right"])
    assert [row["rounds"] for row in rows.values()] == [2, 2] and not any("why" in row for row in rows.values())


def test_growth_is_written_after_every_point(toys, monkeypatch):
    known = []
    one = Growth(Head("tiny", 4, 8), "groups", (2, 4))
    monkeypatch.setitem(FAMILIES, "head", FAMILIES["toys"])
    monkeypatch.setattr(growth, "IMPLEMENTATIONS", ("floor", "right"))
    whole = growth.measure(bench(rounds=1), one, lambda row: known.append(copy.deepcopy(row)))
    assert [len(row["points"]) for row in known] == [1, 2] and known[-1] == whole
    assert known[0]["seen"]["right"]["time"] is None and whole["seen"]["right"]["time"] is not None


def test_after_the_time_limit_nothing_begins(toys):
    rows = bench(deadline=time.monotonic() - 1).measure("toys", Head("tiny", 4, 8), toys)
    assert rows["right"] == {"why": "the time limit of the run was reached"} and "no-such" in rows["absent"]["why"]


def test_a_file_that_was_cut_off_goes_on(toys, tmp_path, monkeypatch, capsys):
    """What is there is kept as it is; what a time limit cut off, and what is new, is measured."""
    a, b = Head("tiny", 4, 8), Head("tiny", 4, 16)
    runs = tuple(Run("toys", w, ("floor", "right", "raising")) for w in (a, b))
    monkeypatch.setitem(SETS, "ci", replace(SETS["ci"], runs=runs, growth=(), rounds=1))
    monkeypatch.setattr(run.report, "title", lambda result: "toys")
    monkeypatch.setattr(run.report, "table", lambda result: "")
    monkeypatch.setattr(run, "wrong_results", lambda results: [])
    monkeypatch.setattr(arguments, "PARTS", ("toys",))
    out = tmp_path / "results.json"
    common = ["--set", "ci", "--device", "cpu", "--threads", "1", "--only", "toys", "--out", str(out)]
    assert run.main([*common, "--time-limit", "1e-9"]) == 0
    cut = json.loads(out.read_text())["workloads"]
    assert {row["why"] for result in cut for row in result["subjects"].values()} == {side_by_side.TIME_LIMIT}
    assert run.main([*common, "--resume"]) == 0
    first = json.loads(out.read_text())["workloads"]
    assert [result["vocab"] for result in first] == [8, 16]
    assert all(result["subjects"]["raising"]["why"] == "RuntimeError: out of something" for result in first)
    assert all(result["subjects"]["right"]["rounds"] == 1 for result in first)
    del first[0]
    out.write_text(json.dumps(json.loads(out.read_text()) | {"workloads": first}))
    Here.turns = []
    assert run.main([*common, "--resume"]) == 0
    assert sorted(Here.turns) == ["floor", "right"]  # only of the missing workload
    assert json.loads(out.read_text())["workloads"][1] == first[0]
    monkeypatch.setitem(SETS, "ci", replace(SETS["ci"], runs=runs[1:], growth=(), rounds=1))
    assert run.main([*common, "--resume"]) == 0  # what is not asked for again stays
    assert [result["vocab"] for result in json.loads(out.read_text())["workloads"]] == [8, 16]
    with pytest.raises(ValueError, match="--resume: .* was measured with threads 1, but this is 3: start a new file"):
        run.main([*common, "--resume", "--threads", "3"])
    with pytest.raises(ValueError, match="give --out FILE"):
        run.main(["--set", "ci", "--resume"])


def test_a_load_that_was_begun_is_answered_once():
    worker = Worker("preference", "reference", "cpu", 1)
    try:
        worker.begin_load(Preference(pairs=4))
        worker.load(Preference(pairs=4), 60)
        assert not worker.loading and worker.ask("first", limit_s=60) > 0
    finally:
        worker.stop()


def test_a_process_that_hangs_or_dies_is_reported():
    worker = Worker("preference", "reference", "cpu", 1)
    try:
        with pytest.raises(Failed, match="no answer to 'first' within 0 s"):
            worker.ask("first", limit_s=0)
        worker.start()
        worker.process.kill()
        worker.process.join()
        with pytest.raises(Failed, match=r"its process died at 'first' with status -9 \(killed: out of memory\?\)"):
            worker.ask("first", limit_s=5)  # not begun anew without its workload
    finally:
        worker.stop()


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("name", SETS)
def test_sets_name_what_exists(name, capsys):
    for one in SETS[name].runs:
        assert set(one.implementations) <= set(FAMILIES[one.family].implementations)
        assert FAMILIES[one.family].floor in (*one.implementations, "") or not one.implementations
    assert run.main(["--set", name, "--list", "--only", *PARTS]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(SETS[name].runs)
    assert run.main(["--set", name, "--list"]) == 0
    assert "Trainer of TRL" not in capsys.readouterr().out


def test_gpu_set_has_the_sizes_of_the_floors():
    results = [described(r.family, r.workload, CPU) for r in SETS["gpu"].runs]
    heads = [r for r in results if r.get("labelled") == roofline.TOKENS and r["vocab"] == roofline.VOCAB]
    assert {r["mode"] for r in heads if r["reference"] == "given" and r["responses"] == 2} == {
        "trainable", "frozen", "forward",
    }  # fmt: skip
    assert any(r.get("rows") == roofline.ROWS and r["vocab"] == roofline.VOCAB for r in results)
    assert any(r["family"] == "preference" and r["pairs"] == roofline.PAIRS for r in results)


def test_workload_from_the_command_line():
    made = run.parse_workload("head=gemma-2-9b,groups=3,mode=frozen,length=40,prompt=10,softcap=20")
    assert (made.vocab, made.groups, made.mode, made.labelled, made.softcap) == (256000, 3, "frozen", 180, 20.0)
    for text, error in (
        ("head=gpt", "head must be one of"),
        ("group=3", "unknown key 'group'"),
        ("mode=fast", "impossible workload"),
        ("length=8,prompt=8", "prompt 8 must be shorter than length 8"),
    ):
        with pytest.raises(ValueError, match=error):
            run.parse_workload(text)


def test_a_pair_beyond_the_budget_in_every_way(monkeypatch, tmp_path):
    """The ways agree, and none but the library's two are called strategies."""
    monkeypatch.setitem(long_pairs.HEADS, "tiny", (24, 1999, None))
    monkeypatch.setitem(strategy.DEFAULT_BUDGET, "cpu", 16 * 1999 * 4)
    out = tmp_path / "pairs.json"
    assert long_pairs.main(["--case", "tiny", "40", "float32", "--rounds", "2", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    (case,) = content["cases"]
    assert case["chunks"] == 3 and list(case["ways"]) == ["products", "deferred", "two_pass", "by rows"]
    assert case["ways"]["products"]["ratio"] == 1 and all(row["ms"] > 0 for row in case["ways"].values())
    assert long_pairs.table(content).startswith("| one pair | `deferred` | `two_pass` | by rows |")
    monkeypatch.setitem(long_pairs.WAYS, "two_pass", lambda pair: (0.0, pair.x, pair.weight))
    monkeypatch.setattr(long_pairs, "two_pass", long_pairs.WAYS["two_pass"])
    with pytest.raises(ValueError, match="differs from by_rows"):
        long_pairs.main(["--case", "tiny", "40", "float32"])


def test_the_profile_names_the_parts_of_every_strategy(tmp_path):
    out = tmp_path / "profile.json"
    assert profile.main(["--set", "ci", "--rounds", "1", "--out", str(out)]) == 0
    rows = {row["strategy"]: row for row in json.loads(out.read_text())["strategies"]}
    assert list(rows) == list(profile.STRATEGIES)
    for row in rows.values():
        assert row["ms"]["products"] > 0 and row["ms"]["token kernels"] > 0
    assert rows["pairs"]["ms"]["loss kernels"] > 0


def test_the_profile_counts_the_matmuls_of_the_cpu_as_products():
    parts = ("cpo_kernels::logits_", "cpo_kernels::add_product_", "aten::addmm", "cpo_kernels::linear_preference")
    assert [profile.part_of(name) for name in parts] == ["products"] * 3 + ["rest"]


def test_the_profile_of_a_gpu_counts_kernels_by_their_operator():
    """Kernels are rows of their own in the profiler's list too, which would count them twice."""

    def event(key, device_type, on_gpu, count=1):
        return SimpleNamespace(
            key=key, device_type=device_type, self_device_time_total=on_gpu, self_cpu_time_total=9e3, count=count
        )

    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    events = [event("aten::mm", cpu, 2e3), event("nvjet", gpu, 2e3, 3), event("cpo_kernels::token_logps_fwd", cpu, 500)]
    assert profile.spent(events, True) == {"aten::mm": 2.0, "cpo_kernels::token_logps_fwd": 0.5}
    assert profile.spent(events, False) == {"aten::mm": 9.0, "cpo_kernels::token_logps_fwd": 9.0}
    assert profile.launches(events) == 3


@pytest.mark.parametrize("given, missing", [("--model", "--data"), ("--data", "--model")])
def test_real_rows_need_a_model_and_text(given, missing):
    with pytest.raises(ValueError, match=f"{given} alone gives no rows for the head: also give {missing}"):
        run.main(["--set", "filtered", "--list", given, "x"])
