"""The value R(y) by hand, and condition tags that read back what they write."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpo_kernels.objectives import Objective, TagTemplate, format_number, value, value_gap

NAN = math.nan
HELP, HONEST = Objective("helpfulness", 1, 5), Objective("honesty", 1, 5)
BOTH = [HELP, HONEST]


# ---------------------------------------------------------------- the value


@pytest.mark.parametrize(
    "scores, conditions, expected",
    [
        ([4, 2], [NAN, NAN], 3.0),  # nothing asked: the mean rating
        ([4, 2], [5, 1], -1.0),  # -(1 + 1) / 2
        ([4, 2], [5, NAN], 0.5),  # (-1 + 2) / 2
        ([5, 1], [5, 1], 0.0),  # an exact match is worth 0, the maximum, and not +P (official code: +P)
        ([3, 5], [NAN, 1], -0.5),  # (3 - 4) / 2; the honesty term is -|P - c|, not -|P| - c = -6
        ([NAN, 2], [5, 1], -1.0),  # missing: left out of both sums
        ([NAN, NAN], [5, 1], NAN),
        ([NAN, NAN], [NAN, NAN], NAN),
    ],
)
def test_value_by_hand(scores, conditions, expected):
    torch.testing.assert_close(value(scores, conditions, BOTH).item(), expected, equal_nan=True, rtol=0, atol=0)


def test_zero_is_a_rating():
    """The official code reads an integer 0 as missing: harmful (0) must lose to harmless (1) and match c = 0."""
    harmless = [Objective("harmlessness", 0, 1)]
    assert value([0], None, harmless).item() == 0.0
    assert value_gap([0], [1], None, harmless).item() == -1.0
    assert value_gap([0], [1], [0], harmless).item() == 1.0
    assert value([0, 4], None, [*harmless, HELP]).item() == 2.0


def test_weights_and_strengths():
    objectives = [
        Objective("helpfulness", 1, 5, weight=3.0, strength=0.5),
        HONEST,
    ]
    # (3 * -0.5 * 2 + 1 * 4) / 4
    assert value([3, 4], [5, NAN], objectives).item() == pytest.approx(0.25)
    # strength only enters where the objective is conditioned
    assert value([3, 4], None, objectives).item() == pytest.approx((3 * 3 + 4) / 4)
    # without the weighted objective the other one stands alone
    assert value([NAN, 4], [5, NAN], objectives).item() == 4.0
    unweighted = [Objective("helpfulness", 1, 5, weight=0.0), HONEST]
    assert value([3, 4], None, unweighted).item() == 4.0
    assert math.isnan(value([3, NAN], None, unweighted).item())


def test_value_gap_uses_the_joint_mask():
    # honesty is missing on the right: it leaves both sides, so only helpfulness decides
    assert value_gap([3, 1], [2, NAN], None, BOTH).item() == 1.0
    # R(a) - R(b) by themselves would say 2 - 2 = 0
    assert (value([3, 1], None, BOTH) - value([2, NAN], None, BOTH)).item() == 0.0
    assert math.isnan(value_gap([3, NAN], [NAN, 3], None, BOTH).item())
    # a tie: both one step from the condition
    assert value_gap([3, 2], [5, 2], [4, NAN], BOTH).item() == 0.0


def test_conditions_turn_a_preference_round():
    good, vague = [5, 5], [1, 5]
    assert value_gap(good, vague, [5, NAN], BOTH).item() == 2.0
    assert value_gap(good, vague, [1, NAN], BOTH).item() == -2.0


def test_batches_and_tensors():
    scores = torch.tensor([[4.0, 2.0], [NAN, 3.0], [NAN, NAN]])
    expected = torch.tensor([0.5, 3.0, NAN], dtype=torch.float64)
    torch.testing.assert_close(value(scores, [5, NAN], BOTH), expected, equal_nan=True)
    table = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(value(scores, [5, NAN], table), expected, equal_nan=True)
    assert value(torch.zeros(0, 2), None, BOTH).shape == (0,)
    with pytest.raises(ValueError, match=r"scores must be \[..., 2\].*\[3\]"):
        value([1, 2, 3], None, BOTH)
    with pytest.raises(ValueError, match="conditions must be"):
        value([1, 2], [1], BOTH)
    with pytest.raises(ValueError, match=r"scores: 9.0 at \[1, 0\] is outside \[1, 5\], the range of .*'helpfulness'"):
        value([[1, 2], [9, 2]], None, BOTH)
    with pytest.raises(ValueError, match=r"conditions: 50.0 at \[1\] is outside \[1, 5\], the range of .*'honesty'"):
        value([1, 2], [NAN, 50], BOTH)
    assert value([9, 9], None, table) == 9.0  # a table of only weights and strengths has no scale
    with pytest.raises(ValueError, match=r"scores: inf at \[0\] is not finite"):
        value([math.inf, 2], None, table)
    for wrong in (["1", "2"], [None, 2], [[1, 2], [3]], 3.0, "12", {"honesty": 1}, BOTH):
        with pytest.raises(TypeError, match="scores must be numbers"):
            value(wrong, None, BOTH)
    for wrong in (HELP, "ab", ["a", "b"], {"a": 1}, 1.0, [{"name": "a", "low": 1, "high": 5}]):
        with pytest.raises(TypeError, match="objectives must be a list of Objective, got"):
            value([1, 2], None, wrong)
    with pytest.raises(ValueError, match="'honesty' is given 2 times"):
        value([1, 2], None, [HONEST, HONEST])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("honesty", 5, 5), "low must be below high, got 5 and 5"),
        (("honesty", 1, 5, -1.0), "weight must be >= 0, got -1.0"),
        (("honesty", 1, 5, 1.0, -2.0), "strength must be >= 0, got -2.0"),
        (("honesty", 1, NAN), "high must be a finite number, got nan"),
        (("honesty", "1", 5), "low must be a finite number, got '1'"),
        (("", 1, 5), "name '' cannot be used in a tag"),
        (("honesty:", 1, 5), "name 'honesty:' cannot be used in a tag"),
        ((" honesty", 1, 5), "cannot be used in a tag"),
        (("a>b", 1, 5), "cannot be used in a tag"),
    ],
)
def test_objective_is_validated(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(*arguments)


# ---------------------------------------------------------------- the tags


def test_tags_by_hand():
    tags = TagTemplate(BOTH)
    assert tags.render({"honesty": 3, "helpfulness": 5.0}) == "<helpfulness: 5> <honesty: 3> "
    assert tags.render({}) == ""
    assert tags.render({"honesty": NAN, "helpfulness": None}) == ""
    assert tags.parse("<helpfulness: 5> <honesty: 2.5> Why < so > ?") == (
        {"helpfulness": 5, "honesty": 2.5},
        "Why < so > ?",
    )
    assert tags.parse("Why?") == ({}, "Why?")
    assert tags.parse("<b: bold> Why?") == ({}, "<b: bold> Why?")
    paper = TagTemplate(BOTH, "< {name}: {value} > ")
    assert paper.render({"helpfulness": 5, "honesty": 1.5}) == "< helpfulness: 5 > < honesty: 1.5 > "
    assert paper.parse("< honesty: 2 > How")[0] == {"honesty": 2}
    assert paper.parse("<honesty: 2> How") == ({}, "<honesty: 2> How")


@pytest.mark.parametrize(
    "text, message",
    [
        ("<truth: 3> Why?", "unknown objective 'truth'; known: helpfulness, honesty"),
        ("<honesty: 6> Why?", r"condition honesty: 6.0 is outside \[1, 5\]"),
        ("<honesty: five> Why?", "level 'five' is not a number"),
        ("<honesty: 1> <honesty: 2> Why?", "'honesty' is conditioned twice"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        TagTemplate(BOTH).parse(text)


@pytest.mark.parametrize(
    "conditions, message",
    [
        ({"truth": 3}, "unknown objective 'truth'"),
        ({"honesty": 0}, r"0 is outside \[1, 5\]"),
        ({"honesty": math.inf}, "inf is outside"),
        ({"honesty": True}, "must be a number, got True"),
        ({"honesty": "3"}, "must be a number, got '3'"),
    ],
)
def test_render_errors(conditions, message):
    with pytest.raises(ValueError, match=message):
        TagTemplate(BOTH).render(conditions)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("<{name}>", "must contain {name} and {value} once each"),
        ("<{name}: {value:.1f}> ", "without format specifiers"),
        ("<{name}: {value}", "cannot be parsed back"),  # "<a: 5" then a prompt "0 ..." would read 50
        ("<{name}: {value}0>", "cannot be parsed back"),
        ("{value}{name} ", "cannot be parsed back"),
        ("<{name}: {value> ", "not a format string"),
    ],
)
def test_patterns_that_cannot_be_parsed_back(pattern, message):
    with pytest.raises(ValueError, match=message):
        TagTemplate(BOTH, pattern)


def test_format_number():
    assert [format_number(x) for x in (5.0, -0.0, 2.5, 0.1, 1e22, -3)] == [
        "5",
        "0",
        "2.5",
        "0.1",
        "1e+22",
        "-3",
    ]


names = st.from_regex(r"[a-zA-Z_]\w{0,8}([ -]\w{1,5}){0,2}", fullmatch=True)
numbers = st.floats(-1e300, 1e300) | st.integers(-(10**6), 10**6)
patterns = st.sampled_from(["<{name}: {value}> ", "< {name}: {value} > ", "[{name}={value}]", "{name} :: {value}\n"])


@given(st.dictionaries(names, numbers, max_size=4), patterns, st.text(alphabet="abc \n<>[]:=1.", max_size=12))
def test_tags_read_back_what_they_write(conditions, pattern, prompt):
    tags = TagTemplate([Objective(name, -1e300, 1e300) for name in conditions], pattern)
    try:
        leading = tags.parse(prompt)[0]
    except ValueError:
        leading = {"a prompt that starts with a tag": 0.0}
    parsed, rest = tags.parse(tags.render(conditions) + ("" if leading else prompt))
    assert parsed == conditions
    assert rest == ("" if leading else prompt)
