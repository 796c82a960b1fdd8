"""W&B never costs a run: refused keys, broken servers and silence all end offline."""

import time

import pytest
import wandb

from scripts import tracking
from scripts.tracking import finish_wandb, start_wandb


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 5)
    yield
    finish_wandb()
    wandb.teardown()


def test_off_when_not_asked_for(tiny_cfg):
    assert "off" in start_wandb(tiny_cfg(report_to="none"))
    assert wandb.run is None


def test_offline_without_a_key(tiny_cfg):
    cfg = tiny_cfg(report_to="wandb")
    message = start_wandb(cfg)
    assert message.startswith("W&B offline (no key")
    assert wandb.run.project == "llama3-dpo"
    assert wandb.run.config["beta"] == 0.1
    wandb.log({"loss": 0.5})
    finish_wandb()
    assert list(cfg.run_dir.glob("wandb/offline-run-*/*.wandb"))


def refuse(path, body):
    return 401, {}, b'{"errors": [{"message": "invalid API key"}]}'


def broken(path, body):
    return 500, {}, b"Internal Server Error"


def silent(path, body):
    time.sleep(60)
    return 200, {}, b"{}"


@pytest.mark.parametrize("answer", [refuse, broken, silent], ids=lambda f: f.__name__)
def test_a_server_that_fails_leaves_the_run_offline(tiny_cfg, loopback, monkeypatch, answer):
    monkeypatch.setenv("WANDB_BASE_URL", loopback(answer))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    cfg = tiny_cfg(report_to="wandb")
    start = time.monotonic()
    message = start_wandb(cfg)
    assert time.monotonic() - start < 60
    assert message.startswith("W&B offline (W&B could not be reached or refused")
    assert "0123456789" not in message
    wandb.log({"loss": 0.5})
    finish_wandb()
    assert list(cfg.run_dir.glob("wandb/offline-run-*/*.wandb"))
