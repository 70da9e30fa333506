"""`python -m cpo_kernels.check.run`: right kernels pass, wrong ones are reported."""

import json

import pytest

from cpo_kernels import homes
from cpo_kernels.check import run


def check(tmp_path, only, *arguments):
    out = tmp_path / "check.json"
    flags = ["--device", "cpu", "--impl", "cpu", "--only", only, "--in-process", "--out", str(out)]
    return run.main([*flags, *arguments]), json.loads(out.read_text())


@pytest.mark.parametrize(
    "only",
    ["sizes/*", "layouts/*", "options/*", "extreme/*", "labels*", "same-bits*", "sequence_sum/*", "loss-types/*"],
)
def test_the_cpu_home_passes(tmp_path, only):
    status, result = check(tmp_path, only, "--quick")
    assert status == 0
    assert result["counts"]["passed"] == len(result["cases"]) > 0
    assert result["environment"]["versions"]["torch"] != "not installed"


def test_a_gradient_off_by_a_percent_fails(tmp_path, monkeypatch, capsys):
    right = homes.kernels

    class Wrong:
        def __init__(self, home):
            self.home = home

        def __getattr__(self, name):
            return getattr(self.home, name)

        def token_logps_bwd_(self, logits, labels, lse, grad, *head):
            self.home.token_logps_bwd_(logits, labels, lse, grad * 1.01, *head)

    monkeypatch.setattr(homes, "kernels", lambda impl, tensor: Wrong(right(impl, tensor)))
    status, result = check(tmp_path, "sizes/*", "--quick")
    assert status == 1 and result["counts"]["failed"] > 0
    assert "FAIL" in capsys.readouterr().out


def test_a_pattern_that_names_nothing():
    with pytest.raises(ValueError, match="--only 'no-such-case' names no case"):
        run.main(["--device", "cpu", "--only", "no-such-case"])
