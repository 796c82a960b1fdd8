"""The judges: the rule, a reward model, and an endpoint that is slow, busy, broken or odd."""

import json
import re
import shutil
import threading
import time

import pytest
import torch
from transformers import LlamaForSequenceClassification

from scripts.model import load_tokenizer
from scripts.pairs.build import judge_answers
from scripts.pairs.judges import Endpoint, JudgeError, RewardModel, Rule
from scripts.pairs.provenance import read_jsonl


def answer(text: str, tokens: int, style: str = "plain", finished: bool = True) -> dict:
    return {"id": "x", "style": style, "text": text, "tokens": tokens, "finished": finished}


MESSAGES = [{"role": "user", "content": "Capital of France?"}]
PROMPT = {"id": "x", "messages": MESSAGES, "facts": [["Paris"], ["Seine"]]}
rank = Rule()


def test_the_rule_prefers_the_fullest_answer_within_the_limit():
    answers = [
        answer("Paris, on the Seine.", 8),
        answer("It is Paris, which lies on the Seine.", 14),
        answer("Paris is the capital of France, and it lies on the river Seine.", 81),
        answer("Paris on the Seine and on and on", 192, finished=False),
        answer("Paris is the capital of France.", 15),
        answer("Lyon.", 3),
    ]
    concise, content = rank(PROMPT, answers)
    assert (concise.kind, content.kind) == ("concise", "content")
    assert concise.chosen["text"] == "It is Paris, which lies on the Seine."
    assert concise.rejected["tokens"] == 192
    assert content.rejected["text"] == "Paris is the capital of France."
    assert content.verdict == {"chosen_recall": 1.0, "rejected_recall": 0.5}


def test_the_rule_gives_nothing_when_no_answer_knows_or_finishes():
    assert rank(PROMPT, [answer("Lyon.", 3), answer("Berlin.", 3)]) == []
    assert rank(PROMPT, [answer("Paris on the Seine and", 192, finished=False)]) == []
    assert rank(PROMPT, [answer("Paris, on the Seine", 7)]) == []  # breaks off
    assert rank(PROMPT, [answer("Paris, on the Seine.", 81)]) == []  # too long to learn from
    loop = "Paris on the Seine " * 5 + "."
    assert rank(PROMPT, [answer(loop, 30)]) == []


def test_the_rule_works_without_facts():
    answers = [answer("Paris.", 3), answer("Well, let us begin with history.", 40)]
    (pair,) = rank({"id": "x", "messages": MESSAGES}, [*answers, answer("So so. " * 20, 90)])
    assert (pair.kind, pair.chosen["tokens"], pair.rejected["tokens"]) == ("concise", 40, 90)


TEXTS = ["Paris.", "It is Paris, of course.", "Lyon, I believe, or was it Nice?", "No."]
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
TALK = "<|begin_of_text|>{}Capital of France?<|eot_id|>{}".format(
    HEADER.format("user"), HEADER.format("assistant")
)


