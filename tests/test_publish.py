"""What is sent to the hub: which files, under which name, with which card; what the hub refuses.

The hub is a server on loopback (`tests/upload_hub.py`); the uploads are huggingface_hub's own.
"""

import hashlib
import json
import re
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.numpy import save_file
from upload_hub import OWNER, TOKEN, UploadHub, card_errors, receiving

from scripts import export
from scripts.base import InputError, RecipeError
from scripts.cli import parse
from scripts.config import Config, load_config
from scripts.model_card import LLAMA, base_name, limits, repo_for, terms_of
from scripts.publish import PushError, make_parcel, send

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"


def interval(mean: float, width: float = 0.05) -> dict:
    return {"mean": mean, "low": mean - width, "high": mean + width, "prompts": 52}


def measure(base: float, tuned: float) -> dict:
    return {"base": interval(base), "tuned": interval(tuned), "change": interval(tuned - base)}


FIGURES = {
    "prompts": 253, "pairs": 119, "max_new_tokens": 128, "interval": "bootstrap of passages, 95%",
    "shorter": interval(0.88), "reward_accuracy": interval(0.91), "reward_margin": interval(3.1),
    "measures": {
        "exact": measure(0.14, 0.67), "declined": measure(0.0, 0.0), "length": measure(94.8, 10.9),
        "unsupported": measure(0.36, 0.04), "base_nll": measure(0.44, 1.0),
    },
    "beside": {"plain questions": {"facts": measure(0.70, 0.44), "length": measure(80.0, 12.0)}},
    "baselines": {"base, asked to be brief": {
        name: {"asked": interval(0.3), "tuned": interval(0.6), "change": interval(0.3)}
        for name in ("exact", "declined", "length")
    }},
    "win_rate": {"judge": "the checker", "raw": interval(0.8), "length_controlled": interval(0.6)},
    "targets": {"exact answers up by at least 0.20": "met",
                "key facts of plain questions fall by no more than 0.10": "missed"},
}  # fmt: skip


