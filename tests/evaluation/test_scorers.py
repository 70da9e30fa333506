"""Scorers of generated text: Python functions, classifiers, a judge against a stub of an OpenAI-compatible server."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from cpo_kernels.evaluation.llm_judge import Judge, NoScore, parse_scores
from cpo_kernels.evaluation.scorers import ModelScorer, make_scorer
from cpo_kernels.objectives import Objective
from tests.support import tiny

HONESTY, HELPFULNESS = Objective("honesty", 1, 5), Objective("helpfulness", 1, 5)
BOTH = [HONESTY, HELPFULNESS]
BY_LENGTH = "python:tests.evaluation.test_scorers:by_length"


def no_judge(url, objectives):
    raise AssertionError


# ---- Python functions


def by_length(prompts, responses):
    return [[len(p), len(r)] for p, r in zip(prompts, responses, strict=True)]


def test_python_functions_of_modules_and_files(tmp_path, monkeypatch):
    file = tmp_path / "my_scores.py"
    file.write_text("def ones(prompts, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    scorer = make_scorer([BY_LENGTH], BOTH, no_judge)
    assert scorer(["ab", "c"], ["d", "efg"]).tolist() == [[2, 1], [1, 3]]
    parts = ["helpfulness=python:my_scores:ones", f"honesty=python:{file}:ones"]
    assert make_scorer(parts, BOTH, no_judge)(["a"], ["b"]).tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "specs, reason",
    [
        (["python:tests.evaluation.test_scorers:nothing"], "has no function 'nothing'"),
        (["python:no_such_module:f"], "no_such_module"),
        (["python:f"], "module:function"),
        (["python:no/such/file.py:f"], "the file no/such/file.py does not exist"),
        ([f"honesty={BY_LENGTH}"], "exactly one scorer; wrong for helpfulness"),
        ([BY_LENGTH] * 2, "exactly one scorer; wrong for honesty, helpfulness"),
        (
            [f"fun={BY_LENGTH}"],
            "unknown objective 'fun'; known: honesty, helpfulness",
        ),
        (["model:somewhere"], "OBJECTIVE=model:FOLDER"),
        (["http://host"], "write python:module:function"),
    ],
)
def test_specs_say_what_is_wrong(specs, reason):
    with pytest.raises((ValueError, OSError), match=reason):
        make_scorer(specs, BOTH, no_judge)


@pytest.mark.parametrize(
    "scores, reason",
    [
        ([[1.0], [2.0]], r"\[2, 2\]; got \[2, 1\]"),
        ([["a", "b"]] * 2, "must return numbers"),
        ([[0, math.inf]] * 2, "inf"),
    ],
)
def test_what_a_scorer_returns_is_checked(monkeypatch, scores, reason):
    monkeypatch.setattr("tests.evaluation.test_scorers.by_length", lambda prompts, responses: scores)
    with pytest.raises((ValueError, TypeError), match=reason):
        make_scorer([BY_LENGTH], BOTH, no_judge)(["p", "q"], ["r", "s"])


# ---- classifiers and reward models


@pytest.mark.parametrize("labels", [1, 3])
def test_model_scorer_matches_the_model_one_by_one(tmp_path, labels):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    options = {k: v for k, v in tiny.MODEL.items() if k != "model_type"}
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=labels, pad_token_id=None, **options)
    )
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts, responses = ["hi", "a much longer prompt", "x"], ["you", "no", "a long response"]
    found = ModelScorer(str(tmp_path), HONESTY, batch_size=2)(prompts, responses)
    for prompt, response, score in zip(prompts, responses, found.tolist(), strict=True):
        with torch.no_grad():
            logits = model.eval()(**tokenizer(prompt, response, return_tensors="pt")).logits[0].double()
        steps = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
        assert score == pytest.approx((logits[0] if labels == 1 else logits.softmax(-1) @ steps).item(), rel=1e-4)
    assert len({round(score, 3) for score in found.tolist()}) == 3
    cut = ModelScorer(str(tmp_path), HONESTY)
    cut.max_length = 6
    long, short = cut(["abcdefghij", "ghij"], ["xy", "xy"]).tolist()  # what is too long loses its beginning
    assert long == pytest.approx(short)


@pytest.mark.parametrize("padding", [None, "<pad>"])
def test_model_scorer_reads_the_end_token_of_a_chat(tmp_path, padding):
    """A tokenizer without a padding token, and no other to take for one: the end token counts, as in a batch of one."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = padding
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    options = {k: v for k, v in tiny.MODEL.items() if k != "model_type"}
    config = LlamaConfig(vocab_size=len(tokenizer) + 1, num_labels=1, pad_token_id=None, **options)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = ModelScorer(str(tmp_path), HONESTY, batch_size=2)(["hi", "hello"], ["you", "no"])
    for prompt, response, score in zip(["hi", "hello"], ["you", "no"], found.tolist(), strict=True):
        ids = tokenizer(f"{prompt}<eos>{response}<eos>", return_tensors="pt").input_ids
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            expected = model.score(model.model(ids).last_hidden_state)[0, -1, 0].item()
        assert score == pytest.approx(expected, rel=1e-4)


