"""Sampling and judging can be stopped and resumed, and every pair says where it comes from."""

import pytest
from conftest import write_jsonl

from scripts.cli import RecipeError, parse
from scripts.pairs.build import (
    as_row,
    build,
    judge_answers,
    keep_settings,
    parse_styles,
    pick_backend,
    read_jsonl,
    read_prompts,
    sample_answers,
    styled,
    transformers_sampler,
)
from scripts.pairs.judges import JudgeError, Preference

PROMPTS = [
    {"id": f"p{i}", "messages": [{"role": "user", "content": "Why? " * (i + 1)}]} for i in range(3)
]
STYLES = {"plain": 4, "brief": 2, "accurate": 2}


@pytest.fixture(scope="module")
def sampling():
    return {"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9}


@pytest.fixture
def sample(tiny_cfg, tiny_llama3, sampling):
    sampler = transformers_sampler(tiny_cfg(), str(tiny_llama3), **sampling)

    def run(path):
        return sample_answers(sampler, PROMPTS, path, styles=STYLES, batch_size=5, seed=0)

    return run


def test_every_prompt_is_asked_in_every_style(sample, tmp_path):
    rows = sample(tmp_path / "samples.jsonl")
    assert len(rows) == len(PROMPTS) * sum(STYLES.values())
    for style, times in STYLES.items():
        for prompt in PROMPTS:
            of = [r for r in rows if (r["id"], r["style"]) == (prompt["id"], style)]
            assert len(of) == times
    assert all(row["finished"] or row["tokens"] == 4 for row in rows)
    assert len({row["text"] for row in rows}) > 3  # sampled, not the same greedy reply again
    assert read_jsonl(tmp_path / "samples.jsonl") == rows


def test_a_stopped_run_goes_on_to_the_same_file(sample, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    rows = sample(whole)
    lines = whole.read_bytes().split(b"\n")
    cut.write_bytes(b"".join(line + b"\n" for line in lines[:7]) + lines[7][:9])
    assert sample(cut) == rows  # the half batch is sampled again, the whole one is not
    assert cut.read_bytes() == whole.read_bytes()
    assert sample(cut) == rows  # all there: nothing to do


def test_requests_to_be_brief_are_put_around_the_prompt():
    why = [{"role": "user", "content": "Why?"}]
    assert styled(why, "plain") == why
    assert styled(why, "brief")[0]["content"].startswith("Why? Answer in one")
    assert [m["role"] for m in styled(why, "accurate")] == ["system", "user"]
    own = [{"role": "system", "content": "Mine."}, *why]
    assert styled(own, "accurate") == own  # a prompt's own system message is not replaced


class Counting:
    """Prefers the first answer; fails at the prompt numbered `fails`."""

    name, workers = "counting", 1

    def __init__(self, fails=None):
        self.asked, self.fails = [], fails

    def __call__(self, prompt, answers):
        self.asked.append(prompt["id"])
        if len(self.asked) == self.fails:
            raise JudgeError("gone")
        return [Preference("first", answers[0], answers[1], {"verdict": "AB"})]


def answers_to(prompts):
    return [
        {"id": p["id"], "style": "plain", "text": f"{p['id']} {n}", "tokens": 3, "finished": True}
        for p in prompts
        for n in range(2)
    ]


def test_judging_goes_on_where_it_stopped(tmp_path):
    path, answers = tmp_path / "judged.jsonl", answers_to(PROMPTS)
    with pytest.raises(JudgeError):
        judge_answers(Counting(fails=2), PROMPTS, answers, path)
    assert [row["id"] for row in read_jsonl(path)] == ["p0"]  # what was paid for is kept
    second = Counting()
    pairs = judge_answers(second, PROMPTS, answers, path)
    assert second.asked == ["p1", "p2"]
    assert pairs == judge_answers(Counting(), PROMPTS, answers, tmp_path / "whole.jsonl")
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [pair["chosen_sample"] for pair in pairs] == [0, 2, 4]


def test_a_pair_keeps_the_prompts_own_fields_and_how_it_came_about():
    one, two = (answer | {"sample": n} for n, answer in enumerate(answers_to(PROMPTS[:1])))
    prompt = PROMPTS[0] | {"facts": [["why"]], "split": "train", "prompt": "Why?"}
    row = as_row(prompt, Preference("kind", one, two, {"verdict": "AB"}))
    assert row["prompt"] == PROMPTS[0]["messages"]
    assert row["chosen"] == [{"role": "assistant", "content": "p0 0"}]
    assert (row["id"], row["facts"], row["verdict"]) == ("p0", [["why"]], "AB")
    assert (row["chosen_sample"], row["rejected_sample"]) == (0, 1)
    assert "split" not in row and "messages" not in row


def test_the_command_makes_a_folder_that_loads_and_a_second_call_changes_nothing(
    tiny_llama3, tmp_path, capsys
):
    prompts = [{"prompt": f"Why {i}?", "split": "test" if i == 2 else "train"} for i in range(3)]
    path, out = write_jsonl(tmp_path / "prompts.jsonl", prompts), tmp_path / "out"
    arguments = ["build", "--prompts", str(path), "--out", str(out), "--max-new-tokens", "5"]
    arguments += ["--samples", "plain=2", "--batch-size", "2"]
    arguments += ["--set", f"model_name_or_path={tiny_llama3}"]
    build(parse("data", arguments))
    assert "sampled 6/6 answers" in capsys.readouterr().out
    made = {f.name: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert {"train.jsonl", "test.jsonl", "samples.jsonl", "judged.jsonl"} < set(made)
    build(parse("data", arguments))
    assert "sampled" not in capsys.readouterr().out
    assert made == {f.name: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    with pytest.raises(RecipeError, match=r"begun with other settings \(seed was 0, is 1\)"):
        build(parse("data", [*arguments, "--seed", "1"]))


def test_settings_are_kept_for_the_next_call(tmp_path):
    keep_settings(tmp_path / "w", {"seed": 0})
    keep_settings(tmp_path / "w", {"seed": 0})
    with pytest.raises(RecipeError, match="seed was 0, is 2"):
        keep_settings(tmp_path / "w", {"seed": 2})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"question": "Why?"}, "prompts.jsonl:1: prompt is missing"),
        ({"prompt": 3}, "prompts.jsonl:1: prompt is not text but int"),
        ({"prompt": ""}, "does not end with the user's message"),
        ({"prompt": [{"role": "assistant", "content": "Hm."}]}, "does not end with the user's"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line, told, tmp_path):
    with pytest.raises(RecipeError, match=told):
        read_prompts(write_jsonl(tmp_path / "prompts.jsonl", [line]))


def test_ids_are_unique_and_files_are_there(tmp_path):
    with pytest.raises(RecipeError, match="no prompts at"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(RecipeError, match=r"prompts.jsonl:2: the id 'a' stands there twice"):
        read_prompts(write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Why?"}] * 2))


def test_options_that_make_no_sense_are_refused():
    assert parse_styles("plain=4,brief=2") == {"plain": 4, "brief": 2}
    with pytest.raises(RecipeError, match="'rude=1'"):
        parse_styles("rude=1")
    with pytest.raises(RecipeError, match="vLLM is not installed"):
        pick_backend("vllm")
    assert pick_backend("auto") == "transformers"
