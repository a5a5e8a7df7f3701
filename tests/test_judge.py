"""Verdicts: how they are read, asked for, kept, and summed up, against a server of our own."""
import base64
import json
import logging
import re
import signal
import sys
import time
import traceback
import urllib.parse
from itertools import product
from pathlib import Path

import pytest

from chat_server import ChatServer, refusal, text_of
from eval import chat_model, judge
from eval.chat_model import ChatModel
from eval.judge import (Job, judge_all, make_jobs, prompt_name, read_prompts, summary, table, values_of,
                        verdict_of)

KEY = "sk-very'secret\\key+1"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
NAMES = ["single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn", "pair-v2",
         "pair-v2-multi-turn", "pair-math-v1", "pair-math-v1-multi-turn"]


@pytest.fixture
def serve(monkeypatch):
    """say -> a server that the environment names."""
    servers = []

    def start(say) -> ChatServer:
        servers.append(ChatServer(say))
        monkeypatch.setenv("OPENAI_BASE_URL", servers[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return servers[-1]

    monkeypatch.setattr(chat_model, "RETRIES", 2)
    yield start
    for server in servers:
        server.close()


def question(**more: object) -> dict:
    return {"id": 1, "turns": ["What is red?", "And blue?"], "category": "stem", "correct": [], **more}


def grade_jobs(count: int) -> list[Job]:
    one = {"turns": ["What?"], "category": "x", "correct": []}
    return [job for n in range(count) for job in make_jobs({"id": n, **one}, [f"answer {n}"], None,
                                                           read_prompts(None))]


def ask(jobs: list[Job], file: Path, name: str = "gpt", workers: int = 4) -> tuple[dict, dict]:
    return judge_all(ChatModel(name), jobs, str(file), workers)


@pytest.mark.parametrize("reply, pair, verdict", [
    ("A is right.\n\n[[A]]", True, "A"), ("My verdict: [[B]]\n \n", True, "B"), ("[[C]]", True, "C"),
    ("[[A]] said it\n[[B]]", True, "B"), ("[[A]] or [[B]]", True, None), ("[[D]]", True, None),
    ("[[A]]\nI hope that helps.", True, None), ("[A]", True, None), ("A", True, None), ("", True, None),
    ("[[7]]", True, None), ("Rating: [[7]]", False, 7.0), ("[[ 7 ]]", False, None), ("[[7.5]].", False, 7.5),
    ("[[10]]", False, 10.0), ("[[11]]", False, None), ("[[0]]", False, None), ("[[-3]]", False, None),
    ("[[1, 2]]", False, None), ("[[A]]", False, None), ("[[nan]]", False, None), ("Rating: 7", False, None)])
def test_a_verdict_stands_once_in_the_last_line(reply, pair, verdict):
    assert verdict_of(reply, pair) == verdict


@pytest.mark.parametrize("checked", [False, True])
def test_prompts_show_all_that_is_judged_and_both_orders_are_swapped(checked):
    asked = question(correct=["first solution", "second solution"] if checked else [])
    mine, theirs, prompts = ["plum one", "plum two"], ["pear one", "pear two"], read_prompts(None)
    grades = make_jobs(asked, mine, None, prompts)
    pairs = make_jobs(asked, mine, theirs, prompts)
    assert [(job.turn, job.order) for job in grades + pairs] == [
        (1, ""), (2, ""), (1, "model"), (1, "reference"), (2, "model"), (2, "reference")]
    assert [job.system for job in grades + pairs[::2]] == [
        prompts[name]["system_prompt"] for name in NAMES if ("math" in name) == checked]
    for job in grades + pairs:
        second, text = job.turn == 2, job.system + job.user
        assert "What is red?" in text and ("And blue?" in text) == second
        assert ("first solution" in text) == checked and ("second solution" in text) == (checked and second)
        assert "plum one" in text and ("plum two" in text) == second
        pair = job.order != ""
        assert ("pear one" in text) == pair and ("pear two" in text) == (second and pair)
        assert ("[[A]]" in text) == pair
    for first, other in zip(pairs[::2], pairs[1::2]):
        assert first.user != other.user and first.system == other.system
        assert first.user.replace("plum", "*").replace("pear", "plum").replace("*", "pear") == other.user
        assert " of A >>>\nplum one" in first.user and " of B >>>\npear one" in first.user


def test_prompts_of_a_file_take_the_place_of_ours(tmp_path):
    file = tmp_path / "judge_prompts.jsonl"
    texts = ["Q {question} A {answer} {{}}", "Q {question_1} A {answer_1}"] * 2
    texts += ["Q {question} A {answer_a} B {answer_b}", "Q {question_1} A {answer_a_1} B {answer_b_1}"] * 2
    lines = [{"name": name, "type": "x", "system_prompt": f"system {name}", "prompt_template": text}
             for name, text in zip(NAMES, texts)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs = make_jobs(question(), ["m1", "m2"], None, read_prompts(str(file)))
    jobs += make_jobs(question(), ["m1", "m2"], ["r1", "r2"], read_prompts(str(file)))
    assert [(job.system, job.user) for job in jobs] == [
        ("system single-v1", "Q What is red? A m1 {}"),
        ("system single-v1-multi-turn", "Q What is red? A m1"),
        ("system pair-v2", "Q What is red? A m1 B r1"), ("system pair-v2", "Q What is red? A r1 B m1"),
        ("system pair-v2-multi-turn", "Q What is red? A m1 B r1"),
        ("system pair-v2-multi-turn", "Q What is red? A r1 B m1")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(ValueError, match="has no prompt called single-v1$"):
        read_prompts(str(file))
    lines[0]["prompt_template"] = "{color}"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="single-v1 has a placeholder that cannot be filled: .*'color'"):
        read_prompts(str(file))


def test_fastchats_names_of_the_prompts():
    assert [prompt_name(*kind) for kind in product((False, True), repeat=3)] == NAMES


def test_requests_are_as_the_address_wants_them_and_verdicts_are_kept(serve, tmp_path):
    server = serve(lambda payload, before: f"Fine.\n[[{4 + int('answer 2' in text_of(payload))}]]")
    verdicts, refused = ask(grade_jobs(3), tmp_path / "v")
    assert [verdicts[job] for job in grade_jobs(3)] == [4.0, 4.0, 5.0] and not refused
    path, headers, payload = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert payload["model"] == "gpt" and payload["temperature"] == 0
    assert [message["role"] for message in payload["messages"]] == ["system", "user"]
    lines = [json.loads(line) for line in (tmp_path / "v").read_text().splitlines()]
    assert {(line["judge"], line["question"], line["turn"], line["order"], line["verdict"])
            for line in lines} == {("gpt", n, 1, "", 4.0 + (n == 2)) for n in range(3)}
    assert KEY not in "".join(file.read_text() for file in tmp_path.iterdir())


def test_nothing_is_asked_twice_but_of_another_judge_or_with_another_prompt(serve, tmp_path):
    server = serve(lambda payload, before: "[[3]]")
    for jobs, name, requests in ((grade_jobs(3), "a", 3), (grade_jobs(3), "a", 3), (grade_jobs(4), "a", 4),
                                 (grade_jobs(3), "b", 7), (grade_jobs(4), "a", 7)):
        verdicts, _ = ask(jobs, tmp_path / "v", name)
        assert len(server.requests) == requests and len(verdicts) == len(jobs)
    changed = [Job(**{**vars(job), "system": "Be strict."}) for job in grade_jobs(3)]
    ask(changed, tmp_path / "v", "a")
    assert len(server.requests) == 10


def test_equal_answers_are_asked_for_once_and_are_a_tie(serve, tmp_path):
    server = serve(lambda payload, before: "[[A]]")
    jobs = make_jobs(question(), ["same", "same too"], ["same", "same too"], read_prompts(None))
    verdicts, _ = ask(jobs, tmp_path / "v")
    assert len(server.requests) == 2 and len(verdicts) == 4
    assert list(values_of(verdicts, pairs=True).values()) == [50.0, 50.0]


@pytest.mark.parametrize("model_first, reference_first, expected", [
    ("A", "B", 100), ("B", "A", 0), ("A", "A", 50), ("B", "B", 50), ("C", "C", 50), ("A", "C", 50),
    ("C", "A", 50), ("C", "B", 50), ("B", "C", 50)])
def test_a_pair_is_won_in_both_orders_or_not_at_all(serve, tmp_path, model_first, reference_first, expected):
    asked = question(turns=["What?"])

    def say(payload: dict, before: int) -> str:
        text = text_of(payload)
        return f"[[{model_first if text.index('mine') < text.index('theirs') else reference_first}]]"

    serve(say)
    verdicts, _ = ask(make_jobs(asked, ["mine"], ["theirs"], read_prompts(None)), tmp_path / "v")
    assert values_of(verdicts, pairs=True) == {("stem", 1, 1): expected}


def test_a_reply_without_a_verdict_is_kept_and_never_guessed(serve, tmp_path):
    server = serve(lambda payload, before: "[[6]]" if "answer 0" in text_of(payload)
                   else "I would say 7 of 10.")
    verdicts, refused = ask(grade_jobs(2), tmp_path / "v")
    assert list(verdicts.values()) == [6.0, None] and not refused and len(server.requests) == 2
    assert summary(values_of(verdicts, False), "score")["score"] == 6.0
    assert ask(grade_jobs(2), tmp_path / "v")[0] == verdicts and len(server.requests) == 2
    assert "I would say 7" in (tmp_path / "v").read_text()
    pair = make_jobs(question(turns=["What?"]), ["mine"], ["theirs"], read_prompts(None))
    assert values_of({pair[0]: "A", pair[1]: None}, pairs=True) == {}


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_what_is_refused_for_the_moment_is_tried_again(serve, tmp_path, status):
    server = serve(lambda payload, before: refusal(status, "later") if before < 2 else "[[9]]")
    verdicts, refused = ask(grade_jobs(1), tmp_path / "v")
    assert list(verdicts.values()) == [9.0] and not refused and len(server.requests) == 3


def test_a_server_that_is_closed_for_the_day_is_not_waited_for(serve, tmp_path):
    server = serve(lambda payload, before: (503, {"Retry-After": "86400"}, ""))
    assert "HTTP 503" in ask(grade_jobs(1), tmp_path / "v")[1][grade_jobs(1)[0]] and len(server.requests) == 1


NO_REPLIES = ["", "{", "[]", '{"choices": []}', '{"choices": [{"message": 3}]}', "[" * 10**5, "<html>"]


@pytest.mark.parametrize("body", NO_REPLIES)
def test_a_body_that_is_no_reply_is_named_and_requested_by_the_next_run(serve, tmp_path, body):
    server = serve(lambda payload, before: (200, {}, body))
    verdicts, refused = ask(grade_jobs(1), tmp_path / "v")
    assert not verdicts and len(server.requests) == 1
    assert "not a chat completion of at most 4,194,304 bytes" in list(refused.values())[0]
    server.say = lambda payload, before: "[[2]]"
    assert list(ask(grade_jobs(1), tmp_path / "v")[0].values()) == [2.0]


def test_text_that_is_not_unicode_can_be_kept(serve, tmp_path):
    serve(lambda payload, before: "half \ud83d\n[[2]]")
    assert list(ask(grade_jobs(1), tmp_path / "v")[0].values()) == [2.0]
    assert "half ?" in (tmp_path / "v").read_text()


def trickle(head: bytes):
    yield head
    for _ in range(200):    # longer than the test waits
        time.sleep(0.05)
        yield b" "


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX-Slow:", HEAD, HEAD.replace(b"200 OK", b"400 No")])
def test_a_server_that_trickles_does_not_hold_the_run(serve, tmp_path, monkeypatch, head):
    monkeypatch.setattr(chat_model, "TOTAL_SECONDS", 0.3)
    serve(lambda payload, before: trickle(head))
    start = time.monotonic()
    _, refused = ask(grade_jobs(1), tmp_path / "v")
    assert time.monotonic() - start < 3
    reason = "HTTP 400: " if b"400" in head else "no complete reply within 0.3 seconds"
    assert list(refused.values())[0].startswith(reason)


def test_a_server_that_says_nothing_is_given_up(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_model, "READ_SECONDS", 0.1)
    monkeypatch.setattr(chat_model, "RETRIES", 0)

    def silence(head: bytes):
        yield head
        time.sleep(0.5)

    for head in (b"", HEAD):
        serve(lambda payload, before: silence(head))
        _, refused = ask(grade_jobs(1), tmp_path / "v")
        assert list(refused.values()) == ["no reply from the server (ReadTimeout); check OPENAI_BASE_URL"]


@pytest.mark.parametrize("status", [b"200 OK", b"400 No", b"500 No", b"307 No"])
def test_a_server_that_sends_without_end_does_not_fill_the_memory(serve, tmp_path, monkeypatch, status):
    monkeypatch.setattr(chat_model, "MAX_REPLY_BYTES", 10**5)
    monkeypatch.setattr(chat_model, "RETRIES", 0)
    sent = []

    def flood():
        yield HEAD.replace(b"200 OK", status).replace(b"\r\n\r\n", b"\r\nLocation: /\r\n\r\n")
        while len(sent) < 2000:
            sent.append(1)
            yield b"x" * 2**16

    serve(lambda payload, before: flood())
    reason = ("the server's reply is not a chat completion of at most 100,000 bytes" if b"200" in status
              else f"HTTP {status[:3].decode()}: ")
    assert list(ask(grade_jobs(1), tmp_path / "v")[1].values())[0].startswith(reason)
    assert len(sent) < 500      # the rest are the buffers of the sockets


def test_what_fails_for_good_is_named_and_asked_for_by_the_next_run_alone(serve, tmp_path):
    broken = True
    server = serve(lambda payload, before: refusal(503, "down") if broken and "answer 1" in text_of(payload)
                   else refusal(400, "too long") if broken and re.search("answer [35]", text_of(payload))
                   else "[[5]]")
    verdicts, refused = ask(grade_jobs(8), tmp_path / "v", workers=1)
    assert {str(job): why for job, why in refused.items()} == {
        "question 1, turn 1": "HTTP 503: the server reports an error",
        "question 3, turn 1": f"HTTP 400: {chat_model.STATUSES[400]}",
        "question 5, turn 1": f"HTTP 400: {chat_model.STATUSES[400]}"}
    # Three failures, which do not stop the run, because they are not in a row.
    assert len(verdicts) == 5 and len(server.requests) == 5 + 3 + 2
    broken, server.requests[:] = False, []
    verdicts, refused = ask(grade_jobs(8), tmp_path / "v")
    assert len(verdicts) == 8 and not refused and len(server.requests) == 3


def test_fewer_failures_in_a_row_than_there_are_workers_do_not_stop_the_run(serve, tmp_path):
    def say(payload: dict, before: int) -> str | tuple:
        if re.search("answer [0-3]$", text_of(payload)):
            return refusal(400, "too long")
        time.sleep(0.1)     # all four failures come first
        return "[[5]]"

    serve(say)
    verdicts, refused = ask(grade_jobs(12), tmp_path / "v", workers=5)
    assert (len(verdicts), len(refused)) == (8, 4)


@pytest.mark.parametrize("status, names", [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"),
                                           (404, "OPENAI_BASE_URL, .* and the model's name")])
def test_a_wrong_key_address_or_model_stops_the_run_and_is_named(serve, tmp_path, status, names):
    server = serve(lambda payload, before: "[[5]]" if re.search("answer [01]$", text_of(payload))
                   else refusal(status, ""))
    verdicts, refused = ask(grade_jobs(40), tmp_path / "v", workers=1)
    reasons = list(refused.values())
    assert re.match(f"HTTP {status}: .*check {names}", reasons[0]) and len(set(reasons)) == 1
    assert len(verdicts) == 2 and len(refused) == 3 and len(server.requests) == 5
    assert len((tmp_path / "v").read_text().splitlines()) == 2      # what was paid for is kept


def echo(status: int):
    """A response with the key, as it is and encoded, in its status line, its headers and its body."""
    def say(payload: dict, before: int):
        forms = [KEY, repr(KEY), json.dumps(KEY), urllib.parse.quote(KEY),
                 base64.b64encode(KEY.encode()).decode(), KEY.encode().hex(), KEY[::-1], KEY[:9]]
        text = " ".join(forms)
        body = json.dumps({"error": {"message": text, "code": text, "type": text}, "detail": text})
        yield (f"HTTP/1.1 {status} {text}\r\nX-Echo: {text}\r\nX-Request-Id: {text}\r\nRetry-After-Ms: 1\r\n"
               f"Location: http://{KEY}\r\nContent-Type: application/json\r\n\r\n{body}").encode()
    return say


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 404, 407, 422, 429, 500, 599, "no number"])
def test_the_key_is_in_no_message_whatever_the_server_echoes(serve, tmp_path, capfd, caplog, recwarn, status):
    serve(echo(status))
    caplog.set_level(logging.DEBUG)
    verdicts, refused = ask(grade_jobs(1), tmp_path / "v")
    said = [*refused.values(), *capfd.readouterr(), caplog.text, *(str(w.message) for w in recwarn)]
    assert not verdicts and len(refused) == 1
    encoded = base64.b64encode(KEY.encode()).decode(), KEY.encode().hex()
    for piece in ("very", "secret", "yrev", *(text[:8] for text in encoded)):
        assert not any(piece in text for text in said)


@pytest.mark.parametrize("address", ["http://me:PASSWORD@localhost/v1", "http://PASSWORD@localhost/v1",
                                     "http://localhost/v1?api_key=PASSWORD", "http://localhost/v1#PASSWORD",
                                     "http://localhost:PASSWORD/v1", "http:/me:PASSWORD@localhost",
                                     "http://me:PASS/WORD@localhost", "http://[PASSWORD]/v1", "PASSWORD"])
def test_an_address_with_a_secret_is_refused_without_quoting_it(monkeypatch, address):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="OPENAI_BASE_URL: must be an address such as") as caught:
        ChatModel("gpt")
    assert "PASS" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["foo://me:PASSWORD@localhost", "http://me:PASSWORD/x@localhost"])