def fill(cfg: Config) -> Config:
    """Leave in the run folder what a finished run leaves, small, and what must never be sent."""
    run = cfg.run_dir
    for name in ("adapter", "merged", "checkpoint-5", "wandb", "figures"):
        (run / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("adapter_model.safetensors", "optimizer.pt", "training_args.bin"):
        save_file({"a": random.normal(size=(300, 128))}, run / "adapter" / name)
    settings = {"base_model_name_or_path": "/somewhere/converted/model", "r": 16}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (run / "adapter" / "README.md").write_text("a card of another making")
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": random.normal(size=(200, 64))}, run / "merged" / name)
    (run / "merged" / "config.json").write_text('{"model_type": "llama", "vocab_size": 9}')
    for folder in ("adapter", "merged"):
        (run / folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (run / folder / "chat_template.jinja").write_text("{{ messages }}")
    for path in ("checkpoint-5/optimizer.pt", "wandb/run.wandb", "replies.jsonl"):
        (run / path).write_text("not to be sent")
    (run / "figures" / "before_after.png").write_bytes(b"\x89PNG" + bytes(999))
    (run / "evaluation.json").write_text(json.dumps(FIGURES))
    (run / "environment.json").write_text('{"torch": "2.13.0", "device": "CPU, 2 threads"}')
    (run / "dropped_rows.jsonl").write_text("{}\n{}\n")
    (run / "metrics.jsonl").write_text('{"step": 57}\n')
    origins = {"dataset": {"name": "data/grounded", "content": "6829e300f940ba15"}}
    (run / "origins.json").write_text(json.dumps(origins))
    cfg.save(run / "config.yaml")
    return cfg


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Config:
    """The config of a finished run of the default config."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return fill(load_config("configs/smollm2-135m-cpu.yaml", output_dir=str(tmp_path / "run")))


@pytest.fixture
def finished_llama3(tmp_path, monkeypatch) -> Config:
    """Of an 8B config; its model is not here, as after a download that was cleared."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    path, folder = "configs/llama3-8b-a100-short.yaml", str(tmp_path / "run")
    return fill(load_config(path, output_dir=folder, may_lack_gpu=True))


@pytest.fixture
def hub(monkeypatch):
    """Starts a hub, which `fault` may spoil, and points the client at it; it never waits long."""
    servers = ExitStack()

    def start(fault=None) -> UploadHub:
        server = UploadHub(fault)
        monkeypatch.setattr(constants, "ENDPOINT", servers.enter_context(receiving(server)))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        quick = SimpleNamespace(sleep=lambda seconds: None)
        monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
        monkeypatch.setattr("scripts.hub.BREATH", 0.0)
        return server

    with servers:
        yield start


def run(cfg: Config, *options: str) -> None:
    export.main(parse("export", ["push", "--config", str(cfg.run_dir / "config.yaml"), *options]))


def sent(hub: UploadHub) -> dict[str, bytes]:
    (repo,) = hub.repos.values()
    return repo["files"]


# --- what is sent


ALWAYS = {"README.md", "DATA_CARD.md", "evaluation.json", "before_after.png", "tokenizer.json",
          "chat_template.jinja"}  # fmt: skip


def test_a_push_shows_and_sends_nothing_unless_told(finished, hub, capsys):
    server = hub()
    run(finished)
    shown = capsys.readouterr().out
    assert server.asked == []
    assert "SmolLM2-135M-Instruct-dpo-grounded-lora (private), 8 files" in shown
    assert re.search(r"adapter_model\.safetensors +0\.31 MB", shown)
    assert "## What it is not for" in shown and "Nothing was sent" in shown


@pytest.mark.parametrize(
    ("what", "own"),
    [
        ("adapter", {"adapter_model.safetensors", "adapter_config.json"}),
        ("merged", {"config.json", *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))}),
    ],
)
def test_what_is_sent_is_what_loads_and_what_tells(finished, hub, what, own, capsys):
    """No optimizer state, checkpoint, log or foreign card; the weights byte for byte."""
    server = hub()
    run(finished, "--what", what, "--send")
    files = sent(server)
    assert set(files) == ALWAYS | own
    for name in own:
        if name.endswith(".safetensors"):
            assert files[name] == (finished.run_dir / what / name).read_bytes()
    name, repo = server.repos.popitem()
    assert repo["private"] and f'from_pretrained("{name}"' in files["README.md"].decode()
    assert f"/{OWNER}/SmolLM2-135M-Instruct-dpo-grounded" in capsys.readouterr().out
    if what == "adapter":  # it names its base as the hub does; the run's own stays
        settings = json.loads(files["adapter_config.json"])
        assert settings == {"base_model_name_or_path": BASE, "r": 16}
        kept = json.loads((finished.run_dir / "adapter" / "adapter_config.json").read_text())
        assert kept["base_model_name_or_path"] == "/somewhere/converted/model"


# --- the card


def test_the_card_tells_the_whole_run(finished):
    card = make_parcel(finished, "adapter").card
    text = card.content
    assert card.text.strip().startswith("# SmolLM2-135M-Instruct-dpo-grounded-lora\n")
    for line in (
        "| right, nothing wrong or made up | 0.14 [0.09, 0.19] | 0.67 [0.62, 0.72] |",
        "| base, asked to be brief | 0.30 [0.25, 0.35] |",
        "| win rate | 0.80 [0.75, 0.85] |",
        "| exact answers up by at least 0.20 | met |",
        "`data/grounded` (digest of its files: `6829e300f940ba15`)",
        "57 optimiser steps",
        "| torch | 2.13.0 |",
        "## What it is not for\n",
    ):
        assert line in text
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    saved = yaml.safe_load((finished.run_dir / "config.yaml").read_text())
    assert {"beta", "loss_type", "lora_r", "lora_dropout", "seed", "load_in_4bit"} <= set(shown)
    assert shown.items() <= saved.items() and "output_dir" not in shown
    assert str(finished.run_dir) not in text
    data = card.data
    assert (data.license, data.library_name) == ("apache-2.0", "peft")
    assert data.base_model == BASE
    exact = next(r for r in data.eval_results if r.metric_type == "exact")
    assert (exact.dataset_type, data.datasets) == ("grounded", None)  # it is none of the hub's
    assert exact.metric_value == 0.67 and exact.metric_args["interval_95"] == [0.62, 0.72]
    assert card_errors(text) == []


