"""Records, field maps, condition samplers, batches."""

import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch

from cpo_kernels.data.conditions import prepare
from cpo_kernels.data.packing import ROWS, collate, encode, epoch_steps, fill_rows, microbatches, one_row
from cpo_kernels.data.records import DataError, Record, Response, write_records
from cpo_kernels.data.sources import load_records, overall_objective, split_by_prompt
from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.objectives import Objective, value
from cpo_kernels.recipe.config import read_config
from cpo_kernels.training.attention import dense_mask
from tests.support import tiny

OBJECTIVES = [Objective("honesty", 1, 5), Objective("helpfulness", 1, 5)]
# the published schema of the TruthfulQA ratings; questions and answers written here
RATED = [
    {"question": "Do geese forget?", "answer": "I have no comment.", "truthful": 1.0, "informative": 0.0},
    {"question": "Can soup fly?", "answer": "", "truthful": 1.0, "informative": 0.0},
    {"question": "Do geese forget?", "answer": "Yes, at once.", "truthful": 0.0, "informative": 1.0},
    {"question": "Do geese forget?", "answer": "They remember routes.", "truthful": 0.5, "informative": 1.0},
]
RATED_FIELDS = {
    "prompt": "question",
    "response": "answer",
    "ratings": {
        "honesty": {"field": "truthful", "threshold": 0.5, "above": 5, "below": 1},
        "helpfulness": {"field": "informative", "threshold": 0.5, "above": 5, "below": 1},
    },
}


def data(**keys):
    return read_config({"data": keys}).data


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def conditions(**keys):
    return read_config({"conditions": keys}).conditions


# -------------------------------------------------------------------- files


def test_rated_answers_are_grouped_by_question_and_mapped(tmp_path):
    path = write(tmp_path / "rated.jsonl", RATED)
    first, second = load_records([path], data(layout="answers", fields=RATED_FIELDS), OBJECTIVES, {})
    assert first.prompt == "Do geese forget?" and second.responses[0].text == ""
    assert [r.ratings for r in first.responses] == [
        {"honesty": 5, "helpfulness": 1},
        {"honesty": 1, "helpfulness": 5},
        {"honesty": 5, "helpfulness": 5},
    ]


def test_records_written_are_read_back(tmp_path):
    records = [Record("p", (Response("a\né", {"honesty": 2.5}), Response("b"))), Record("q", (Response("c"),))]
    write_records(records, tmp_path / "r.jsonl")
    assert load_records([tmp_path / "r.jsonl"], data(), OBJECTIVES, {}) == records


def test_nested_fields_and_value_maps(tmp_path):
    ratings = [{"honesty": {"Rating": "4"}}, {"honesty": {"Rating": "N/A"}}]
    row = {"instruction": "p", "completions": [{"response": "x", "annotations": a} for a in ratings]}
    table = {str(n): n for n in range(1, 6)} | {"N/A": None}
    fields = {
        "prompt": "instruction",
        "responses": "completions",
        "response": "response",
        "ratings": {"honesty": {"field": "annotations.honesty.Rating", "map": table}},
    }
    (record,) = load_records([write(tmp_path / "u.jsonl", [row])], data(fields=fields), OBJECTIVES, {})
    assert [r.ratings for r in record.responses] == [{"honesty": 4.0}, {}]


