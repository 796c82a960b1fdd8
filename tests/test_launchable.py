"""The launchable is one that Brev takes, and the API's bad days end in one clear line."""

import copy
import json
import subprocess
import sys
import time

import pytest
import yaml

from scripts import launchable
from scripts.config import ROOT
from scripts.launchable import (
    LaunchableError,
    clicks,
    differences,
    load,
    problems,
    publish,
    render,
    repository,
)

REPO = "https://github.com/someone/recipe"
TOKEN = "eyJ-secret-token"


@pytest.fixture
def values():
    return load()


@pytest.fixture
def body(values):
    return render(values, REPO)


def test_the_committed_launchable_is_valid_and_renders_the_repository(values, body):
    assert problems(values, REPO) == []
    text = json.dumps(body)
    assert "${REPOSITORY}" not in text and "fallbacks" not in body
    assert body["file"]["url"] == f"{REPO}/blob/main/notebooks/llama3_dpo.ipynb"
    compose = yaml.safe_load(body["buildRequest"]["dockerCompose"]["yamlString"])
    command = compose["services"]["recipe"]["command"][-1]
    assert f"git clone --depth 1 {REPO} recipe" in command
    assert "bash scripts/setup.sh" in command
    assert "notebooks/llama3_dpo.ipynb" in command
    config = compose["services"]["recipe"]["environment"]["DPO_CONFIG"]
    assert (ROOT / config).is_file()  # what the notebook starts with there
    parameters = {p["name"]: p["required"] for p in body["buildRequest"]["parameters"]}
    assert parameters == {"HF_TOKEN": True, "WANDB_API_KEY": False}
    rules = body["createWorkspaceRequest"]["firewallRules"]
    assert [rule["allowedIPs"] for rule in rules] == ["user-ip"]


def test_the_shell_in_it_is_well_formed(body):
    compose = yaml.safe_load(body["buildRequest"]["dockerCompose"]["yamlString"])
    script = compose["services"]["recipe"]["command"][-1]
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_fallbacks_take_the_place_of_the_instance(values):
    for number, name in enumerate(values["fallbacks"], start=1):
        body = render(values, REPO, number)
        assert body["createWorkspaceRequest"]["instanceType"] == name
    with pytest.raises(LaunchableError, match=r"--instance 9: there are 5 fallbacks"):
        render(values, REPO, 9)


def _without(path):
    def change(values):
        *parents, last = path.split(".")
        for key in parents:
            values = values[key]
        del values[last]

    return change


def _with(path, value):
    def change(values):
        *parents, last = path.split(".")
        for key in parents:
            values = values[key]
        values[last] = value

    return change


VM = {"lifeCycleScriptAttr": {"script": "x" * 16385}}
WRONG = [
    (_without("name"), "'name' is a required property"),
    (_with("name", "Has Spaces"), "name: 'Has Spaces' does not match"),
    (_with("viewAccess", "everyone"), "viewAccess: 'everyone' is not one of"),
    (_with("nmae", "x"), "'nmae' was unexpected"),
    (_with("createWorkspaceRequest.storage", 100), "storage: 100 is not of type 'string'"),
    (_with("createWorkspaceRequest.storage", "100Gi"), "storage: '100Gi' does not match"),
    (_with("createWorkspaceRequest.instanceType", "A100"), "instanceType: 'A100' does not match"),
    (_with("createWorkspaceRequest.firewallRules", [{"port": "8888", "allowedIPs": "all"}]),
     "port 8888 is open to the world"),
    (_with("createWorkspaceRequest.firewallRules", [{"port": "x", "allowedIPs": "all"}]),
     "port: 'x' does not match"),
    (_with("buildRequest.vmBuild", {"forceJupyterInstall": True}), "exactly one of vmBuild"),
    (_with("buildRequest", {}), "exactly one of vmBuild, containerBuild, dockerCompose, not none"),
    (_with("buildRequest", {"vmBuild": VM}), "the set-up script has 16,385 bytes, 16,384 at most"),
    (_with("buildRequest", {"containerBuild": {"containerUrl": "not an image"}}), "names no image"),
    (_with("buildRequest.parameters", [{"name": "hf", "description": "x", "required": True}]),
     "name: 'hf' does not match"),
    (_with("buildRequest.parameters", [{"name": "OTHER", "description": "x", "required": True}]),
     "parameter OTHER is asked for but never used"),
    (_with("buildRequest.dockerCompose.yamlString", "no services"), "is no compose file"),
    (_with("buildRequest.dockerCompose.yamlString", "services: {a: {image: 'nvidia/cuda'}}"),
     "image 'nvidia/cuda' has no registry path and tag"),
    (_with("buildRequest.dockerCompose.yamlString", "services: {a: {image: 'a/b:latest'}}"),
     "pin 'a/b:latest' to a version"),
    (_with("buildRequest.dockerCompose.yamlString", "services: {a: {image: 'a/b:1'}}"),
     "no GPU is reserved"),
    (_with("buildRequest.dockerCompose.fileUrl", "https://github.com/a/b/c.yaml"),
     "exactly one of yamlString and fileUrl"),
    (_with("file.url", "https://example.com/x.ipynb"), "is no public GitHub or GitLab file"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), WRONG, ids=[told[:40] for _, told in WRONG])