def test_the_card_says_where_the_model_got_worse_and_what_it_cannot(finished):
    told = "\n".join(limits(FIGURES))
    assert "said so in 0% of such cases" in told
    assert "Missed aim: key facts of plain questions fall by no more than 0.10 (missed)." in told
    worse = re.findall("Worse than the base model: (.*?):", told)
    assert worse == ["base-model loss per token", "key facts mentioned, on plain questions"]
    better = FIGURES | {"measures": {"exact": measure(0.1, 0.9)}, "beside": {}, "targets": {}}
    assert limits(better) == []


def test_a_run_that_was_not_evaluated_says_so(finished):
    (finished.run_dir / "evaluation.json").unlink()
    card = make_parcel(finished, "adapter").card
    assert "this run was not evaluated" in card.content and card.data.eval_results is None


def test_the_hub_checks_the_card_before_anything_is_uploaded(finished, hub):
    server = hub()
    parcel = make_parcel(finished, "adapter", repo=f"{OWNER}/mine")
    readme = parcel.folder / "README.md"
    readme.write_text(readme.read_text().replace("license: apache-2.0", "license: my-own"))
    with pytest.raises(PushError, match=r"\(400\).*license"):
        send(parcel)
    assert server.objects == {} and sent(server) == {}


# --- licences and names


def test_a_llama3_is_named_and_licensed_as_its_licence_has_it(finished_llama3, tmp_path, hub):
    server = hub()
    text = tmp_path / "the-licence"
    text.write_text("the agreement")
    run(finished_llama3, "--send", "--licence-file", str(text))
    (name,) = server.repos
    assert name == f"{OWNER}/Llama-3-8B-Instruct-dpo-orca_dpo_pairs-lora"
    files = sent(server)
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "llama3" and card.data.base_model == LLAMA3
    assert card.data.datasets == ["Intel/orca_dpo_pairs"]
    assert card.text.strip().splitlines()[2] == "**Built with Meta Llama 3**"
    assert files["LICENSE"] == b"the agreement"
    assert "Meta Llama 3 Community License, Copyright © Meta Platforms" in files["NOTICE"].decode()
    assert card_errors(card.content) == []


@pytest.mark.parametrize("given", ["my-model", "Llama-3.1-mine"])
def test_another_beginning_is_refused_with_a_name_that_would_do(finished_llama3, given):
    with pytest.raises(InputError, match=f"`Llama-3`; take someone/Llama-3-{given}$"):
        make_parcel(finished_llama3, "adapter", repo=f"someone/{given}")