def test_pairs_with_and_without_scores(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 7.5, "score_rejected": 3},
        {"prompt": "p", "chosen": "c", "rejected": "d"},
    ]
    records = load_records([write(tmp_path / "p.jsonl", rows)], data(layout="pairs"), [], {})
    assert [[r.ratings["overall"] for r in record.responses] for record in records] == [[7.5, 3], [1, 0]]
    assert overall_objective(records) == Objective("overall", 0, 7.5)
    draws = prepare("dpo", records, [overall_objective(records)], conditions(), 0)
    assert [g.pairs for (g,) in draws.units] == [((0, 1),), ((0, 1),)]  # a row is compared within itself
    rows[0]["score_chosen"] = 1
    with pytest.raises(DataError, match=r"p.jsonl:1: score_chosen 1.0 is below score_rejected 3.0"):
        load_records([write(tmp_path / "p.jsonl", rows)], data(layout="pairs"), [], {})
    kept = load_records([tmp_path / "p.jsonl"], data(layout="pairs", fields={"score_chosen": None}), [], {})
    assert kept[0].responses[0].ratings == {"overall": 1.0}
    nested = [{"prompt": "p", "chosen": "a", "rejected": "b", "m": {"s": 7.5, "t": 3}}]
    fields = {"score_chosen": "m.s", "score_rejected": "m.t"}
    (record,) = load_records([write(tmp_path / "n.jsonl", nested)], data(layout="pairs", fields=fields), [], {})
    assert [r.ratings["overall"] for r in record.responses] == [7.5, 3]


BROKEN = {
    '{"question": "Q", ': "Expecting property name",
    '["no", "object"]': "expected a JSON object, got list",
    '{"qestion": "Q", "answer": "A", "truthful": 1, "informative": 1}': "did you mean 'qestion'",
    '{"question": " ", "answer": "A", "truthful": 1, "informative": 1}': "'question' is empty",
    '{"question": "Q", "answer": 3, "truthful": 1, "informative": 1}': "'answer' must be a string, got 3",
    '{"question": "Q", "answer": "A", "truthful": "yes", "informative": 1}': "'yes' is not a number",
    '{"question": "Q", "answer": "A", "truthful": true, "informative": 1}': "True is not a number",
}


@pytest.mark.parametrize("line", BROKEN)
def test_broken_line_gives_file_line_and_reason_or_is_counted(tmp_path, line):
    path = write(tmp_path / "rated.jsonl", [RATED[0], "", line, RATED[1]])
    settings = {"layout": "answers", "fields": RATED_FIELDS}
    with pytest.raises(DataError) as caught:
        load_records([path], data(**settings), OBJECTIVES, {})
    assert str(caught.value).startswith(f"{path}:3: ") and BROKEN[line] in str(caught.value)
    report = {}
    records = load_records([path], data(on_bad_line="skip", **settings), OBJECTIVES, report)
    assert len(records) == 2 and report == {"bad_lines": 1, "bad_line_reasons": [str(caught.value)]}


def test_broken_encoding_and_ratings_off_the_scale(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"r.jsonl:1: 'utf-8' codec"):
        load_records([path], data(), OBJECTIVES, {})
    write(path, [{"prompt": "p", "responses": [{"text": "a", "ratings": {"honesty": 6}}]}])
    with pytest.raises(DataError, match=r"r.jsonl:1: rating 6 of honesty is outside \[1, 5\]"):
        load_records([path], data(), OBJECTIVES, {})
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        load_records([tmp_path / "missing.jsonl"], data(), OBJECTIVES, {})


@pytest.mark.parametrize(
    "ratings, reason",
    [({"humour": "h"}, "'humour' is not an objective"), ({"honesty": {"field": "h"}}, "write a field")],
)
def test_bad_field_map(tmp_path, ratings, reason):
    with pytest.raises(ValueError, match=reason):
        load_records([write(tmp_path / "r", RATED)], data(fields={"ratings": ratings}), OBJECTIVES, {})


def test_split_is_by_prompt_and_does_not_depend_on_order():
    records = [Record(f"p{i % 40}", (Response(str(i)),)) for i in range(120)]
    train, held_out = split_by_prompt(records, 0.1, 3)
    prompts = {r.prompt for r in held_out}
    assert len(prompts) == 4 and len(held_out) == 12 and not prompts & {r.prompt for r in train}
    assert {r.prompt for r in split_by_prompt(records[::-1], 0.1, 3)[1]} == prompts
    assert {r.prompt for r in split_by_prompt(records, 0.1, 4)[1]} != prompts
    assert split_by_prompt(records, 0, 3) == (records, [])
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.5"):
        split_by_prompt(records, 1.5, 3)


# -------------------------------------------------------------------- conditions


