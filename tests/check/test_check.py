"""`python -m cpo_kernels.check.run`: right kernels pass, wrong ones are reported."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from cpo_kernels.backends import dispatch
from cpo_kernels.check import run
from cpo_kernels.check.compare import Case
from cpo_kernels.cli import main


def check(tmp_path, only, *arguments):
    out = tmp_path / "check.json"
    flags = ["--device", "cpu", "--impl", "cpu", "--only", only, "--in-process", "--out", str(out)]
    return run.main([*flags, *arguments]), json.loads(out.read_text())


def test_the_cpu_backend_passes(tmp_path):
    """One group; tests/parity runs every case."""
    status, result = check(tmp_path, "beyond-2^31/*")
    assert status == 0
    assert [c["status"] for c in result["cases"]] == ["passed", "skipped"]  # the other needs a GPU's memory
    assert result["counts"] == {"passed": 1, "failed": 0, "crashed": 0, "skipped": 1}
    assert result["environment"]["versions"]["torch"] != "not installed"


def test_a_case_has_one_name_and_belongs_to_one_group():
    names = [case.name for case in run.all_cases()]
    assert len(set(names)) == len(names)
    groups = [name.partition("/")[0] for name in names]
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index)


def test_a_gradient_off_by_a_percent_fails(tmp_path, monkeypatch, capsys):
    right = dispatch.kernels

    class Wrong:
        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, name):
            return getattr(self.backend, name)

        def token_logps_bwd_(self, logits, labels, lse, grad, *head):
            self.backend.token_logps_bwd_(logits, labels, lse, grad * 1.01, *head)

    monkeypatch.setattr(dispatch, "kernels", lambda impl, tensor: Wrong(right(impl, tensor)))
    status, result = check(tmp_path, "sizes/*", "--quick")
    assert status == 1 and result["counts"]["failed"] > 0
    assert "FAIL" in capsys.readouterr().out


def test_how_many_cases_there_are_and_how_far_it_is(tmp_path, monkeypatch, capsys):
    """The count on one line of a terminal, which ends blank before a group's own line."""
    command = ["--device", "cpu", "--impl", "cpu", "--quick", "--in-process", "--only", "sequence*"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run.main(command) == 0
    printed = capsys.readouterr()
    number = int(re.match(r"(\d+) cases on cpu, backends: cpu\n", printed.out)[1])
    assert number > 0 and f"\r{number} of {number}: cpu sequence" in printed.err
    assert run.main([*command, "-q"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert run.main(command) == 0 and capsys.readouterr().err == ""


def test_a_pattern_that_names_nothing():
    with pytest.raises(ValueError, match="--only 'no-such-case' names no case"):
        run.main(["--device", "cpu", "--only", "labels*", "no-such-case"])


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_backend_that_is_not_here_is_one_line(monkeypatch, capsys, impl):
    monkeypatch.setitem(dispatch._MISSING, impl, "it was left out")
    assert main(["check", "--device", "cpu", "--impl", impl]) == 2
    error = f"cpo-kernels check: ValueError: --impl {impl} cannot run here: it was left out\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("command", ["check", "bench"])
@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:", "", "meta", "cuda:99", "cpu:1", "cuda:-1"])
def test_a_device_that_is_not_here_is_one_line(capsys, command, device):
    assert main([command, f"--device={device}", "--list"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cpo-kernels {command}: ValueError: --device ") and error.count("\n") == 1
    assert device in error


@pytest.mark.parametrize("command", ["check", "bench"])
def test_results_that_cannot_be_written_are_said_before_the_work(capsys, command, tmp_path):
    assert main([command, "--device=cpu", "--list", f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert f"--out {tmp_path} is a folder" in error and error.count("\n") == 1
    assert not list(tmp_path.parent.glob("*.tmp"))


@pytest.mark.parametrize("option", ["--time-limit=nan", "--time-limit=0", "--rounds=-1", "--rounds=0", "--threads=0"])
def test_numbers_of_bench_are_positive(capsys, option):
    assert main(["bench", "--device=cpu", "--list", option]) == 2
    assert f"{option.replace('=', ' ')}: give a positive number" in capsys.readouterr().err


def test_a_time_limit_of_any_length():
    assert run.main(["--device", "cpu", "--only", "sizes/float32/N=1,V=1", "--time-limit", "1e300"]) == 0


def test_processes_side_by_side_give_every_case_once_in_order(tmp_path, capsys):
    only = ["labels*", "extreme/float32/not-finite", "sizes/*/N=5,V=2"]
    results = []
    for flags in (["--processes", "2"], ["--in-process"]):
        out = tmp_path / "check.json"
        assert run.main(["--device", "cpu", "--impl", "cpu", "--only", *only, *flags, "--out", str(out)]) == 0
        results.append(json.loads(out.read_text()))
    beside, apart = ([(c["backend"], c["case"], c["status"]) for c in r["cases"]] for r in results)
    assert beside == apart and len(beside) == 6 + 1 + 4 and results[0]["left"] == 0
    assert capsys.readouterr().out.count("PASS") == 2 * 3


def test_finished_groups_are_saved_before_the_rest_has_run(tmp_path, monkeypatch):
    out = tmp_path / "check.json"
    right = run.run_case

    def killed_at_labels(backend, case):
        if case.group == "labels":
            raise KeyboardInterrupt
        return right(backend, case)

    monkeypatch.setattr(run, "run_case", killed_at_labels)
    flags = ["--in-process", "--quick", "--only", "labels*", "extreme*", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        run.main(["--device", "cpu", "--impl", "cpu", *flags])
    result = json.loads(out.read_text())
    assert {c["case"].partition("/")[0] for c in result["cases"]} == {"extreme"} and result["left"] == 1


def test_a_killed_check_keeps_its_finished_cases(tmp_path):
    """In the middle of a group, by a signal that nothing can catch."""
    out = tmp_path / "check.json"
    program = (
        "from tests.check import test_check; from cpo_kernels.check import run\n"
        "run.SAVE_S, run.all_cases = 0.0, test_check.deadly_cases\n"
        f"run.main(['--device', 'cpu', '--impl', 'cpu', '--only', 'fine*', 'hangs*', '--out', {str(out)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out.exists() and len(json.loads(out.read_text())["cases"]) == 2):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = json.loads(out.read_text())
    assert [c["status"] for c in result["cases"]] == ["passed", "passed"] and result["left"] == 2


def test_a_time_limit_ends_the_check_with_what_has_run(tmp_path, monkeypatch, capsys):
    """A case that hangs is given up at the limit, what has run is reported, and the exit status says that it is not
    all."""
    out = tmp_path / "check.json"
    monkeypatch.setattr(run, "all_cases", deadly_cases)
    start = time.monotonic()
    arguments = ["--device", "cpu", "--impl", "cpu", "--only", "fine*", "hangs*", "--out", str(out)]
    assert run.main([*arguments, "--time-limit", "15"]) == 1
    assert time.monotonic() - start < 60
    result = json.loads(out.read_text())
    assert result["counts"] == {"passed": 2, "failed": 0, "crashed": 0, "skipped": 0} and result["left"] == 2
    printed = capsys.readouterr().out
    assert "2 passed, 2 not run" in printed and "hangs" in printed


def test_a_time_limit_in_the_process_itself(tmp_path, monkeypatch):
    def slow(backend, findings):
        time.sleep(0.3)

    monkeypatch.setattr(run, "all_cases", lambda: [Case(f"slow/{k}", slow) for k in range(40)])
    status, result = check(tmp_path, "slow/*", "--time-limit", "1")
    assert status == 1 and 0 < len(result["cases"]) < 40 and result["left"] == 40 - len(result["cases"])


@pytest.mark.parametrize("option", ["--time-limit", "--case-limit"])
@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_limit_that_is_no_time(option, value):
    with pytest.raises(ValueError, match=f"{option} {value}: give a positive number of seconds"):
        run.main(["--device", "cpu", option, value])


def test_a_case_that_kills_its_process_beside_others(tmp_path):
    """Each of two processes loses one case and goes on."""
    jobs = [("cpu", name) for name in ("dies/0", "dies/1", "fine/2", "fine/3")]
    results = list(run.run_beside(jobs, "cpu", deadly_cases, 300, 2))
    assert sorted((r["case"], r["status"]) for r in results) == [
        ("dies/0", "crashed"), ("dies/1", "crashed"), ("fine/2", "passed"), ("fine/3", "passed"),
    ]  # fmt: skip


def test_nothing_goes_on_after_an_interrupt():
    jobs = [("cpu", f"fine/{k}") for k in (2, 3)] + [("cpu", "hangs/4"), ("cpu", "hangs/5")]
    running = run.run_beside(jobs, "cpu", deadly_cases, 300, 2)
    assert next(running)["status"] == "passed"
    before = set(multiprocessing.active_children())
    running.close()  # what Ctrl-C does
    assert before and not any(process.is_alive() for process in before)
    assert not [t for t in threading.enumerate() if t.name.endswith("(watch)")]


def deadly_cases():
    """dies, hangs and fine; what is fine comes first where they run one after the other."""

    def dies(backend, findings):
        os._exit(3)

    def hangs(backend, findings):
        time.sleep(1000)

    cases = [Case(f"dies/{k}", dies, True) for k in (0, 1)] + [Case(f"hangs/{k}", hangs, True) for k in (4, 5)]
    return [Case(f"fine/{k}", lambda backend, findings: None, True) for k in (2, 3)] + cases