@pytest.mark.parametrize(
    ("base", "licence", "prefix"),
    [
        (LLAMA3, "llama3", "Llama-3"),
        ("someone/Hermes-2-Pro-Llama-3-8B", "llama3", "Llama-3"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3.1", "Llama"),
        ("meta-llama/Llama-3.2-1B", "llama3.2", "Llama"),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", "apache-2.0", ""),
    ],
)
def test_terms_by_the_bases_name(base, licence, prefix):
    terms = terms_of(base)
    assert (terms.licence, terms.prefix) == (licence, prefix)
    assert (terms.line == "Built with Meta Llama 3") == (licence == "llama3")


def test_a_llama3_in_a_folder_goes_by_its_licence_too(tiny_cfg, tiny_llama3, tmp_path):
    """The folder has a model of Llama 3's vocabulary, and no name that tells."""
    base = shutil.copytree(tiny_llama3, tmp_path / "my-base")
    values = json.loads((base / "config.json").read_text()) | {"vocab_size": 128_256}
    (base / "config.json").write_text(json.dumps(values))
    cfg = fill(tiny_cfg(model_name_or_path=str(base)))
    with pytest.raises(InputError, match="my-base has no LICENSE"):
        make_parcel(cfg, "merged")
    (base / "LICENSE").write_text("the agreement")
    parcel = make_parcel(cfg, "merged")
    assert parcel.repo.startswith("Llama-3-my-base-dpo-")
    assert (parcel.folder / "LICENSE").read_text() == "the agreement"
    assert "**Built with Meta Llama 3**" in parcel.card.text


def test_a_licence_that_is_not_known_is_asked_for():
    with pytest.raises(InputError, match=r"not known here: give it with --licence"):
        terms_of("a/b")
    assert terms_of("a/b", given="gemma").licence == "gemma"
    assert terms_of("a/b", given="llama3.1") == LLAMA["3.1"]


def test_a_licence_that_wants_a_copy_is_not_sent_without(finished_llama3, endpoint, monkeypatch):
    url = endpoint(lambda path, body: (403, {"X-Error-Code": "GatedRepo"}, b""))
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(InputError, match="give it with --licence-file"):
        make_parcel(finished_llama3, "adapter")


def test_names_come_from_base_and_data(finished):
    assert base_name(finished, None) == BASE
    name = repo_for(finished, "merged", BASE, terms_of(BASE), None)
    assert name == "SmolLM2-135M-Instruct-dpo-grounded"
    with pytest.raises(InputError, match="--repo"):
        make_parcel(finished, "merged", repo="a/b/c")
    with pytest.raises(InputError, match="--base takes"):
        base_name(finished, "/a/folder")


def test_an_adapter_of_a_folder_needs_the_bases_name(finished, tmp_path):
    origins = {"model": {"name": str(tmp_path), "content": "1"}}
    (finished.run_dir / "origins.json").write_text(json.dumps(origins))
    with pytest.raises(InputError, match="--base owner/model"):
        make_parcel(finished, "adapter")
    card = make_parcel(finished, "adapter", base="someone/SmolLM2-tuned").card
    assert card.data.base_model == "someone/SmolLM2-tuned"
    merged = make_parcel(finished, "merged", licence="mit").card
    assert merged.data.base_model is None and str(tmp_path) not in merged.content


# --- secrets


CANARIES = {  # the last is known by its shape alone
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "CANARYwandb" + "a1b2c3d4e" * 3,
    "MY_DB_PASSWORD": "CANARY-password",
    "UNNAMED": "hf_" + "otherCANARY" * 4,
}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("HF_TOKEN", "evaluation.json"),
        ("WANDB_API_KEY", "header"),
        ("MY_DB_PASSWORD", "adapter/chat_template.jinja"),
        ("UNNAMED", "adapter/chat_template.jinja"),
        ("netrc", "evaluation.json"),
    ],
)
def test_a_secret_in_what_would_be_sent_is_refused(
    finished, hub, monkeypatch, tmp_path, name, where
):
    """However it came there; and the message doesn't show it."""
    server = hub()
    for variable, value in CANARIES.items():
        monkeypatch.setenv(variable, value)
    # as `wandb login` leaves it
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password CANARYnetrc0123\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    secret = CANARIES.get(name, "CANARYnetrc0123")
    if where == "header":
        path = finished.run_dir / "adapter" / "adapter_model.safetensors"
        save_file({"a": np.zeros(3)}, path, metadata={"note": secret})
    else:
        path = finished.run_dir / where
        text = path.read_text()
        path.write_text(text[:-1] + f', "note": "{secret}"}}' if where[0] == "e" else text + secret)
    with pytest.raises(PushError, match="looks like a token or key; nothing was sent") as error:
        run(finished, "--send")
    assert secret not in str(error.value) and server.asked == []