def draw(stage, records=None, seed=0, objectives=OBJECTIVES, **keys):
    return prepare(stage, records or tiny.records(40), objectives, conditions(**{"strip_best": 0, **keys}), seed)


def classes(draws):
    return Counter(tuple(u[0].responses[0].ratings.values()) for u in draws.units)


def test_cpsft_shows_every_response_once_under_its_own_ratings():
    records = tiny.records(10)
    draws = draw("cpsft", records)
    shown = Counter((u[0].prompt, u[0].responses[0].text) for u in draws.units)
    assert shown == Counter((record.prompt, r.text) for record in records for r in record.responses)
    assert all(u[0].tags == u[0].condition == u[0].responses[0].ratings for u in draws.units)


def test_balance_and_class_weights():
    records = [Record(f"p{i}", tuple(tiny.records(1)[0].responses[: 1 + i % 6])) for i in range(60)]
    even = classes(draw("cpsft", records, balance=True))
    assert len(even) == 6 and max(even.values()) - min(even.values()) <= 1
    weights = [{"honesty": 1, "weight": 0.1}]
    uneven = classes(draw("cpsft", records, balance=True, class_weights=weights))
    total = sum(uneven.values())
    for ratings, count in uneven.items():
        assert abs(count / total - (0.1 if ratings[0] == 1 else 1) / 4.2) < 1 / total


def test_weights_of_zero_draw_nothing():
    """An entry that may draw only classes of weight 0 draws nothing; the other entry draws its share."""
    mixture = [{"sampler": "attained", "levels": {"honesty": 1}}, {"sampler": "attained"}]
    draws = draw("cpsft", balance=True, class_weights=[{"honesty": 1, "weight": 0}], mixture=mixture)
    assert len(draws.units) == 120 and {honesty for honesty, _ in classes(draws)} == {3, 5}
    with pytest.raises(ValueError, match="stage cpsft: nothing to train on"):
        draw("cpsft", balance=True, class_weights=[{"weight": 0}])


def test_shares_of_a_mixture():
    mixture = [
        {"sampler": "attained", "share": 0.5},
        {"sampler": "none", "share": 0.3},
        {"sampler": "grid", "share": 0.2, "objectives": ["helpfulness"]},
    ]
    for stage in ("cdpo", "cpsft"):
        keys = {"per_prompt": 1} if stage == "cdpo" else {}
        units = draw(stage, tiny.records(1000), mixture=mixture, **keys).units
        named = Counter(tuple(u[0].condition) for u in units)
        for names, share in ((("honesty", "helpfulness"), 0.5), ((), 0.3), (("helpfulness",), 0.2)):
            assert abs(named[names] / len(units) - share) < 5 * math.sqrt(share * (1 - share) / len(units))


def test_samplers_draw_what_they_say():
    records = tiny.records(200)

    def found(sampler, **keys):
        return Counter(
            tuple(u[0].condition.values())
            for u in draw("cdpo", records, mixture=[{"sampler": sampler, **keys}], responses=3).units
        )

    assert set(found("best")) == {(5, 5)} and set(found("none")) == {()}
    grid = found("grid")
    assert set(grid) == {(h, u) for h in (1, 3, 5) for u in (1, 5)} and min(grid.values()) > 200 / 6 / 2
    assert set(found("grid", values={"honesty": [2, 4], "helpfulness": [3]})) == {(2, 3), (4, 3)}
    for (group,) in draw("cdpo", records, responses=3).units:
        assert group.condition in [r.ratings for r in group.responses]  # attained


def test_cpsft_takes_the_response_that_fits_the_sampler():
    records = tiny.records(30)
    for sampler in ("best", "none"):
        draws = draw("cpsft", records, mixture=[{"sampler": sampler}])
        assert set(classes(draws)) == {(5, 5)} and len(draws.units) == 180
        assert {len(u[0].tags) for u in draws.units} == {2 if sampler == "best" else 0}


