"""Sampling can be stopped and resumed, and asks each prompt in every style."""

import pytest
from transformers import AutoModelForCausalLM

from scripts.build_pairs import SAMPLES, as_messages, read_jsonl, sample_answers
from scripts.models import load_tokenizer

PROMPTS = [{"id": f"p{i}", "prompt": "Why? " * (i + 1)} for i in range(3)]


@pytest.fixture(scope="module")
def tiny(tiny_llama3):
    return AutoModelForCausalLM.from_pretrained(tiny_llama3), load_tokenizer(str(tiny_llama3))


def sample(tiny, path):
    return sample_answers(*tiny, PROMPTS, path, max_new_tokens=4, batch_size=5)


def test_every_prompt_is_asked_in_every_style(tiny, tmp_path):
    rows = sample(tiny, tmp_path / "samples.jsonl")
    assert len(rows) == len(PROMPTS) * sum(SAMPLES.values())
    for style, times in SAMPLES.items():
        for prompt in PROMPTS:
            of = [r for r in rows if (r["id"], r["style"]) == (prompt["id"], style)]
            assert len(of) == times
    assert all(row["finished"] or row["tokens"] == 4 for row in rows)
    assert read_jsonl(tmp_path / "samples.jsonl") == rows


def test_a_stopped_run_goes_on_to_the_same_file(tiny, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    rows = sample(tiny, whole)
    cut.write_bytes(b"".join(line + b"\n" for line in whole.read_bytes().split(b"\n")[:7]))
    assert sample(tiny, cut) == rows  # the half batch is sampled again, the whole one is not
    assert cut.read_bytes() == whole.read_bytes()
    assert sample(tiny, cut) == rows  # all there: nothing to do


def test_requests_to_be_brief_are_put_around_the_prompt():
    assert as_messages("Why?", "plain") == [{"role": "user", "content": "Why?"}]
    assert as_messages("Why?", "brief")[0]["content"].startswith("Why? Answer in one")
    assert [m["role"] for m in as_messages("Why?", "accurate")] == ["system", "user"]