def test_what_the_api_would_not_take_is_told_beforehand(values, change, told):
    change(values)
    with pytest.raises(LaunchableError) as caught:
        render(values, REPO)
    assert told in str(caught.value)


@pytest.mark.parametrize("url", [REPO, REPO + ".git", REPO + "/", "https://gitlab.com/a/b/c"])
def test_public_repositories(url):
    assert repository(url).startswith("https://git")
    assert not repository(url).endswith((".git", "/"))


@pytest.mark.parametrize(
    "url", ["http://github.com/a/b", "https://example.com/a/b", "/srv/git", ""]
)
def test_other_repositories_are_refused(url):
    with pytest.raises(LaunchableError, match="give yours with --repository"):
        repository(url)


@pytest.fixture
def api(loopback, monkeypatch, tmp_path):
    """A server in the API's place, and somebody logged in; `say` is asked (path, body)."""
    (tmp_path / ".brev").mkdir()
    (tmp_path / ".brev" / "credentials.json").write_text(json.dumps({"access_token": TOKEN}))
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    monkeypatch.setattr(launchable, "TIMEOUT", 1)

    def start(say):
        monkeypatch.setenv("BREV_API_URL", loopback(say))

    return start


class Brev:
    """An API that keeps what it is given."""

    def __init__(self):
        self.kept, self.asked = {}, []

    def __call__(self, path, body):
        self.asked.append(path)
        sent = json.loads(body) if body else None
        if path == "/organizations/org-1/v2/launchables":
            self.kept["env-1"] = sent | {"id": "env-1", "createdAt": "today"}
            return 200, {}, b'{"id": "env-1"}'
        if path == "/organizations/org-1/v2/launchables/edit":
            self.kept[sent["id"]] = self.kept[sent["id"]] | sent
            return 200, {}, b"{}"
        name = path.removeprefix("/launchables/")
        if name in self.kept:
            return 200, {}, json.dumps(self.kept[name]).encode()
        return 404, {}, b'{"message": "not found"}'


def test_create_and_update_are_read_back(api, body):
    brev = Brev()
    api(brev)
    assert publish(body, "org-1") == "env-1"
    assert brev.kept["env-1"]["viewAccess"] == "public"
    changed = copy.deepcopy(body) | {"description": "Another description.", "viewAccess": "x"}
    assert publish(changed, "org-1", "env-1") == "env-1"
    assert brev.kept["env-1"]["description"] == "Another description."
    assert brev.kept["env-1"]["viewAccess"] == "public"  # an edit does not touch it
    assert brev.asked.count("/launchables/env-1") == 2


