"""CPO against its baselines: each recipe on a very small world, the statistics, resuming, and the page's check."""

import json
import math
import random
import shutil
import sys

import pytest
import torch

import cpo_kernels as cpo
from benchmarks import plot
from benchmarks.claims import lab as lab_module
from benchmarks.claims import methods
from benchmarks.claims import report as claims_report
from benchmarks.claims import run as claims
from benchmarks.claims.lab import Setting
from benchmarks.claims.methods import on_front, one_hot, shifted
from benchmarks.claims.run import METHODS, Run, measure, share_of_box
from benchmarks.claims.world_lab import REQUESTS, WEIGHTS, Budget, WorldLab
from cpo_kernels.data.packing import Encoded
from cpo_kernels.data.records import Response
from cpo_kernels.demo.world import OBJECTIVES

TINY = Budget(
    people=2, prompts=40, hidden_size=32, num_layers=1, supervised_steps=3, responses=8, preference_steps=4, groups=6,
    questions=24, swept=2,
)  # fmt: skip
SETTING = Setting(1e-3, 0.1)
NAMES = [o.name for o in OBJECTIVES]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> WorldLab:
    torch.set_num_threads(1)
    return WorldLab(1, TINY, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def start(lab):
    return methods.sft(lab, SETTING, "all")


def trained(monkeypatch) -> list:
    """(config, records) of every run of the trainer from here on."""
    seen, train = [], lab_module.train

    def spy(config, **objects):
        seen.append((config, objects["records"]))
        return train(config, **objects)

    monkeypatch.setattr(lab_module, "train", spy)
    return seen


# ------------------------------------------------------------------------------------------------------------ recipes


def test_modpo_is_the_librarys_margin_form():
    """DPO at beta / w_k on the shifted reference gives the loss and gradient of loss type "modpo"."""
    generator = torch.Generator().manual_seed(0)
    beta, weights = 0.3, [0.5, 0.2, 0.3]
    logps, ref, first, second = 5 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    logps.requires_grad_()

    def unit(values):
        return [(Encoded((1,), ((2,),) * 6, (), (), [], ref_logps=tuple(values.tolist())),)]

    moved = shifted(unit(ref), [(weights[1], unit(first)), (weights[2], unit(second))])[0][0].ref_logps
    ours = cpo.preference_loss(logps, ref_logps=torch.tensor(moved, dtype=torch.float64), beta=beta / weights[0]).loss
    margins = weights[1] * beta * (first - ref) + weights[2] * beta * (second - ref)
    options = {"loss_type": "modpo", "modpo_weight": weights[0]}
    theirs = cpo.preference_loss(logps, ref_logps=ref, margins=margins, beta=beta, **options).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    grads = [torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_modpo_with_all_weight_on_one_objective_is_dpo_on_it(lab, start):
    for i in range(3):
        alone, dpo = methods.modpo(lab, start, one_hot(i, 3), SETTING), methods.single(lab, start, i, SETTING)
        assert all(torch.equal(alone[key], dpo[key]) for key in dpo)


def test_modpo_moves_away_from_its_first_objective(lab, start):
    mixed, alone = (
        methods.modpo(lab, start, (1 / 3, 1 / 3, 1 / 3), SETTING),
        methods.dpo(lab, start, one_hot(0, 3), SETTING),
    )
    assert any(not torch.equal(mixed[key], alone[key]) for key in alone)


def test_soup_is_the_mean_of_the_single_models(lab, start):
    weights = (0.5, 0.25, 0.25)
    parts = [methods.single(lab, start, i, SETTING) for i in range(3)]
    for key, tensor in methods.soup(lab, start, weights, SETTING).items():
        expected = sum(w * part[key].double() for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(t, parts[1][key]) for key, t in methods.soup(lab, start, one_hot(1, 3), SETTING).items())


def test_single_objective_dpo_orders_pairs_by_only_it(lab, start, monkeypatch):
    seen = trained(monkeypatch)
    methods.dpo(lab, start, (0.0, 1.0, 0.0), Setting(2e-3))
    ((config, records),) = seen
    assert [o["weight"] for o in config["objectives"]] == [0, 1, 0] and records is lab.records


def test_budgets_are_equal(lab, start, monkeypatch):
    """The same steps after SFT; on pairs the same number of (prompt, condition) groups in a step."""
    seen = trained(monkeypatch)
    cpsft = methods.cpsft(lab, SETTING)
    methods.cpo(lab, cpsft, Setting(3e-3))
    methods.ric(lab, cpsft, Setting(3e-3))
    methods.dpo(lab, start, (1.0, 1.0, 1.0), Setting(3e-3))
    steps = [(config["stage"], config["training"]["max_steps"]) for config, _ in seen]
    assert steps == [("cpsft", 3), ("cdpo", 2), ("cdpo", 2), ("cpsft", 4), ("dpo", 4)]
    for config, _ in seen:
        if config["stage"] in ("cdpo", "dpo"):
            prompts = config["training"]["batch_size"]
            assert prompts * config["conditions"].get("per_prompt", 1) == TINY.groups
    assert seen[1][0]["seed"] != seen[2][0]["seed"]  # the second round draws other conditions


def test_cpo_takes_the_steps_of_all_models_of_a_baseline(lab, monkeypatch):
    """In rounds that see a prompt at most once, each under other conditions, from the model of the one before."""
    seen = trained(monkeypatch)
    cpsft, prompts = methods.cpsft(lab, SETTING), TINY.groups // TINY.conditions
    del seen[:]
    methods.cpo(lab, cpsft, Setting(6e-3), models=3)
    methods.cpo(lab, cpsft, Setting(6e-3), models=11)
    steps = [config["training"]["max_steps"] for config, _ in seen]
    assert steps == [6, 6, 14, 15, 15] and max(steps) * prompts <= len(lab.records)
    assert len({config["seed"] for config, _ in seen[2:]}) == 3
    for (_, records), length in zip(seen, steps, strict=True):
        assert len(records) == prompts * length == len({record.prompt for record in records})


def test_the_cost_of_a_method_is_that_of_its_models(lab, start):
    """Each model once, whatever run trained it; a prompt's tokens count once for all its answers."""
    lab.used.clear()
    weights = (0.5, 0.5, 0.0)
    methods.soup(lab, start, weights, SETTING)
    methods.modpo(lab, start, weights, SETTING)
    methods.sft(lab, SETTING, "all")
    spent = claims.cost(lab.used)
    assert [spent[stage]["models"] for stage in ("supervised", "further")] == [1, 3]
    assert spent["supervised"]["steps"] == TINY.supervised_steps
    assert spent["further"]["steps"] == 3 * TINY.preference_steps
    assert all(spent[stage][key] > 0 for stage in spent for key in ("tokens", "seconds"))


def test_the_second_round_goes_on_from_the_first(lab, monkeypatch):
    starts, model = [], lab.model
    monkeypatch.setattr(lab, "model", lambda state=None: starts.append(state) or model(state))
    first = methods.cpsft(lab, SETTING)
    last = methods.cpo(lab, first, Setting(4e-3))
    assert starts[0] is first and starts[1] is not first
    assert all(any(not torch.equal(a[k], b[k]) for k in a) for a, b in ((first, starts[1]), (starts[1], last)))


def test_ric_trains_on_rated_answers_of_its_own(lab, monkeypatch):
    seen = trained(monkeypatch)
    methods.ric(lab, methods.cpsft(lab, SETTING), Setting(5e-3))
    ((config, records),) = seen
    assert config["stage"] == "cpsft" and config["training"]["schedule"] == "constant"
    data = {(record.prompt, r.text) for record in lab.records for r in record.responses}
    questions = {q.prompt: q for q in lab.asked}
    own = [record for record in records if (record.prompt, record.responses[0].text) not in data]
    assert own and len(records) - len(own) <= len(own)  # half as many old ones; a few of its own stand in the data
    for record in records:
        (response,) = record.responses
        assert response.ratings == lab.world.rate(questions[record.prompt], response.text)


def test_only_answers_on_the_front_are_kept():
    answers = [dict(zip(NAMES, levels, strict=True)) for levels in ((1, 5, 1), (2, 4, 1), (1, 4, 1), (5, 1, 0))]
    assert on_front([Response("", ratings) for ratings in answers], OBJECTIVES) == [True, True, False, True]


def test_finished_models_are_kept(lab, monkeypatch):
    first = methods.cpsft(lab, SETTING)
    monkeypatch.setattr(lab_module, "train", None)
    assert all(torch.equal(tensor, first[key]) for key, tensor in methods.cpsft(lab, SETTING).items())


# ------------------------------------------------------------------------------------------------------- measurements


def test_as_many_weights_as_requests():
    assert len(WEIGHTS) == len(set(WEIGHTS)) == len(REQUESTS) == 10
    assert all(sum(w) == pytest.approx(1) and min(w) >= 0 for w in WEIGHTS)


def test_share_of_box():
    """Ratings 1..5, 1..5, 0..1: the best of everything is the whole box, the lowest of anything adds nothing."""
    assert share_of_box([[5, 5, 1]], OBJECTIVES) == 1 and share_of_box([[5, 1, 1], [5, 5, 0]], OBJECTIVES) == 0
    assert share_of_box([[3, 5, 1], [5, 3, 0.5]], OBJECTIVES) == pytest.approx((2 * 4 + 2 * 2 * 0.5) / 16)


def test_single_objective_dpo_is_chosen_by_its_best_scores():
    """A start that refuses everything has hypervolume and no helpful model: it would be no baseline for best scores."""
    best = {"helpfulness": 5.0, "honesty": 3.0, "harmlessness": 1.0}
    row = {"method": "dpo_single", "hypervolume": 0.1, "best": best}
    assert (
        claims.worth(row, OBJECTIVES) == pytest.approx((1 + 0.5 + 1) / 3)
        and claims.worth(row | {"method": "soup"}, OBJECTIVES) == 0.1
    )


def test_scores_are_means_of_the_worlds_ratings(lab, monkeypatch):
    answers = [lab.world.answer(q, 2, 0, random.Random(0)) for q in lab.questions]
    monkeypatch.setattr(claims, "greedy_answers", lambda *_, **__: answers)
    point = claims.Point("", methods.cpsft(lab, SETTING))
    rows = measure(lab, [point])
    ratings = [lab.world.rate(q, text) for q, text in zip(lab.questions, answers, strict=True)]
    helpful, honest = (sum(r[name] for r in ratings) / len(ratings) for name in NAMES[:2])
    harmful = [r["harmlessness"] for q, r in zip(lab.questions, ratings, strict=True) if q.harmful]
    assert 0 < len(harmful) < len(ratings)
    scores = [helpful, honest, sum(harmful) / len(harmful)]
    assert rows["points"][0]["scores"] == scores
    assert rows["points"][0]["well_formed"] == sum(map(lab.world.well_formed, answers)) / len(answers)
    assert rows["best"] == dict(zip(NAMES, scores, strict=True)) and rows["hypervolume"] == share_of_box(
        [scores], OBJECTIVES
    )
    assert "correlation" not in rows and "correlation" in measure(lab, [point._replace(request={})])


def test_interval():
    mean, half = claims_report.interval([1, 2, 3, 4, 5])
    assert (mean, half) == (3, pytest.approx(2.776 * (2.5 / 5) ** 0.5))
    assert claims_report.interval([1.0]) == (1.0, math.inf) and claims_report.text([1.0]) == "1.00 (one seed)"
    with pytest.raises(ValueError, match="1 to 10 values, got 11"):
        claims_report.interval([1.0] * 11)


# ----------------------------------------------------------------------------------------------------------- the run


def test_a_killed_run_goes_on_to_the_same_results(tmp_path, monkeypatch):
    settings = {"sft": [Setting(1e-3)], "cpsft": [Setting(1e-3), Setting(2e-3)], "modpo": [Setting(1e-3, 0.2, "all")]}
    monkeypatch.setattr(claims, "METHODS", {m: METHODS[m] for m in settings})

    class Study(WorldLab):
        requests, weights = REQUESTS[:2], WEIGHTS[:3]

    Study.settings = settings

    def results(folder):
        run = Run(folder, Study, TINY)
        lines, found = list(run.work([0, 1], list(settings))), run.results()
        for row in (row for rows in found["methods"].values() for row in rows):
            row["seconds"] = row["cost"]["supervised"]["seconds"] = row["cost"]["further"]["seconds"] = None
        return len(lines), found

    count, whole = results(tmp_path / "run")
    assert count == 2 + 2 * 3 and all(len(rows) == 2 for rows in whole["methods"].values())
    best = max(whole["search"]["tried"], key=lambda row: row["worth"])
    assert whole["search"]["chosen"]["cpsft"] == best["setting"]

    rows = tmp_path / "run" / "seed-1.jsonl"  # killed in the middle of a line, and of a model
    first, second, _ = rows.read_text().splitlines(keepends=True)
    rows.write_text(first + second[: len(second) // 2])
    (tmp_path / "run" / "models-1" / f"cpsft-{Setting(*best['setting'])}.safetensors").unlink()
    assert results(tmp_path / "run") == (2, whole)
    assert results(tmp_path / "run") == (0, whole)
    with pytest.raises(ValueError, match="another plan"):
        Run(tmp_path / "run", Study, Budget())

    elsewhere = Run(tmp_path / "elsewhere", Study, TINY)  # another machine: the file of results is enough
    elsewhere.take(whole)
    assert not list(elsewhere.work([0, 1], list(settings)))
    taken = elsewhere.results()
    assert taken["methods"] == whole["methods"] and taken["search"]["chosen"] == whole["search"]["chosen"]
    with pytest.raises(ValueError, match="another plan: give another --out"):
        Run(tmp_path / "third", Study, Budget()).take(whole)


def test_a_part_of_a_run_is_written_and_gone_on_from(tmp_path, monkeypatch, capsys):
    """--minutes and --methods: what is measured so far is in the file, and is not measured again."""
    monkeypatch.setattr(claims, "STUDIES", {"world": (WorldLab, lambda: TINY, "claims", 2)})
    monkeypatch.setattr(WorldLab, "settings", dict.fromkeys(METHODS, [SETTING._replace(start="all")]))
    out = tmp_path / "out.json"
    options = ["--out", str(out), "--methods", "sft", "cpsft"]
    claims.main(["--run", str(tmp_path / "run"), "--minutes", "1e-9", *options])
    count = {m: len(rows) for m, rows in json.loads(out.read_text())["methods"].items()}
    assert count["sft"] == 1 and not count["cpsft"]
    claims.main(["--run", str(tmp_path / "elsewhere"), *options])
    lines = capsys.readouterr().out.splitlines()
    measured = [line.rsplit(":", 1)[0] for line in lines if line.startswith("seed")]
    assert len(measured) == 4 and sum(line.startswith("seed 0 sft") for line in measured) == 1
    claims.main(["--run", str(tmp_path / "third"), "--fresh", "--seeds", "1", *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:-1]] == [["seed", "1", "sft"], ["seed", "1", "cpsft"]]


def made_up(seed: int = 0) -> dict:
    """A results file with random figures."""
    rng = random.Random(seed)

    def row(method, number):
        points = [
            {"label": str(i), "scores": [rng.uniform(1, 5), rng.uniform(1, 5), rng.random()], "well_formed": 0.9}
            for i in range(10)
        ]
        made = {"points": points, "hypervolume": rng.random(), "best": dict.fromkeys(NAMES, rng.random())}
        spent = {"models": 1, "steps": 10, "tokens": 1e6, "seconds": 60.0}
        made |= {"seed": number, "cost": {"supervised": spent, "further": spent} if number else None}
        asked = method.startswith("cp") or method == "ric"
        return made | ({"correlation": dict.fromkeys(NAMES, 0.95)} if asked else {})

    return {
        "plan": {"budget": vars(TINY)},
        "search": {"seed": 100, "tried": [], "chosen": {"cpo": [1e-4, 0.3, ""]}},
        "versions": {"torch": "0", "transformers": "0"},
        "methods": {method: [row(method, number) for number in range(5)] for method in METHODS},
    }


def test_targets_say_what_is_missed():
    content = made_up()
    for rows in content["methods"].values():
        for i, row in enumerate(rows):
            row["hypervolume"], row["best"] = 0.5 + 0.01 * i, dict.fromkeys(NAMES, 3.0 + 0.1 * i)
    for i, row in enumerate([*content["methods"]["cpo_soup"], *content["methods"]["cpo_modpo"]]):
        row["hypervolume"] = 0.9 + 0.01 * (i % 5)
    for i, row in enumerate(content["methods"]["cpo"]):
        row["hypervolume"] = 0.6 + 0.01 * i + 0.001 * (-1) ** i
        row["best"] = {"helpfulness": 3.0 + 0.1 * i, "honesty": 2.0 + 0.1 * i, "harmlessness": 4.0}
        row["correlation"] = {"helpfulness": 0.95, "honesty": 0.8, "harmlessness": 1.0}
    lines = claims_report.targets(content).splitlines()
    assert ["missed" in line for line in lines] == [False, False, False, True, False, False, True, False]
    for row in content["methods"]["soup"]:
        row["hypervolume"] += 0.2
    lines = claims_report.targets(content).splitlines()
    assert "equal steps for each model: missed against Rewarded Soups" in lines[0]
    assert lines[1] == "- Hypervolume above every baseline's, equal steps in total: met."


def test_methods_that_are_not_measured_yet_are_left_out():
    """Of the seeds that both have a difference is made; a method without results is in no table."""
    content = made_up()
    content["methods"]["modpo"], content["methods"]["soup"] = [], content["methods"]["soup"][3:4]
    tables = claims_report.sections(content)
    assert not any("| MODPO |" in text for text in tables.values()) and "(one seed)" in tables["claims"]
    difference = content["methods"]["cpo"][3]["hypervolume"] - content["methods"]["soup"][0]["hypervolume"]
    assert f"**CPO** minus Rewarded Soups | {difference:+.3f} (one seed)" in tables["claims paired"]


def test_a_lead_within_its_interval_is_not_clear():
    gaps = {"soup": (-0.1, -0.2), "ric": (0.1, -0.1), "sft": (0.1, 0.05)}
    verdict = claims_report.volume_target(gaps, "equal steps")
    assert verdict.endswith(": missed against Rewarded Soups; not clear of zero against Rewards-in-Context style.")
    assert claims_report.volume_target({"sft": (0.1, 0.05)}, "equal steps").endswith(": met.")
    partly = claims_report.volume_target({"sft": (0.1, 0.05)}, "equal steps in total", ["sft", "modpo"])
    assert partly.endswith(": met; not measured against MODPO.")


def test_check_notices_an_edited_table(tmp_path, monkeypatch, capsys):
    for path in (plot.ROOT / "README.md", *(plot.ROOT / "docs").glob("*.md")):
        copy = tmp_path / path.relative_to(plot.ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    monkeypatch.setattr(plot, "CLAIMS", tmp_path / "claims.json")
    plot.CLAIMS.write_text(json.dumps(made_up()))
    for path, text in plot.texts().items():
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["plot", "--check"])
    assert plot.main() == 0
    page = tmp_path / "docs" / "results.md"
    row = next(line for line in page.read_text().splitlines() if line.startswith("| **CPO**"))
    figure = row.split(" | ")[2]
    page.write_text(page.read_text().replace(row, row.replace(figure, f"9{figure[1:]}")))
    assert plot.main() == 1 and "results.md differs" in capsys.readouterr().err


def test_figure_shows_every_method():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = claims_report.figure(made_up())
    names = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert sorted(names) == sorted(row[0] for row in claims_report.METHODS.values())
    matplotlib.pyplot.close(figure)