def test_no_tag_means_best_on_everything():
    groups = [u[0] for u in draw("cpsft", tiny.records(600), strip_best=0.5).units]
    best = [g for g in groups if g.condition == {"honesty": 5, "helpfulness": 5}]
    assert all(g.tags == g.condition for g in groups if g not in best)
    share = sum(not g.tags for g in best) / len(best)
    assert len(best) == 600 and abs(share - 0.5) < 5 * 0.5 / math.sqrt(600)
    partial = draw("cpsft", mixture=[{"sampler": "best", "objectives": ["honesty"]}], strip_best=1)
    assert all(u[0].tags == {"honesty": 5} for u in partial.units)  # best on one objective is not on everything


def test_seed_decides_everything():
    for stage in ("cpsft", "cdpo", "dpo"):
        keys = {"responses": 3, "per_prompt": 2, "strip_best": 0.5, "draws": 2}
        assert draw(stage, seed=5, **keys) == draw(stage, seed=5, **keys)
        assert draw(stage, seed=5, **keys) != draw(stage, seed=6, **keys)


def test_conditions_of_one_prompt_share_its_responses_and_differ():
    draws = draw("cdpo", per_prompt=3, responses=4, draws=2)
    assert len(draws.units) == 80
    for unit in draws.units:
        assert len({tuple(g.condition.items()) for g in unit}) == len(unit) == 3
        assert all(g.responses == unit[0].responses for g in unit) and len(unit[0].responses) == 4


def test_pairs_are_the_non_ties_under_the_condition():
    objectives = [Objective("honesty", 1, 5, weight=2.0, strength=0.5), Objective("helpfulness", 1, 5)]
    draws = draw("cdpo", objectives=objectives, per_prompt=4)
    ties = 0
    for group in (g for unit in draws.units for g in unit):
        c = list(group.condition.values())
        worth = [float(value(list(r.ratings.values()), c, objectives)) for r in group.responses]
        pairs = [(i, j) for i in range(6) for j in range(i + 1, 6) if abs(worth[i] - worth[j]) > 1e-6]
        assert list(group.pairs) == pairs
        ties += 15 - len(pairs)
    assert draws.counts["ties"] == ties > 0
    few = draw("cdpo", pairs=2)
    assert all(len(g.pairs) == 2 for (g,) in few.units) and len({g.pairs for (g,) in few.units}) > 5


def test_few_responses_spread_over_the_classes():
    same = [Response(f"n{i}", {"honesty": 5, "helpfulness": 1}) for i in range(20)]
    other = Response("y", {"honesty": 1, "helpfulness": 5})
    records = [Record(f"p{i}", (*same, other)) for i in range(200)]
    assert all(other in g.responses for (g,) in draw("cdpo", records, responses=3).units)
    rare = [{"honesty": 1, "weight": 0.1}]
    counts = draw("cdpo", records, responses=2, class_weights=rare).counts  # without the rare one there is no pair
    assert counts["groups"] + counts["groups_without_pairs"] == 200
    assert 0.03 < counts["groups"] / 200 < 0.3  # a tenth of up to two turns


def test_baselines_have_no_tags():
    sft = draw("sft")
    assert all(u[0].responses[0].ratings == {"honesty": 5, "helpfulness": 5} and not u[0].tags for u in sft.units)
    assert len(sft.units) == 40 and len(draw("sft", sft_responses="all").units) == 240
    for (group,) in draw("dpo").units:
        assert not group.tags and not group.condition and len(group.pairs) == 14  # (1, 5) ties with (5, 1)


def test_missing_ratings_stay_missing():
    responses = (Response("a", {"honesty": 5.0}), Response("b", {"helpfulness": 1.0}), Response("c"))
    record = Record("p", responses)
    assert classes(draw("cpsft", [record])) == {(5.0,): 1, (1.0,): 1}
    with pytest.raises(ValueError, match="nothing to train on in 1 records.*'ties': 3"):
        draw("cdpo", [record])  # no objective is rated on both sides


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"mixture": [{"sampler": "random"}]}, "'random' is not one of attained"),
        ({"mixture": [{"objectives": ["humour"]}]}, "'humour' is not an objective"),
        ({"mixture": [{"share": 0}]}, "at least one share must be above 0"),
        ({"class_weights": [{"honesty": 1}]}, "class_weights"),
        ({"per_prompt": 0}, r"per_prompt: 0 is not in \[1, inf\)"),
        ({"responses": 1}, r"responses: 1 is not in \[2, inf\)"),
        ({"strip_best": 2}, r"strip_best: 2.0 is not in \[0, 1\]"),
    ],
)
def test_bad_conditions(keys, reason):
    with pytest.raises(ValueError, match=reason):
        draw("cdpo", **keys)