def test_a_wrong_proxy_is_one_line_without_its_password(monkeypatch, proxy):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost/v1")
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ValueError, match="--judge gpt: cannot set up a connection") as caught:
        ChatModel("gpt")
    assert "PASSWORD" not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_is_not_there_is_given_up_soon(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_model, "RETRIES", 0)
    serve(lambda payload, before: "").close()
    verdicts, refused = ask(grade_jobs(40), tmp_path / "v", workers=2)
    assert not verdicts and 3 <= len(refused) <= 4
    assert refused[grade_jobs(1)[0]] == "no reply from the server (ConnectError); check OPENAI_BASE_URL"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_key_is_not_sent_to_another_address(serve, tmp_path, status):
    other = serve(lambda payload, before: "[[5]]")
    serve(lambda payload, before: (status, {"Location": f"{other.url}/chat/completions"}, ""))
    _, refused = ask(grade_jobs(1), tmp_path / "v")
    assert list(refused.values()) == [f"HTTP {status}: {chat_model.STATUSES[status]}"] and not other.requests


def test_an_interruption_loses_no_verdict_that_was_given(serve, tmp_path, monkeypatch):
    server = serve(lambda payload, before: "[[5]]")

    def interrupted(items, total, unit):
        for number, item in enumerate(items):
            if number == 5:
                signal.raise_signal(signal.SIGINT)
            yield item

    monkeypatch.setattr(judge, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(grade_jobs(30), tmp_path / "v", workers=2)
    lines = len((tmp_path / "v").read_text().splitlines())
    assert 5 <= lines <= 7      # as many requests as there are workers were under way
    server.requests.clear()
    monkeypatch.undo()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert len(ask(grade_jobs(30), tmp_path / "v")[0]) == 30 and len(server.requests) == 30 - lines


def test_without_an_address_or_with_a_wrong_key(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="--judge gpt: set OPENAI_API_KEY"):
        ChatModel("gpt")
    for key in (KEY + "\n", "a" + KEY + " b", KEY + "…"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="OPENAI_API_KEY: holds") as caught:
            ChatModel("gpt")
        assert "secret" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="openai is not installed.*requirements-eval.txt"):
        ChatModel("gpt")