# ---- a judge over HTTP

KEY = "sk-a-secret"


class Stub:
    """Answers with `script` in order, then with its last entry: a status, (status, headers, body), the message of a
    completion, its text, or the bytes of a page."""

    def __init__(self):
        self.script, self.seen = ['{"honesty": 4, "helpfulness": 2}'], []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.seen.append((self.path, dict(self.headers), body))
                step = stub.script.pop(0) if len(stub.script) > 1 else stub.script[0]
                status, headers = step if isinstance(step, int) else 200, {}
                message = dict(step) if isinstance(step, dict) else {"content": step}
                choice = {"message": message, "finish_reason": message.pop("finish_reason", "stop")}
                answer = {"choices": [choice]} if status == 200 else {"error": f"bad key {KEY}"}
                if isinstance(step, tuple):
                    status, headers, answer = step
                data = step if isinstance(step, bytes) else json.dumps(answer, default=str).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if status == 429 and not headers:
                    self.send_header("Retry-After", "7")
                if status == 302:
                    self.send_header("Location", f"{stub.url}/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                stub.seen.append((self.path, dict(self.headers), None))
                self.send_error(404)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stub():
    stub = Stub()
    threading.Thread(target=stub.server.serve_forever, args=(0.02,), daemon=True).start()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that the judge would have slept."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


def judge(stub, **options):
    return Judge(stub.url, "tiny-judge", BOTH, **options)


def test_judge_asks_and_reads(stub, monkeypatch, waits):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = judge(stub)
    assert made(["Who was {response}?"], ["A <b>poet</b> {prompt}"]) == [[4.0, 2.0]] and not waits
    path, headers, body = stub.seen[0]
    text = body["messages"][0]["content"]
    assert path == "/v1/chat/completions" and body["model"] == "tiny-judge" and body["temperature"] == 0
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert "Who was {response}?" in text and "A <b>poet</b> {prompt}" in text  # filled once, not again
    assert "- honesty: from 1 (worst) to 5 (best)" in text and '{"honesty": ..., "helpfulness": ...}' in text


def test_judge_without_a_key_sends_none(stub, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge(stub)(["p"], ["r"])
    assert "Authorization" not in stub.seen[0][1]


def test_judge_waits_and_tries_again(stub, waits):
    stub.script = [429, 503, "no idea", '{"honesty": 1, "helpfulness": 5}']
    made = judge(stub)
    assert made(["p"], ["r"]) == [[1.0, 5.0]]
    assert len(stub.seen) == 4 and 7 <= waits[0] <= 7 * 1.3 and 2 <= waits[1] <= 2.6 and 4 <= waits[2] <= 5.2


def test_judge_gives_up_with_the_reason(stub, tmp_path, monkeypatch, waits):
    stub.script = ["The answer is great!"]
    made = judge(stub, tries=3, cache=tmp_path)
    with pytest.raises(NoScore, match="no JSON object with honesty, helpfulness: 'The answer is great!'"):
        made(["p"], ["r"])
    assert len(waits) == 2 and not list(tmp_path.iterdir())  # what holds no score is not kept
    stub.script = [500]
    with pytest.raises(ConnectionError, match="500"):
        made(["p"], ["r"])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stub.script, before = [401], len(stub.seen)
    with pytest.raises(ConnectionError, match="401") as error:
        made(["p"], ["r"])
    assert len(stub.seen) == before + 1 and KEY not in str(error.value) and "***" in str(error.value)
    unreachable = Judge("http://127.0.0.1:9/v1", "m", BOTH, tries=2)
    with pytest.raises(ConnectionError, match="refused"):
        unreachable(["p"], ["r"])


def test_judge_keeps_replies(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    first = judge(stub, cache=tmp_path / "cache")
    assert first(["p", "q"], ["r", "r"]) == [[4, 2], [4, 2]] and len(stub.seen) == 2
    again = judge(stub, cache=tmp_path / "cache")
    assert again(["q", "p"], ["r", "r"]) == [[4, 2], [4, 2]] and len(stub.seen) == 2
    again(["p"], ["another"])
    other = judge(stub, cache=tmp_path / "cache", options={"temperature": 1})
    other(["p"], ["r"])
    assert len(stub.seen) == 4
    kept = [file.read_text() for file in (tmp_path / "cache").iterdir()]
    assert len(kept) == 4 and not any(KEY in text for text in kept)


def test_the_key_does_not_follow_a_redirection(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stub.script = [302]
    with pytest.raises(ConnectionError):
        judge(stub)(["p"], ["r"])
    assert [path for path, _, _ in stub.seen] == ["/v1/chat/completions", "/v1/elsewhere"]
    assert "Authorization" not in stub.seen[1][1]


@pytest.mark.parametrize(
    "reply, scores",
    [
        ('```json\n{"honesty": 3, "helpfulness": 4.5}\n```', [3, 4.5]),
        ('First {"honesty": 1}. Final: {"honesty": 2, "helpfulness": 3, "why": "x"}', [2, 3]),
        ('{"honesty": null, "helpfulness": 3}', [None, 3]),
        ('{"honesty": 9, "helpfulness": 3}', "honesty is outside"),
        ('{"honesty": "5", "helpfulness": " 3.5 "}', [5, 3.5]),  # a number as text
        ('{"honesty": "4/5", "helpfulness": "3 out of 5"}', [4, 3]),
        ('{"honesty": "8/10", "helpfulness": 3}', "honesty is not a number"),  # of another scale
        ('{"honesty": "high", "helpfulness": 3}', "honesty is not a number"),
        ('{"honesty": "9", "helpfulness": 3}', "honesty is outside"),
        ('{"honesty": Infinity, "helpfulness": 3}', "honesty is outside"),
        ('{"why": "uses {x} and {\\"y\\": 1}", "honesty": 2, "helpfulness": 3} So {that} is it', [2, 3]),
        ('As {f"{x}"} is wrong: {"honesty": 2, "helpfulness": 3}\n\nBut {"honesty": 5, "helpfulness": 5}', [2, 3]),
        ('<think>{"honesty": 5, "helpfulness": 5}? No.</think>{"honesty": 2, "helpfulness": 3}', [2, 3]),
        ('<think>{"honesty": 5, "helpfulness": 5}? Or', "no JSON object"),  # cut off before the answer
        ('[THINK]{"honesty": 5, "helpfulness": 5}[/THINK]{"honesty": 2, "helpfulness": 3}', [2, 3]),
        ('<reasoning>{"honesty": 5, "helpfulness": 5}</reasoning> {"honesty": 2, "helpfulness": 3}', [2, 3]),
        (
            '<|channel|>analysis<|message|>{"honesty": 5, "helpfulness": 5}<|end|><|start|>assistant<|channel|>final'
            '<|message|>{"honesty": 2, "helpfulness": 3}',
            [2, 3],
        ),
        ('{"why": "</think> stands in it", "honesty": 2, "helpfulness": 3}', [2, 3]),
        ('{"scores": {"honesty": 2, "helpfulness": 3}, "why": "x"}', [2, 3]),
        ('[{"honesty": 2, "helpfulness": 3}]', [2, 3]),
        ('{"honesty": {"score": 2, "reason": "x"}, "helpfulness": {"Rating": "3/5"}}', [2, 3]),
        ('{"honesty": {"reason": "x", "points": 2}, "helpfulness": {"helpfulness": 3}}', [2, 3]),
        ('{"honesty": {"a": 2, "b": 3}, "helpfulness": 3}', "honesty is not a number"),
        ('{"honesty": {"confidence": 2}, "helpfulness": 3}', "honesty is not a number"),
        ('{"Honesty": 2, " HELPFULNESS ": 3}', [2, 3]),
        ('{"honesty": [2], "helpfulness": 3}', "honesty is not a number"),
        ("{" * 5000, "no JSON object"),
        ('{"a":' * 100_000, "no JSON object"),
        ('{"honesty": true, "helpfulness": 3}', "honesty is not a number"),
        ('{"honesty": NaN, "helpfulness": 3}', "honesty is outside"),
        ("{broken", "no JSON object"),
        ("", "no JSON object"),
        ("4", "no JSON object"),
    ],
)
def test_replies(reply, scores):
    if isinstance(scores, str):
        with pytest.raises(NoScore, match=scores):
            parse_scores(reply, BOTH)
    else:
        assert [None if math.isnan(score) else score for score in parse_scores(reply, BOTH)] == scores


def test_names_that_differ_only_in_case_are_two():
    assert parse_scores('{"honesty": 5, "Honesty": 1}', [HONESTY, Objective("Honesty", 1, 5)]) == [5, 1]


def test_one_objective_takes_a_bare_number():
    assert parse_scores(" 4 \n", [HONESTY]) == parse_scores("4/5", [HONESTY]) == [4.0]
    with pytest.raises(NoScore, match="no JSON object"):
        parse_scores("4 or 5", [HONESTY])


GOOD = {"content": '{"honesty": 4, "helpfulness": 2}'}


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("no idea", "no JSON object with honesty, helpfulness: 'no idea'"),
        ({"content": None}, "no JSON object"),
        ({"content": ""}, "no JSON object"),
        ({"content": []}, "no JSON object"),
        ({}, "no JSON object"),
        ({"content": None, "refusal": "I will not rate this."}, "I will not rate this"),
        ({"content": '{"honesty": 4, "help', "finish_reason": "length"}, "truncated: give a larger"),
        ((200, {}, {"choices": []}), "no choice"),
        ((400, {}, {"error": {"code": "content_filter", "message": "jailbreak"}}), "400 .*content_filter"),
        ((400, {}, {"error": {"message": "This model's maximum context length is 4096 tokens"}}), "maximum context"),
        ((413, {}, {"error": "too large"}), "413"),
        ((200, {}, {"error": {"code": "content_filter", "message": "jailbreak"}}), "content_filter"),
    ],
)
def test_an_answer_without_a_score_does_not_end_the_evaluation(stub, waits, reply, reason):
    refused = isinstance(reply, tuple) and "error" in reply[2]  # which is not asked for again
    stub.script = [GOOD["content"], *[reply] * (1 if refused else 6), GOOD["content"]]
    made = judge(stub, parallel=1)
    with pytest.warns(UserWarning, match=f"1 of 2 answers have no score from the judge: .*{reason}"):
        first, second = made(["p", "q"], ["r", "r"])
    assert first == [4, 2] and all(map(math.isnan, second)) and len(made.unscored) == 1
    assert made(["p"], ["s"]) and not made.unscored


def test_a_refused_text_is_not_asked_for_again(stub, waits):
    stub.script = [GOOD["content"], (400, {}, {"error": {"code": "content_filter"}}), GOOD["content"]]
    with pytest.warns(UserWarning, match="content_filter"):
        scores = judge(stub, parallel=1)(["p", "q", "r"], ["r"] * 3)
    assert [math.isnan(score[0]) for score in scores] == [False, True, False] and len(stub.seen) == 3 and not waits


def test_a_judge_that_never_scores_ends_early(stub, waits):
    stub.script = ["no idea"]
    made = judge(stub, parallel=1, tries=2)
    with pytest.raises(NoScore, match="no idea"):
        made([str(i) for i in range(50)], ["r"] * 50)
    assert 20 <= len(stub.seen) <= 24  # ten answers, each twice, and what was under way


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": '{"honesty": 4, '}, {"type": "text", "text": '"helpfulness": 2}'}]},
        {"content": '{"honesty": 4, "helpfulness": 2}', "finish_reason": "length", "reasoning_content": "{}"},
        {"content": '```json\n{"honesty": 4, "helpfulness": 2}\n```', "refusal": None},
    ],
)
def test_shapes_of_a_message(stub, waits, message):
    stub.script = [message]
    assert judge(stub)(["p"], ["r"]) == [[4, 2]] and not waits