# -------------------------------------------------------------------- tokens and batches


def template(**keys):
    config = read_config({"template": keys}).template
    return PromptTemplate(tiny.tokenizer(), config, OBJECTIVES)


def test_template_is_what_the_tokens_say():
    made = template(prompt="{tags}Q: {prompt}\nA:", answer_prefix=" ", tags="< {name}: {value} > ")
    text = "< honesty: 5 > < helpfulness: 1 > Q: why {x}?\nA:"
    assert made.text("why {x}?", {"helpfulness": 1, "honesty": 5}) == text
    assert made.tokenizer.decode(made.prompt_ids("why {x}?", {"honesty": 5, "helpfulness": 1})) == text
    _, (ids,), _ = made.encode("why {x}?", None, [Response("so")])
    assert made.tokenizer.decode(ids) == " so<eos>"
    with pytest.raises(ValueError, match="tags.*and.*prompt.*once each, got 'Q:'"):
        template(prompt="Q:")
    with pytest.raises(ValueError, match="chat template; this one has none"):
        template(prompt="chat")


def test_chat_template_puts_tags_before_the_question():
    made = tiny.tokenizer()
    made.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    config = read_config({"template": {"prompt": "chat", "system": "Be kind."}}).template
    text = PromptTemplate(made, config, OBJECTIVES).text("why?", {"honesty": 2})
    assert text == "[system] Be kind.\n[user] <honesty: 2> why?\n[assistant] "