def test_what_was_saved_otherwise_is_noticed(api, body):
    brev = Brev()

    def forgetful(path, sent):
        answer = brev(path, sent)
        if "env-1" in brev.kept:
            brev.kept["env-1"]["createWorkspaceRequest"]["storage"] = "10"
        return answer

    api(forgetful)
    with pytest.raises(LaunchableError, match=r"createWorkspaceRequest\.storage is '10'"):
        publish(body, "org-1")


def test_differences_minds_what_was_asked_for_only():
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2, "c": 3}], "d": 4}) == []
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["a[1].b is '3'"]
    assert differences({"a": [1]}, {"a": []}) == ["a is '[]'"]


@pytest.mark.parametrize(
    ("status", "cure"),
    [
        (401, "run `brev login`"),
        (403, "check --org"),
        (404, "check the id and --org"),
        (409, "change `name`, or use `update --id env-…`"),
        (422, "does not take it as it is"),
        (500, "try again later"),
        (503, "try again later"),
    ],
)
def test_refusals_say_what_to_do_and_never_the_token(api, body, status, cure):
    asked = []

    def refuse(path, sent):
        asked.append(path)
        return status, {}, f'{{"message": "no, {TOKEN}"}}'.encode()

    api(refuse)
    with pytest.raises(LaunchableError) as caught:
        publish(body, "org-1")
    assert cure in str(caught.value) and str(status) in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert len(asked) == 1  # creating twice would make two


def test_a_slow_server_is_given_up_and_a_reader_asks_again(api, body):
    brev, slow = Brev(), []

    def say(path, sent):
        if path.startswith("/launchables/") and len(slow) < 2:
            slow.append(path)
            time.sleep(1.5)
        return brev(path, sent)

    api(say)
    assert publish(body, "org-1") == "env-1"
    assert len(slow) == 2

    def hang(path, sent):
        time.sleep(1.5)
        return 200, {}, b'{"id": "env-1"}'

    api(hang)
    with pytest.raises(LaunchableError, match="did not answer in time; look in the console"):
        publish(body, "org-1")


def test_a_truncated_answer_is_told(api, body):
    api(lambda path, sent: (200, {"Content-Length": "999"}, b'{"id": "env'))
    with pytest.raises(LaunchableError, match="broke off; look in the console"):
        publish(body, "org-1")
    api(lambda path, sent: (200, {}, b'{"id": "env'))
    with pytest.raises(LaunchableError, match="no JSON object, cut short perhaps"):
        publish(body, "org-1")
    api(lambda path, sent: (200, {}, b"{}"))
    with pytest.raises(LaunchableError, match="the API gave no id"):
        publish(body, "org-1")


def test_without_a_login_nothing_is_asked(api, body, tmp_path):
    brev = Brev()
    api(brev)
    (tmp_path / ".brev" / "credentials.json").unlink()
    with pytest.raises(LaunchableError, match="run `brev login`"):
        publish(body, "org-1")
    assert brev.asked == []


def run(*arguments, **env):
    command = [sys.executable, "-m", "scripts.launchable", *arguments]
    import os

    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ) | env
    )


def test_the_command(loopback, tmp_path):
    assert "is valid" in run("validate").stdout
    rendered = json.loads(run("render", "--repository", REPO).stdout)
    assert rendered == render(load(), REPO)
    compose = yaml.safe_load(run("compose", "--repository", REPO).stdout)
    assert list(compose["services"]) == ["recipe"]
    (tmp_path / ".brev").mkdir()
    (tmp_path / ".brev" / "credentials.json").write_text(json.dumps({"access_token": TOKEN}))
    env = {"HOME": str(tmp_path), "BREV_API_URL": loopback(Brev())}
    made = run("create", "--repository", REPO, "--org", "org-1", **env)
    assert "https://brev.nvidia.com/launchable/deploy?launchableID=env-1" in made.stdout
    assert clicks(rendered) in made.stdout
    assert TOKEN not in made.stdout + made.stderr
    missing = run("create", "--repository", REPO, **env)
    assert (missing.returncode, missing.stderr) == (1, "error: create needs --org\n")