@pytest.mark.parametrize(
    "error",
    [
        {"code": 429, "message": "slow down"},
        {"code": "503", "message": "overloaded"},
        {"code": "rate_limit_exceeded", "type": "invalid_request_error"},
        {"type": "server_error", "message": "x"},
        "upstream went away",
    ],
)
def test_an_error_of_status_200_is_tried_again_like_its_code(stub, waits, error):
    body = {"error": error}
    stub.script = [(200, {}, body), (200, {}, {"choices": [body]}), GOOD["content"]]
    assert judge(stub)(["p"], ["r"]) == [[4, 2]] and len(waits) == 2


@pytest.mark.parametrize("error", [{"code": 401}, {"code": "invalid_api_key"}, {"type": "invalid_request_error"}])
def test_an_error_of_status_200_ends_like_its_code(stub, waits, error):
    stub.script = [(200, {}, {"error": error})]
    with pytest.raises(ConnectionError, match="40[01]"):
        judge(stub)(["p"], ["r"])
    assert len(stub.seen) == 1 and not waits


def test_a_page_that_is_no_completion(stub, waits):
    """A wrong address ends at once; where completions came before, it is a proxy that is out of breath."""
    stub.script = [b"<html>Welcome</html>"]
    with pytest.raises(ConnectionError, match="not a chat completion: b'<html>Welcome"):
        judge(stub)(["p"], ["r"])
    assert not waits
    stub.script = [GOOD["content"], b"<html>Bad gateway</html>", GOOD["content"]]
    assert judge(stub, parallel=1)(["p", "q"], ["r", "r"]) == [[4, 2], [4, 2]] and len(waits) == 1


