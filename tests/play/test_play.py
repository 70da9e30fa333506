"""The local page: its HTTP endpoints in-process, and the page itself in headless Chromium where there is one."""

import http.client
import json
import threading
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.generate import greedy_answers
from cpo_kernels.objectives import Objective
from cpo_kernels.play import server as play
from cpo_kernels.recipe.keys import TemplateConfig
from tests.support import tiny
from tests.support.browser import PROGRAM, browser
from tests.support.tiny import one_thread  # noqa: F401

OBJECTIVES = [Objective("honesty", 1, 5), Objective("warmth", 0, 0.5)]


@pytest.fixture(scope="module")
def player():
    tokenizer = tiny.tokenizer()
    torch.manual_seed(1)
    options = {name: value for name, value in tiny.MODEL.items() if name != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **options))
    for parameter in model.parameters():  # far from uniform, so that tags matter
        parameter.data.mul_(4)
    return play.Player("a <b>model</b>", model.eval(), PromptTemplate(tokenizer, TemplateConfig(), OBJECTIVES), 12)


@pytest.fixture
def port(player):
    server = play.make_server(player)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def send(port, method, path, body=None, **headers):
    """(status, headers, JSON or text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    kind = answer.getheader("Content-Type")
    return answer.status, answer.headers, json.loads(text) if kind == "application/json" else text


def test_about_and_page(port):
    status, headers, about = send(port, "GET", "/about")
    assert status == 200 and about["max_new_tokens"] == 12 and about["name"] == "a <b>model</b>"
    assert about["objectives"][0] == {"name": "honesty", "low": 1, "high": 5, "step": 1}
    assert about["objectives"][1]["step"] == 0.025
    status, headers, page = send(port, "GET", "/")
    assert status == 200 and "<script>" in page and "default-src 'none'" in headers["Content-Security-Policy"]
    assert send(port, "GET", "/../secret")[0] == 404 and send(port, "POST", "/about", {})[0] == 404


def test_generate_is_the_greedy_answer_under_the_tags(port, player):
    answers = []
    for condition in ({"honesty": 5}, {"honesty": 1, "warmth": 0.25}, {}):
        status, _, found = send(port, "POST", "/generate", {"prompt": "say ab", "condition": condition})
        (expected,) = greedy_answers(player.model, player.template, [("say ab", condition)], 12)
        assert status == 200 and found["answer"] == expected and found["seconds"] > 0
        assert found["read"] == player.template.text("say ab", condition)
        answers.append(expected)
    assert len(set(answers)) == 3
    short = send(port, "POST", "/generate", {"prompt": "say ab", "condition": {}, "max_new_tokens": 2})[2]
    assert len(short["answer"]) <= 2 < len(answers[2])


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"prompt": " "}, "write a prompt"),
        ({"prompt": 3}, "write a prompt"),
        ([], "JSON object"),
        (b"{broken", "Expecting"),
        ({"prompt": "a", "condition": {"honesty": "5"}}, "object of numbers"),
        ({"prompt": "a", "condition": {"honesty": 9}}, r"9 is outside [1, 5]"),
        ({"prompt": "a", "condition": {"fun": 1}}, "unknown objective 'fun'"),
        ({"prompt": "a", "max_new_tokens": 13}, "from 1 to 12, got 13"),
        ({"prompt": "a", "page": "x" * 101}, "short text"),
        ({"prompt": "a" * 300}, "takes 256"),
    ],
)
def test_bad_requests_say_why(port, body, reason):
    status, _, answer = send(port, "POST", "/generate", body)
    assert status == 400 and reason in answer["error"]


def test_only_this_machine_and_this_page_are_served(port):
    own = f"127.0.0.1:{port}"
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example:80", f"127.0.0.1.evil.example:{port}"):
        for method, path in (("GET", "/"), ("GET", "/about"), ("POST", "/generate")):
            status, _, answer = send(port, method, path, {"prompt": "a"}, Host=host)
            assert status == 403 and host in answer["error"]
    for origin in ("http://evil.example", f"https://{own}", "http://127.0.0.1:1", "null"):
        assert send(port, "POST", "/generate", {"prompt": "a"}, Origin=origin)[0] == 403
    assert send(port, "POST", "/generate", {"prompt": "a"}, Origin=f"http://{own}")[0] == 200
    assert send(port, "GET", "/about", Host="localhost:9000")[0] == 200  # a forwarded port


def test_requests_of_other_kinds_and_sizes_are_refused(port):
    plain = {"Content-Type": "text/plain"}  # what a foreign page can send without asking
    assert send(port, "POST", "/generate", {"prompt": "a"}, **plain)[0] == 415
    assert send(port, "POST", "/generate", b"x" * (play.LARGEST + 1))[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/generate")
    connection.putheader("Content-Type", "application/json")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()


def test_stop_ends_generation(player):
    (whole,) = greedy_answers(player.model, player.template, [("say ab", {})], 12)
    calls = iter([False, False, True])
    (part,) = greedy_answers(player.model, player.template, [("say ab", {})], 12, stop=lambda: next(calls))
    assert whole.startswith(part) and len(part) <= 3 < len(whole)


def test_the_newest_request_of_a_page_wins(port, monkeypatch):
    started = threading.Event()

    def slow(model, template, requests, tokens, stop):
        started.set()
        while requests[0][0] == "slow" and not stop():
            time.sleep(0.01)
        return [requests[0][0]]

    monkeypatch.setattr(play, "greedy_answers", slow)
    results = {}

    def ask(name, prompt, page):
        results[name] = send(port, "POST", "/generate", {"prompt": prompt, "page": page})

    first = threading.Thread(target=ask, args=("first", "slow", "one"))
    first.start()
    assert started.wait(10)
    other = threading.Thread(target=ask, args=("other", "quick", "two"))  # another page waits for its turn
    other.start()
    time.sleep(0.1)
    assert first.is_alive() and other.is_alive()
    ask("second", "quick", "one")
    first.join(10), other.join(10)
    assert [results[name][0] for name in ("first", "other", "second")] == [409, 200, 200]


def test_command(tmp_path, monkeypatch, capsys):
    from cpo_kernels.cli import main
    from cpo_kernels.training.loop import train

    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = tiny.config("cpsft", run_dir=str(tmp_path / "run"), training={"max_steps": 1})
    config["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    train(config, records=tiny.records())
    served = []
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", lambda server: served.append(server))
    assert main(["play", str(tmp_path / "run"), "--port", "0"]) == 0
    assert main(["play", str(tmp_path / "run/model"), "--port", "0", "--objective", "honesty:1:5"]) == 0
    assert len(served) == 2 and "run: http://127.0.0.1:" in capsys.readouterr().out
    assert main(["play", str(tmp_path)]) == 2 and "is neither a run directory" in capsys.readouterr().err


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(port, player):
    def expected(prompt, condition):
        return greedy_answers(player.model, player.template, [(prompt, condition)], 12)[0]

    answer = "document.getElementById('answer').textContent"
    slider = "document.querySelectorAll('input[type=range]')[0]"
    with browser() as page:
        page.look(390)
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.querySelectorAll('.objective').length == 2")
        assert page.run("document.getElementById('name').textContent") == "a <b>model</b>"
        assert page.run("document.querySelectorAll('b').length") == 0
        page.run("document.getElementById('prompt').focus()")
        page.send("Input.insertText", text="say ab")
        page.wait(f"{answer} == {json.dumps(expected('say ab', {'honesty': 5, 'warmth': 0.5}))}")
        # several moves in one go: one request, for the last position
        before = sum("generate" in url for url in page.requests)
        moved = f"{{ {slider}.value = level; {slider}.dispatchEvent(new Event('input')) }}"
        page.run(f"for (const level of [4, 3, 2]) {moved}")
        page.wait(f"{answer} == {json.dumps(expected('say ab', {'honesty': 2, 'warmth': 0.5}))}")
        assert sum("generate" in url for url in page.requests) == before + 1
        page.run("document.querySelectorAll('input[type=checkbox]')[1].click()")  # off: no tag
        page.wait(f"{answer} == {json.dumps(expected('say ab', {'honesty': 2}))}")
        assert page.run("document.getElementById('read').textContent") == "<honesty: 2> say ab"
        assert page.run("document.querySelectorAll('#earlier li').length") == 2
        page.send("Input.insertText", text="x" * 300)  # longer than the model takes
        page.wait("document.getElementById('error').textContent.includes('this model takes 256')")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        foreign = [url for url in page.requests if not url.startswith(f"http://127.0.0.1:{port}/")]
        assert foreign == [] and [e for e in page.errors if "400" not in e.get("text", "")] == []