def test_summary_by_hand():
    values = {("math", 7, 1): 2.0, ("math", 7, 2): 6.0, ("math", 8, 1): 4.0, ("stem", 9, 1): 8.0}
    got = summary(values, "score")
    # three questions are three draws; the turns of the first stand by each other
    error = ((((2 - 5) + (6 - 5)) ** 2 + (4 - 5) ** 2 + (8 - 5) ** 2) * 3 / 2) ** 0.5 / 4
    assert got.pop("score_standard_error") == pytest.approx(error)
    assert got == {"score": 5.0, "score_count": 4, "score_by_category": {"math": 4.0, "stem": 8.0},
                   "score_by_turn": {"turn 1": pytest.approx(14 / 3), "turn 2": 6.0}}
    one = summary({("koala", 1, 1): 100.0, ("koala", 2, 1): 50.0}, "win_rate")
    assert one == {"win_rate": 75.0, "win_rate_standard_error": 25.0, "win_rate_count": 2,
                   "win_rate_by_category": {"koala": 75.0}, "win_rate_by_turn": {"turn 1": 75.0}}
    assert summary({}, "score")["score"] is None
    named = table(summary({("all", 1, 1): 1.0, ("math", 2, 1): 9.0}, "score"), "score").splitlines()
    assert [line.split() for line in named[:-1]] == [["all", "1.00"], ["math", "9.00"], ["turn", "1", "5.00"],
                                                     ["all", "5.00"]]


def test_one_question_says_nothing_of_the_error():
    one = summary({("stem", 9, 1): 8.0}, "score")
    assert one["score"] == 8.0 and one["score_standard_error"] is None
    assert table(one, "score").endswith("\nstandard error of the mean unknown, 1 judged")