def test_how_long_a_rate_limit_waits(stub, waits, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_000_000_000.0)
    date = "Sun, 09 Sep 2001 01:47:10 GMT"  # 30 seconds later
    for given in ("120", date, "soon", "-5", "1e9"):
        stub.script = [(429, {"Retry-After": given}, {"error": "slow down"}), GOOD["content"]]
        judge(stub)(["p"], [given])
    for wait, told in zip(waits, (120, 30, 1, 0, 600), strict=True):
        assert told <= wait <= 1.3 * told


@pytest.mark.parametrize(
    "page",
    [
        (503, {"Transfer-Encoding": "chunked"}, {"error": "busy"}),  # the body is none
        (200, {}, {"error": {"code": "1302", "message": "busy"}}),  # a number of the server's own
        (200, {}, {"error": {"code": 0, "message": "busy"}}),
    ],
)
def test_an_error_that_is_odd_is_tried_again(stub, waits, page):
    stub.script = [page, GOOD["content"]]
    assert judge(stub)(["p"], ["r"]) == [[4, 2]] and len(waits) == 1


def test_a_page_of_open_brackets_is_no_completion(stub):
    stub.script = [b"[" * 100_000]
    with pytest.raises(ConnectionError, match="not a chat completion"):
        judge(stub)(["p"], ["r"])