def test_a_place_of_this_machine_is_refused(finished, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    template = finished.run_dir / "adapter" / "chat_template.jinja"
    template.write_text("{# from /home/somebody/models #}")
    with pytest.raises(PushError, match=r"chat_template\.jinja, line 1, holds a path of this"):
        make_parcel(finished, "adapter")


# --- what the hub refuses


def always(status: int, where: str, words: str = "no"):
    return lambda method, path, before: (status, words) if where in path else None


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (always(401, "whoami", "Invalid credentials"), r"refuses \(401\).*check at .*your token"),
        (always(403, "preupload", "storage limit reached"), r"\(403\).*storage limit reached"),
        (always(413, "commit", "Payload too large"), r"\(413\).*Payload too large"),
        (always(500, "create"), r"the hub fails \(500\), 4 times in a row"),
    ],
)
def test_a_refusal_is_one_line_with_what_to_do(finished, hub, fault, told):
    server = hub(fault)
    with pytest.raises(RecipeError, match=told) as error:
        run(finished, "--send")
    assert len(str(error.value).splitlines()) == 1 and TOKEN not in str(error.value)
    assert not any(repo["files"] for repo in server.repos.values())


@pytest.mark.parametrize("where", ["create", "store", "commit"])
def test_a_hub_that_is_out_of_order_for_a_moment_is_asked_again(finished, hub, where):
    server = hub(lambda method, path, n: (503, "later") if where in path and n == 0 else None)
    run(finished, "--send")
    assert "adapter_model.safetensors" in sent(server)


def test_without_a_token_nothing_is_asked(finished, hub, monkeypatch):
    server = hub()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match=r"no token.*settings/tokens"):
        run(finished, "--send")
    assert server.asked == []


def test_a_repository_that_holds_something_is_left_alone(finished, hub):
    server = hub()
    name = f"{OWNER}/SmolLM2-135M-Instruct-dpo-grounded-lora"
    server.repos[name] = {"private": True, "files": {"README.md": b"mine", "other.bin": b"1"}}
    with pytest.raises(PushError, match=r"holds 2 files.*--update"):
        run(finished, "--send")
    assert sent(server)["README.md"] == b"mine"
    run(finished, "--send", "--update")
    assert sent(server)["other.bin"] == b"1" and len(sent(server)) == 9


def test_a_public_repository_is_not_taken_for_a_private_one(finished, hub):
    server = hub()
    server.repos[f"{OWNER}/mine"] = {"private": False, "files": {}}
    with pytest.raises(PushError, match="is public: add --public"):
        run(finished, "--send", "--repo", f"{OWNER}/mine")
    run(finished, "--send", "--repo", f"{OWNER}/mine", "--public")
    assert len(sent(server)) == 8


def test_an_upload_that_breaks_off_goes_on_at_the_second_call(finished, hub):
    """Of two large files one never arrives; the second call sends what is not there yet."""
    second = finished.run_dir / "merged" / "model-00002-of-00002.safetensors"
    lost = hashlib.sha256(second.read_bytes()).hexdigest()
    healed = []

    def cut(method: str, path: str, before: int) -> str | None:
        return "cut" if method == "PUT" and lost in path and not healed else None

    server = hub(cut)
    with pytest.raises(PushError, match=r"broke off \(.*the same command goes on") as error:
        run(finished, "--send", "--what", "merged")
    assert TOKEN not in str(error.value)
    assert lost not in server.objects and not sent(server)
    arrived, before = set(server.objects), len(server.asked)
    assert arrived
    healed.append(True)
    run(finished, "--send", "--what", "merged")
    for shard in (finished.run_dir / "merged").glob("*.safetensors"):
        assert sent(server)[shard.name] == shard.read_bytes()
    again = {path.split("/")[2] for method, path in server.asked[before:] if method == "PUT"}
    assert lost in again and not again & arrived


# --- what is missing


def test_what_is_missing_is_told_before_anything_is_done(finished):
    shutil.rmtree(finished.run_dir / "merged")
    with pytest.raises(RecipeError, match=r"no merged model .*python -m scripts\.export --config"):
        make_parcel(finished, "merged")
    shutil.rmtree(finished.run_dir / "adapter")
    with pytest.raises(RecipeError, match="no adapter"):
        make_parcel(finished, "adapter")