def units(stage="cdpo", limits=(512, 1024), **keys):
    draws = draw(stage, tiny.records(15), **keys)
    return encode(draws, template(), OBJECTIVES, *limits), draws


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("row_tokens", [256, None])
def test_batch_points_at_the_position_before_each_label(kind, row_tokens):
    groups = [g for unit in units(per_prompt=2, responses=3)[0][:4] for g in unit]
    batch = collate(groups, kind, row_tokens)
    tokens = sum(sum(g.rows(kind)) for g in groups)
    rows = batch.input_ids.shape[0]
    if kind == "padded":
        assert rows == 24
    else:
        assert rows == 1 if row_tokens is None else tokens // row_tokens <= rows <= 2 * (tokens // row_tokens)
    flat, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    sequence = 0
    for group in groups:
        for response in group.responses:
            start, end = batch.cu_seqlens[sequence : sequence + 2].tolist()
            assert batch.labels[start:end].tolist() == list(response)
            before = [group.prompt[-1], *response[:-1]]
            assert flat[batch.rows[start:end]].tolist() == before
            P = len(group.prompt)
            assert positions[batch.rows[start:end]].tolist() == list(range(P - 1, P - 1 + len(response)))
            sequence += 1
    first, second = batch.pairs.unbind(1)
    assert bool((first // 3 == second // 3).all()) and len(batch.pairs) == sum(len(g.pairs) for g in groups)
    assert torch.equal(batch.scores[0], torch.tensor(groups[0].scores[0], dtype=torch.float64))
    assert batch.conditions.shape == (len(batch.pairs), 2)
    real = batch.input_ids.count_nonzero()  # the token 0 is only padding here
    assert real == batch.tokens == tokens == sum(map(sum, batch.segments))
    if kind == "padded":
        assert batch.tree is batch.branch is None
        return
    assert torch.equal(batch.tree >= 0, batch.input_ids != 0)
    if row_tokens is None:
        assert batch.input_ids.shape == (1, tokens)  # no padding at all
    lengths = [n for g in groups for n in g.rows(kind)]
    for number, (row, start) in enumerate(fill_rows(lengths, row_tokens) if row_tokens else one_row(lengths)):
        mask = dense_mask(batch.tree, batch.branch)[row, 0]
        g = groups[number if kind == "shared" else number // 3]
        P, n = len(g.prompt), len(g.responses[0 if kind == "shared" else number % 3]) - 1
        at = start + P + (n if kind == "shared" else 0)  # the first input of a response: the second one, if shared
        expected = torch.zeros_like(mask[at])
        expected[start : start + P] = expected[at] = True
        assert torch.equal(mask[at], expected) and not mask.triu(1).any()


def test_microbatches_keep_groups_whole_and_the_budget():
    groups = [g for unit in units(per_prompt=3)[0] for g in unit]
    for kind in ROWS:
        for budget in (1, 500, 2000):
            parts = list(microbatches(groups, budget, kind))
            assert Counter(id(g) for part in parts for g in part) == Counter(map(id, groups))
            size = max(sum(g.rows(kind)) for g in groups)
            slack = 0 if kind == "padded" else size
            for part in parts:
                batch = collate(part, kind)
                cost = batch.input_ids.numel() if kind == "padded" else batch.tokens
                assert len(part) == 1 or cost <= budget + slack
                assert batch.tokens > 0.8 * batch.input_ids.numel() or kind == "padded"
    assert len(list(microbatches(groups, 10**9, "shared"))) == 1


def test_rows_are_filled_evenly():
    lengths = [37, 90, 12, 55, 300, 41, 128, 60, 33, 200, 80]
    places = fill_rows(lengths, 256)
    used = [
        sorted((start, start + n) for (r, start), n in zip(places, lengths, strict=True) if r == row)
        for row in range(3)
    ]
    assert [spans[0][0] for spans in used] == [0, 0, 0]
    for spans in used:  # end to end
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    assert max(spans[-1][1] for spans in used) < 1.1 * sum(lengths) / 3
    assert fill_rows([5], 256) == [(0, 0)]
    # eight of almost a row each: seven rows would be half padding
    assert sorted(fill_rows([255] * 8, 256)) == [(row, 0) for row in range(8)]
    rng = random.Random(0)
    for _ in range(50):  # spans never overlap, and padding stays below a tenth where a row holds several
        many = [rng.randint(5, 90) for _ in range(rng.randint(20, 60))]
        ends = [0] * len(many)
        for n, (row, start) in sorted(zip(many, fill_rows(many, 256), strict=True), key=lambda item: item[1]):
            assert start == ends[row]
            ends[row] = start + n
        used = [end for end in ends if end]
        assert sum(many) > 0.9 * len(used) * max(used)


def test_epoch_is_a_shuffled_partition_by_units():
    made = units(per_prompt=2)[0]
    steps = epoch_steps(made, 4, 2, seed=1)
    assert [len(step) for step in sorted(steps, key=len)] == [6, 8, 8, 8]
    assert Counter(g.prompt for step in steps for g in step) == Counter(g.prompt for unit in made for g in unit)
    assert steps == epoch_steps(made, 4, 2, seed=1) != epoch_steps(made, 4, 2, seed=2)
    for unit in made:  # the conditions of a prompt stay together
        assert sum(any(g is member for g in step) for step in steps for member in unit[:1]) == 1


def test_long_prompts_are_left_out_and_long_responses_cut():
    length = len(template().prompt_ids("say ad", {"honesty": 5, "helpfulness": 5}))
    made, draws = units("cpsft", limits=(length, length + 4))
    assert draws.counts["cut_responses"] > 0 == draws.counts["long_prompts"]
    assert max(len(g.responses[0]) for (g,) in made) == 4
    with pytest.raises(ValueError, match="max_prompt_tokens 3"):
        units("cpsft", limits=(3, 100))
    longer = [Record("say " + "x" * 100, tiny.records(1)[0].responses), *tiny.records(3)]
    draws = draw("cpsft", longer)
    assert len(encode(draws, template(), OBJECTIVES, 60, 100)) == 18 and draws.counts["long_prompts"] == 6