def test_a_key_from_a_file_and_one_that_no_header_takes(stub, monkeypatch):
    """No message shows it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    judge(stub)(["p"], ["r"])
    assert stub.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    for wrong in (f"{KEY}\nsecond", f"{KEY}\u2192"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(ValueError, match="OPENAI_API_KEY contains characters") as caught:
            judge(stub)(["p"], ["r"])
        assert KEY not in str(caught.value)


def test_half_a_character_in_a_reply_is_kept(stub, tmp_path):
    stub.script = ['\ud800 {"honesty": 4, "helpfulness": 2}']
    for _ in range(2):
        assert judge(stub, cache=tmp_path)(["p"], ["r"]) == [[4, 2]]
    assert len(stub.seen) == 1


def test_a_refused_option_names_the_flag(stub):
    stub.script = [(400, {}, {"error": {"message": "'temperature' does not support 0 with this model"}})]
    with pytest.raises(ConnectionError, match="--judge-options '{}' omits it"):
        judge(stub)(["p"], ["r"])
    with pytest.raises(ConnectionError, match="""--judge-options '{"seed": 1}' omits it"""):
        judge(stub, options={"temperature": 0, "seed": 1})(["p"], ["r"])


def test_a_broken_file_of_the_cache_is_asked_for_again(stub, tmp_path):
    made = judge(stub, cache=tmp_path)
    made(["p"], ["r"])
    (file,) = tmp_path.iterdir()
    for broken in ('{"message": "p', "[]", '{"reply": "no idea"}'):
        file.write_text(broken)
        assert made(["p"], ["r"]) == [[4, 2]]
    assert len(stub.seen) == 4 and json.loads(file.read_text())["reply"] == GOOD["content"]


def test_judge_refuses_what_cannot_work(stub):
    with pytest.raises(ValueError, match="http://localhost:8000/v1"):
        Judge("localhost", "m", BOTH)
    with pytest.raises(ValueError, match="judge URL 'http://localhost:port/v1': Port could not be cast"):
        Judge("http://localhost:port/v1", "m", BOTH)
    for url in ("http://a..b/v1", "http://local host/v1", "http://localhost/\u00e9", "http://\u2603.org/v1"):
        with pytest.raises(ValueError, match="judge URL"):
            Judge(url, "m", BOTH)
    with pytest.raises(ValueError, match="at least 1, got 0 and 6"):
        judge(stub, parallel=0)
    with pytest.raises(ValueError, match="{response} is missing"):
        judge(stub, template="rate {prompt}")