@pytest.mark.parametrize("pad", ["<|eot_id|>", "<|end_of_text|>"])
def test_a_reward_is_read_at_the_end_of_turn_whatever_pads(pad, reward_folder, tmp_path):
    folder = shutil.copytree(reward_folder, tmp_path / "reward")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    judge = RewardModel(str(folder))
    assert judge.tokenizer.pad_token == pad
    scores = judge.scores(PROMPT, TEXTS)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = tokenizer(f"{TALK}{text}<|eot_id|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = model.model(torch.tensor([ids])).last_hidden_state[0]
        by_hand = (states @ model.score.weight[0]).tolist()  # the score at every token
        assert score == pytest.approx(by_hand[-1], abs=1e-5)
        assert abs(by_hand[-1] - by_hand[-2]) > 1e-3  # one token earlier would show
    assert [judge.scores(PROMPT, [text])[0] for text in TEXTS] == scores


def test_a_reward_model_prefers_its_highest_finished_score(reward_folder):
    judge = RewardModel(str(reward_folder))
    scores = judge.scores(PROMPT, TEXTS)
    order = sorted(range(4), key=lambda i: scores[i])
    answers = [answer(text, 5) for text in TEXTS]
    (pair,) = judge(PROMPT, answers)
    assert pair.chosen["text"] == TEXTS[order[-1]]
    assert pair.rejected["text"] == TEXTS[order[0]]
    assert pair.verdict["chosen_score"] > pair.verdict["rejected_score"]
    answers[order[-1]]["finished"] = False  # cut off: it may not be the example to follow
    assert judge(PROMPT, answers)[0].chosen["text"] == TEXTS[order[-2]]


def test_a_reward_model_drops_ties(reward_folder):
    judge = RewardModel(str(reward_folder))
    assert judge(PROMPT, [answer("Paris.", 3), answer("Paris.", 3)]) == []
    judge.least_gap = 1e9
    assert judge(PROMPT, [answer("Paris.", 3), answer("Lyon.", 3)]) == []
    assert judge(PROMPT, [answer("Paris.", 3, finished=False)]) == []


def test_what_is_no_reward_model_is_refused(tiny_llama3, tmp_path):
    with pytest.raises(JudgeError, match="gives 2 numbers, a reward model gives one"):
        RewardModel(str(tiny_llama3))
    with pytest.raises(JudgeError, match="cannot load the reward model"):
        RewardModel(str(tmp_path))


def verdict(winner: str) -> tuple:
    content = f'Thinking aloud first. {{"winner": "{winner}"}}'
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def shorter_wins(path, body):
    """A judge of principles: whatever the order, the shorter answer wins."""
    asked = json.loads(body)["messages"][0]["content"]
    a, b = re.search(r"### Answer A\n(.*)\n\n### Answer B\n(.*)\n\nReply", asked, re.S).groups()
    return verdict("A" if len(a) < len(b) else "B")


class Recorder:
    """Answers like `then`, after the first `answers` have been given; counts what it was asked."""

    def __init__(self, *answers, then=shorter_wins):
        self.first, self.then, self.count = list(answers), then, 0
        self.lock = threading.Lock()

    def __call__(self, path, body):
        with self.lock:
            self.count += 1
            first = self.first.pop(0) if self.first else None
        if first is None:
            return self.then(path, body)
        return first(path, body) if callable(first) else first


TWO = [answer("Paris.", 3), answer("The capital of France is the city of Paris.", 12)]


def endpoint(url, **how):
    return Endpoint(url + "/v1", "judge", backoff=0.01, **how)


def test_both_orders_are_asked_and_the_same_winner_counts(loopback):
    server = Recorder()
    (pair,) = endpoint(loopback(server))(PROMPT, TWO)
    assert server.count == 2
    assert pair.chosen["text"] == "Paris."
    assert pair.verdict["judged"] in ("AB", "BA")


@pytest.mark.parametrize("winner", ["A", "B", "tie"])
def test_a_verdict_that_depends_on_the_order_is_a_tie(loopback, winner):
    server = Recorder(then=lambda path, body: verdict(winner))
    assert endpoint(loopback(server))(PROMPT, TWO) == []
    assert server.count == 2


def test_unfinished_and_equal_answers_are_not_asked_about(loopback):
    server = Recorder()
    judge = endpoint(loopback(server))
    assert judge(PROMPT, [TWO[0], TWO[0], answer("Cut off in the", 9, finished=False)]) == []
    assert server.count == 0


def test_as_many_pairs_as_asked_for_and_always_the_same(loopback):
    answers = [answer("x" * n, n) for n in range(1, 7)]
    url = loopback(Recorder())
    two = endpoint(url, pairs=2)(PROMPT, answers)
    assert len(two) == 2
    assert two == endpoint(url, pairs=2)(PROMPT, answers)
    used = [a["text"] for pair in two for a in (pair.chosen, pair.rejected)]
    assert len(set(used)) == 4


BUSY = (429, {"Retry-After": "1"}, b'{"error": "slow down"}')


def test_a_busy_server_is_asked_again_when_it_says(loopback):
    server = Recorder(BUSY)
    begun = time.monotonic()
    assert len(endpoint(loopback(server))(PROMPT, TWO)) == 1
    assert server.count == 3
    assert time.monotonic() - begun >= 1


@pytest.mark.parametrize("status", [500, 503])
def test_a_failing_server_is_asked_again(loopback, status):
    server = Recorder((status, {}, b"oops"), (status, {}, b""))
    assert len(endpoint(loopback(server))(PROMPT, TWO)) == 1
    assert server.count == 4


def test_a_slow_answer_is_given_up_and_asked_for_again(loopback):
    def slow(path, body):
        time.sleep(1.5)
        return verdict("A")

    server = Recorder(slow)
    assert len(endpoint(loopback(server), timeout=0.5)(PROMPT, TWO)) == 1
    assert server.count == 3


MALFORMED = {
    "no JSON": b"<html>It works!</html>",
    "no choices": b'{"choices": []}',
    "no content": b'{"choices": [{"message": {"content": null}}]}',
    "no verdict": b'{"choices": [{"message": {"content": "Both have their merits."}}]}',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_reply_is_asked_for_again_and_else_a_tie(loopback, body):
    server = Recorder((200, {}, body))
    assert len(endpoint(loopback(server))(PROMPT, TWO)) == 1
    assert server.count == 3
    server = Recorder(then=lambda path, asked: (200, {}, body))
    assert endpoint(loopback(server))(PROMPT, TWO) == []
    assert server.count == 6


def test_an_answer_that_breaks_off_on_the_way_is_asked_for_again(loopback):
    server = Recorder((200, {"Content-Length": "999"}, b'{"choices": ['))
    assert len(endpoint(loopback(server))(PROMPT, TWO)) == 1
    assert server.count == 3


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_is_not_repeated_and_says_what_to_do(loopback, status):
    server = Recorder(then=lambda path, body: (status, {}, b'{"error": "no"}'))
    fix = r" \(set OPENAI_API_KEY\)" if status in (401, 403) else ""
    with pytest.raises(JudgeError, match=rf"said {status}{fix}: .*no"):
        endpoint(loopback(server))(PROMPT, TWO)
    assert server.count == 1


def test_a_server_that_stays_down_is_one_clear_error(loopback):
    server = Recorder(then=lambda path, body: (503, {}, b"down"))
    with pytest.raises(JudgeError, match="said 503: down"):
        endpoint(loopback(server), retries=2)(PROMPT, TWO)
    assert server.count == 3
    with pytest.raises(JudgeError, match="does not answer"):
        endpoint("http://127.0.0.1:9", retries=1)(PROMPT, TWO)


def test_a_dead_endpoint_is_told_within_seconds():
    begun = time.monotonic()
    judge = Endpoint("http://127.0.0.1:9/v1", "judge")  # with its own patience
    for ask in (judge.probe, lambda: judge(PROMPT, TWO)):
        with pytest.raises(JudgeError, match=r"the judge at http.* does not answer"):
            ask()
    assert time.monotonic() - begun < 15


def test_any_answer_tells_that_the_endpoint_is_there(loopback):
    Endpoint(loopback(lambda path, body: (404, {}, b"no models here")), "judge").probe()


def test_verdicts_are_kept_as_they_come_and_stand_in_order_at_the_end(loopback, tmp_path):
    prompts = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"Q{i}."}]} for i in range(9)
    ]
    answers = [a | {"id": p["id"]} for p in prompts for a in TWO]
    whole, path = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    judge_answers(endpoint(loopback(Recorder())), prompts, answers, whole)

    def hard_first(asked_path, body):
        """The first prompt is answered last, and then with a refusal."""
        if b"Q0." not in body:
            return shorter_wins(asked_path, body)
        while len(read_jsonl(path)) < 8:
            time.sleep(0.01)
        return 401, {}, b"no"

    with pytest.raises(JudgeError, match="said 401"):
        judge_answers(endpoint(loopback(hard_first), workers=3), prompts, answers, path)
    assert {row["id"] for row in read_jsonl(path)} == {f"p{i}" for i in range(1, 9)}
    server = Recorder()
    judge_answers(endpoint(loopback(server)), prompts, answers, path)
    assert server.count == 2  # the first prompt alone was asked about again
    assert path.read_bytes() == whole.read_bytes()


def test_the_key_is_sent_and_not_told(loopback, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judge = endpoint(loopback(lambda path, body: (401, {}, b"bad key")))
    assert judge.session.headers["Authorization"] == "Bearer sk-secret"
    with pytest.raises(JudgeError) as caught:
        judge(PROMPT, TWO)
    assert "sk-secret" not in str(caught.value)


def test_a_key_that_is_no_header_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary\n")
    headers = Endpoint("http://127.0.0.1:9", "m").session.headers
    assert headers["Authorization"] == "Bearer sk-canary"
    for key in ("sk-canary\nmore", "sk-canary\u2026"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(JudgeError, match="OPENAI_API_KEY") as told:
            Endpoint("http://127.0.0.1:9", "m").probe()
        assert "canary" not in str(told.value)
