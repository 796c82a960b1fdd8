"""The client that holds a server's replies against the run's own: servers that work, and not."""

import json

import pytest
from test_shipping import write_replies

from scripts import serve
from scripts.cli import parse
from scripts.data import load_preferences
from scripts.model import load_tokenizer
from scripts.pairs.judges import JudgeError
from scripts.probes import main_probe
from scripts.serve import Server, ServerError, check, report

PROMPTS = ("One?", "Two?", "Three?")
MODELS = b'{"data": [{"id": "tuned"}]}'


def completion(text) -> tuple:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def faithful(path: str, body: bytes) -> tuple:
    """A server of the tuned model itself."""
    if path.endswith("/models"):
        return 200, {}, MODELS
    asked = json.loads(body)
    assert asked["model"] == "tuned" and asked["temperature"] == 0 and asked["max_tokens"] == 6
    return completion(f" Reply {PROMPTS.index(asked['messages'][-1]['content'])}.\n")


def server(url: str, **how) -> Server:
    return Server(url + "/v1", "tuned", backoff=0.01, **how)


def test_a_faithful_server_gives_the_same_replies(loopback, tiny_cfg):
    cfg = tiny_cfg()
    probe = write_replies(cfg, *PROMPTS)
    frame = check(server(loopback(faithful)), cfg, probe, None)
    assert frame["same"].all() and frame["served"].tolist() == frame["kept"].tolist()
    shown = report(frame, probe, {who: [4, 4, 4] for who in ("kept", "served")})
    assert "3 of 3 replies" in shown and "run:" not in shown
    assert len(check(server(loopback(faithful)), cfg, probe, 2)) == 2


def test_what_differs_is_counted_and_shown(loopback, tiny_cfg):
    def half(path, body):
        return completion("Something else.") if b"Two?" in body else faithful(path, body)

    cfg = tiny_cfg()
    probe = write_replies(cfg, *PROMPTS)
    frame = check(server(loopback(half)), cfg, probe, None)
    assert frame["same"].tolist() == [True, False, True]
    shown = report(frame, probe, {who: [4, 4, 4] for who in ("kept", "served")})
    assert "2 of 3 replies" in shown and "'Something else.'" in shown
    assert "0.667" in shown  # exact, by the checker, where the run's own is 1


def test_what_a_server_does_unasked_can_be_switched_off(loopback, tiny_cfg):
    def penalizing(path, body):
        plain = json.loads(body).get("repeat_penalty") == 1
        return faithful(path, body) if plain else completion("Other words.")

    cfg = tiny_cfg()
    probe = write_replies(cfg, *PROMPTS)
    asked = server(loopback(penalizing))
    assert not check(asked, cfg, probe, None)["same"].any()
    asked.more = parse("serve", ["--url", "x", "--body", '{"repeat_penalty": 1}']).body
    assert check(asked, cfg, probe, None)["same"].all()
    for text in ("1", "{"):
        with pytest.raises(SystemExit):
            parse("serve", ["--url", "x", "--body", text])


class Flaky:
    """Gives the first `answers` before it is faithful; counts what it was asked."""

    def __init__(self, *answers):
        self.answers, self.count = list(answers), 0

    def __call__(self, path, body):
        self.count += 1
        return self.answers.pop(0) if self.answers else faithful(path, body)


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, b"slow down"),
        (503, {}, b"starting"),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": []}'),
        (200, {"Content-Length": "999"}, b'{"choices": ['),
    ],
    ids=["429", "503", "no JSON", "no choices", "broken off"],
)
def test_a_passing_trouble_is_got_over(loopback, tiny_cfg, trouble):
    cfg, flaky = tiny_cfg(), Flaky(trouble, trouble)
    probe = write_replies(cfg, *PROMPTS)
    assert check(server(loopback(flaky), workers=1), cfg, probe, None)["same"].all()
    assert flaky.count == 5


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((500, {}, b"out of memory"), JudgeError, r"the server at .* said 500: out of memory"),
        ((401, {}, b"no"), JudgeError, r"said 401 \(set OPENAI_API_KEY\)"),
        ((404, {}, b"no such model"), JudgeError, "said 404: no such model"),
        ((200, {}, b"hello"), ServerError, "is no chat completion"),
        (completion(None), ServerError, "is no chat completion"),
    ],
)
def test_a_lasting_trouble_is_one_clear_error(loopback, tiny_cfg, answer, error, message):
    cfg = tiny_cfg()
    probe = write_replies(cfg, *PROMPTS)
    with pytest.raises(error, match=message) as caught:
        check(server(loopback(lambda *_: answer), retries=1), cfg, probe, None)
    assert len(str(caught.value).splitlines()) == 1


def test_a_server_that_is_not_there(tiny_cfg):
    cfg = tiny_cfg()
    probe = write_replies(cfg, *PROMPTS)
    gone = server("http://127.0.0.1:9", retries=1)
    for ask in (gone.only_model, lambda: check(gone, cfg, probe, None)):
        with pytest.raises((JudgeError, ServerError), match=r"the server at .* does not answer"):
            ask()


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b'{"data": []}', "lists 0 models"),
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', r"lists 2 models \['a', 'b'\]; name one"),
        (b"[]", "lists no models"),
        (b"<html>", "lists no models"),
    ],
)
def test_the_model_must_be_plain(loopback, listed, message):
    with pytest.raises(ServerError, match=message):
        server(loopback(lambda *_: (200, {}, listed))).only_model()
    assert server(loopback(faithful)).only_model() == "tuned"


def test_the_command_keeps_what_was_said_and_may_fail_on_it(loopback, tiny_cfg, capsys):
    """From the run folder alone; the run's own prompts are its two held-out pairs'."""
    cfg = tiny_cfg()
    cfg.save(cfg.run_dir / "config.yaml")
    tokenizer = load_tokenizer(cfg.model.model_name_or_path)
    prompts = main_probe(cfg, load_preferences(cfg, tokenizer)["test"]).prompts
    write_replies(cfg, *(prompt[-1]["content"] for prompt in prompts))

    def always(path, body):
        return (200, {}, MODELS) if path.endswith("/models") else completion("Reply 0.")

    options = ["--url", loopback(always) + "/v1", "--config", str(cfg.run_dir / "config.yaml")]
    serve.main(parse("serve", ["check", *options, "--least-same", "0.5"]))
    assert "1 of 2 replies" in capsys.readouterr().out
    rows = [json.loads(r) for r in (cfg.run_dir / "served.jsonl").read_text().splitlines()]
    assert [row["served"] for row in rows] == ["Reply 0."] * 2
    with pytest.raises(ServerError, match=r"fewer than 0\.9"):
        serve.main(parse("serve", [*options, "--least-same", "0.9"]))
