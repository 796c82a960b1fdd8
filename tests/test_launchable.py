"""The launchable is one that Brev takes, and the API's bad days end in one clear line."""

import base64
import json
import os
import re
import subprocess
import sys
import time
from email.utils import formatdate

import pytest
import yaml

from scripts.base import ROOT
from scripts.launchable import client, publishing
from scripts.launchable.console import by_hand
from scripts.launchable.definition import LaunchableError, load
from scripts.launchable.rendering import START_SCRIPT, render, repository

REPO = "https://github.com/someone/recipe"
TOKEN = "eyJ-secret-token"


@pytest.fixture
def values():
    return load()


@pytest.fixture
def body(values):
    return render(values, REPO)


def service(body):
    """The launchable's one service, as Compose reads it once the parameters are filled in."""
    compose = yaml.safe_load(body["buildRequest"]["dockerCompose"]["yamlString"])
    return compose["services"]["recipe"]


def as_compose(text, **parameters):
    """Docker Compose's own interpolation: ${NAME:-default}, and $$ for a dollar."""
    pattern = r"\$(?:(\$)|\{(\w+)(?::-([^}]*))?\})"
    return re.sub(pattern, lambda m: m[1] or parameters.get(m[2]) or m[3] or "", text)


def test_the_committed_launchable_is_valid_and_names_the_repository(body):
    text = json.dumps(body)
    assert "${REPOSITORY}" not in text and "${CONFIG}" not in text and "${START" not in text
    assert "fallbacks" not in body and "config" not in body
    assert body["file"]["url"] == f"{REPO}/raw/main/notebooks/llama3_dpo.ipynb"
    recipe = service(body)
    assert recipe["environment"]["REPOSITORY"] == REPO
    assert (ROOT / recipe["environment"]["DPO_CONFIG"]).is_file()  # the notebook starts with it
    parameters = {p["name"]: p["required"] for p in body["buildRequest"]["parameters"]}
    assert parameters == {"HF_TOKEN": True, "JUPYTER_TOKEN": False, "WANDB_API_KEY": False}


def test_the_notebooks_port_is_a_link_with_a_button_and_no_firewall_rule(body):
    assert body["createWorkspaceRequest"].get("firewallRules", []) == []
    (port,) = body["buildRequest"]["ports"]
    assert port["port"] == "8888" and port["labels"]["cta-enabled"] == "true"


def test_the_container_runs_the_start_script_word_for_word(body):
    kind, option, script = service(body)["command"]
    assert (kind, option) == ("bash", "-c")
    assert as_compose(script) == START_SCRIPT.read_text()


def test_parameters_reach_the_container_as_values_and_missing_ones_as_nothing(body):
    assert "environmentVariables" not in body["buildRequest"]["dockerCompose"]
    environment = service(body)["environment"]
    given = {name: as_compose(environment[name], HF_TOKEN="hf_1") for name in environment}
    assert given["HF_TOKEN"] == "hf_1"
    assert given["WANDB_API_KEY"] == given["JUPYTER_TOKEN"] == ""


def test_torch_comes_with_the_image_in_the_pinned_version(body):
    pin = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert service(body)["image"].startswith(f"pytorch/pytorch:{pin}-cuda12.")
    assert service(body)["environment"]["SYSTEM_TORCH"] == "1"


def test_a_repository_on_gitlab_has_its_own_file_addresses(values):
    url = render(values, "https://gitlab.com/a/b")["file"]["url"]
    assert url == "https://gitlab.com/a/b/-/raw/main/notebooks/llama3_dpo.ipynb"


def test_fallbacks_take_the_place_of_the_machine_with_its_disk_and_config(values):
    assert "a3-highgpu-1g:nvidia-h100-80gb:1" not in str(values)  # seems not to be offered
    for number, machine in enumerate(values["fallbacks"], start=1):
        body = render(values, REPO, number)
        workspace = body["createWorkspaceRequest"]
        assert workspace["instanceType"] == machine["instanceType"]
        assert workspace.get("storage") == machine.get("storage")  # a fixed disk takes none
        config = service(body)["environment"]["DPO_CONFIG"]
        assert config == machine.get("config", values["config"]) and (ROOT / config).is_file()
    for number in (9, -1):
        with pytest.raises(LaunchableError, match=rf"--instance {number}: there are 5 fallbacks"):
            render(values, REPO, number)


@pytest.mark.parametrize(
    "name",
    ["g5.xlarge", "p4d.24xlarge", "a100-80gb.1x", "gpu-h100-sxm.1gpu-16vcpu-200gb",
     "hyperstack_H100", "a2-highgpu-1g:nvidia-tesla-a100:1", "gpu_1x_a100_sxm4"],
)  # fmt: skip
def test_the_schema_knows_the_instance_types_that_brev_lists(values, name):
    values["createWorkspaceRequest"]["instanceType"] = name
    assert render(values, REPO)["createWorkspaceRequest"]["instanceType"] == name


def test_the_schema_has_the_fields_of_brevs_own_clients(values):
    values["viewAccess"] = "published"
    values["createWorkspaceRequest"] |= {
        "location": "us-central1", "subLocation": "a", "region": "us", "imageId": "i-1",
        "firewallRules": [{"port": "8000-8100", "allowedIPs": "user-ip", "clientIPs": ["1.2.3.4"]}],
    }  # fmt: skip
    values["buildRequest"]["dockerCompose"]["registries"] = [
        {"url": "nvcr.io", "username": "u", "password": "p"}
    ]
    assert render(values, REPO)["createWorkspaceRequest"]["imageId"] == "i-1"


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


def _rules(*rules):
    return _with("createWorkspaceRequest.firewallRules",
                 [{"port": port, "allowedIPs": who} for port, who in rules])  # fmt: skip


def _compose(text):
    return _with("buildRequest.dockerCompose.yamlString", text)


def _link(**values):
    return _with("buildRequest.ports", [{"name": "jupyter", "port": "8888"} | values])


VM = {"lifeCycleScriptAttr": {"script": "#!/bin/bash\n" + "x" * 16373}}
WRONG = [
    (_without("name"), "top level must contain ['name"),
    (_with("name", "Has Spaces"), "name must match pattern"),
    (_with("viewAccess", "everyone"), "viewAccess must be one of"),
    (_with("nmae", "x"), "must not contain {'nmae'}"),
    (_with("createWorkspaceRequest.storage", 100), "createWorkspaceRequest.storage must be string"),
    (_with("createWorkspaceRequest.storage", "100Gi"), "storage must match pattern"),
    (_with("createWorkspaceRequest.instanceType", "A100"), "instanceType must match pattern"),
    (_rules(("9000", "all")), "firewall rule 9000 is open to the world"),
    (_rules(("x", "user-ip")), "port must match pattern"),
    (_rules(("8888", "user-ip")), "firewall rule 8888 conflicts with port 8888 (jupyter)"),
    (_rules(("8000-9000", "user-ip")), "firewall rule 8000-9000 conflicts with port 8888"),
    (_rules(("9000-9010", "user-ip"), ("9005", "user-ip")), "9005 conflicts with firewall rule"),
    (_rules(("9010-9000", "user-ip")), "a range must rise"),
    (_link(port="8888-8889"), "port must match pattern"),
    (_link(name="Jupyter"), "name must match pattern"),
    (_link(labels={"cta-value": "Open"}), "cta-enabled"),
    (_with("buildRequest.ports", [{"name": "a", "port": "1"}, {"name": "a", "port": "2"}]),
     "ports: a stands twice"),
    (_with("buildRequest.ports", [{"name": n, "port": p, "labels": {"cta-enabled": "true"}}
                                  for n, p in (("a", "1"), ("b", "2"), ("c", "3"))]),
     "3 show as a button, 2 at most"),
    (_with("createWorkspaceRequest.cloudCredId", "c"), None),
    (_with("buildRequest.vmBuild", {"forceJupyterInstall": True}), "exactly one of vmBuild"),
    (_with("buildRequest", {}), "exactly one of vmBuild, containerBuild, dockerCompose, not none"),
    (_with("buildRequest", {"vmBuild": VM}), "the set-up script has 16,385 bytes, 16,384 at most"),
    (_with("buildRequest", {"vmBuild": {"lifeCycleScriptAttr": {"script": "echo hi"}}}),
     "must start with #!/bin/bash"),
    (_with("buildRequest", {"containerBuild": {"containerUrl": "not an image"}}), "names no image"),
    (_with("buildRequest.parameters", [{"name": "hf", "description": "x", "required": True}]),
     "name must match pattern"),
    (_with("buildRequest.parameters", [{"name": "OTHER", "description": "x", "required": True}]),
     "parameter OTHER is asked for but never used"),
    (_with("buildRequest.dockerCompose.environmentVariables", {"KEY": "${KEY}"}),
     "environmentVariables.KEY: ${KEY} would arrive as that text"),
    (_compose("no services"), "is no compose file"),
    (_compose("services: {a: {image: 'nvidia/cuda'}}"),
     "image 'nvidia/cuda' has no registry path and tag"),
    (_compose("services: {a: {image: 'a/b:latest'}}"), "pin 'a/b:latest' to a version"),
    (_compose("services: {a: {image: 'a/b:1'}}"), "no GPU is reserved"),
    (_compose("services: {a: {image: 'a/b:1', command: 'echo $HOME'}}"),
     "compose: $HOME is no parameter; write $$"),
    (_compose("services: {a: {image: 'a/b:1', command: 'echo $(date)'}}"), "is no parameter"),
    (_with("buildRequest.dockerCompose.fileUrl", "https://github.com/a/b/c.yaml"),
     "exactly one of yamlString and fileUrl"),
    (_with("file.url", "https://example.com/x.ipynb"), "is no public GitHub or GitLab file"),
    (_with("file.url", "${REPOSITORY}/tree/main/notebooks"), "is a folder"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(m)[:40] for _, m in WRONG])
def test_what_brev_would_refuse_is_said_beforehand(values, change, message):
    change(values)
    if message is None:
        assert render(values, REPO)
        message, group = "workspaceGroupId or cloudCredId, not both", "workspaceGroupId"
        values["createWorkspaceRequest"][group] = "g"
    with pytest.raises(LaunchableError) as caught:
        render(values, REPO)
    assert message in str(caught.value)


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


# --- The API, played by a server on loopback -----------------------------------------------------

LISTING = [
    {"type": "a2-ultragpu-1g:nvidia-a100-80gb:1", "workspace_groups": [{"id": "gcp-group"}],
     "supported_storage": [{"min_size": "10GiB", "max_size": "16TiB"}]},
    {"type": "hyperstack_A100_80G", "workspace_groups": [{"id": "shadeform-group"}],
     "supported_storage": [{"size": "97GiB"}]},
    {"type": "massedcompute_A100_sxm4_80G_DGX", "cloudCredId": "shadeform-1"},
    {"type": "hyperstack_H100"},
]  # fmt: skip


def answer(value, status=200):
    return status, {}, value if isinstance(value, bytes) else json.dumps(value).encode()


class Brev:
    """An API that keeps what it is given, in Brev's own spelling."""

    def __init__(self, listing=LISTING):
        self.kept, self.asked, self.listing, self.late, self.scripts = {}, [], listing, 0, {}

    def __call__(self, path, body):
        assert path.startswith("/api/")
        path = path.removeprefix("/api")
        self.asked.append(path)
        sent = json.loads(body) if body else None
        if path == "/instances/alltypesavailable/org-1":
            return answer({"allInstanceTypes": self.listing})
        if path == "/file-validation/docker-compose":
            return answer({})
        if path == "/organizations/org-1/v2/launchables":
            self.kept["env-1"] = self.as_kept(sent) | {"id": "env-1", "createdAt": "today"}
            return answer({"id": "env-1"})
        if path == "/organizations/org-1/v2/launchables/edit":
            self.kept[sent["id"]] = self.kept[sent["id"]] | self.as_kept(sent)
            return answer({})
        if path.startswith("/launchable/lifecycle-script?envId=env-1&scriptId="):
            return answer({"attrs": {"script": self.scripts[path.rpartition("=")[2]]}})
        name = path.removeprefix("/launchables/").removesuffix("/now")
        if name in self.kept and self.late == 0:
            return answer(self.kept[name])
        self.late -= 1
        return answer({"message": "not found"}, 404)

    def as_kept(self, sent):
        """`100` as `100Gi`, pages as raw files, scripts as ids, and nothing that is empty."""
        kept = json.loads(json.dumps(sent))
        workspace, build = kept["createWorkspaceRequest"], kept["buildRequest"]
        if "storage" in workspace:
            workspace["storage"] += "Gi"
        if "file" in kept:
            kept["file"]["url"] = kept["file"]["url"].replace("/blob/", "/raw/")
        if attr := build.get("vmBuild", {}).get("lifeCycleScriptAttr"):
            self.scripts["ls-1"] = attr.pop("script")
            attr["id"] = "ls-1"
        for parameter in build.get("parameters", []):
            if not parameter["required"]:
                del parameter["required"]
        build.get("dockerCompose", {}).pop("jupyterInstall", None)
        build.get("ports", []).reverse()
        return kept


@pytest.fixture
def api(loopback, monkeypatch, tmp_path):
    """A server in the API's place, and somebody logged in; `say` is asked (path, body)."""
    (tmp_path / ".brev").mkdir()
    (tmp_path / ".brev" / "credentials.json").write_text(json.dumps({"access_token": TOKEN}))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(client, "TIMEOUT", 1)
    monkeypatch.setattr(client, "DELAY", 0.01)

    def start(say, seen=None, suffix="/api"):
        monkeypatch.setenv("BREV_API_URL", loopback(say, seen) + suffix)

    return start


def publish(body, existing=None):
    return publishing.publish(body, "org-1", TOKEN, existing)


@pytest.mark.parametrize("suffix", ["/api", "", "/api/", "/"])
def test_create_and_update_are_read_back_as_brev_keeps_them(api, body, suffix):
    brev = Brev()
    api(brev, suffix=suffix)
    assert publish(body) == publishing.Published("env-1", [])
    assert brev.kept["env-1"]["viewAccess"] == "public"
    changed = body | {"description": "Another description.", "viewAccess": "x"}
    assert publish(changed, "env-1") == publishing.Published("env-1", [])
    assert brev.kept["env-1"]["description"] == "Another description."
    assert brev.kept["env-1"]["viewAccess"] == "public"  # an edit does not touch it
    assert brev.asked.count("/launchables/env-1/now") == 2


def test_a_set_up_script_is_read_back_by_its_id(api, values):
    brev = Brev()
    api(brev)
    attr = {"name": "setup", "script": "#!/bin/bash\necho hello\n"}
    values["buildRequest"] = {"vmBuild": {"lifeCycleScriptAttr": attr}}
    assert publish(render(values, REPO)).remarks == []
    brev.scripts["ls-1"] = "#!/bin/bash\necho other\n"
    kept = publishing.read_back("env-1", TOKEN)
    assert kept["buildRequest"]["vmBuild"]["lifeCycleScriptAttr"]["script"].endswith("other\n")


def test_what_was_just_made_may_not_show_at_once(api, body):
    brev = Brev()
    brev.late = 2
    api(brev)
    assert publish(body).remarks == []
    assert brev.asked.count("/launchables/env-1/now") == 3


def test_what_was_made_and_cannot_be_read_is_no_failure(api, body):
    brev = Brev()
    brev.late = 99
    api(brev)
    published = publish(body)
    assert published.id == "env-1"
    assert published.remarks[0].startswith("saved, but not read back")


def test_what_was_saved_otherwise_is_noticed(api, body):
    brev = Brev()

    def forgetful(path, sent):
        result = brev(path, sent)
        if "env-1" in brev.kept:
            brev.kept["env-1"]["createWorkspaceRequest"]["storage"] = "10Gi"
        return result

    api(forgetful)
    message = r"env-1 exists, but .*: createWorkspaceRequest\.storage is '10'"
    with pytest.raises(LaunchableError, match=message):
        publish(body)


def test_differences_minds_what_was_asked_for_only():
    differences = publishing.differences
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2, "c": 3}], "d": 4}) == []
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["a[1].b is '3'"]
    assert differences({"a": [1]}, {"a": []}) == ["a is '[]'"]
    assert differences({"a": False, "b": [], "c": ""}, {}) == []
    assert differences({"a": True}, {}) == ["a is 'None'"]


def test_the_compose_file_is_checked_before_anything_is_made(api, body):
    asked = []

    def refuse(path, sent):
        asked.append(path)
        return answer({"message": "services.recipe.init must be a boolean"}, 400)

    api(refuse)
    with pytest.raises(LaunchableError, match=r"400 .*init must be a boolean"):
        publish(body)
    assert asked == ["/api/file-validation/docker-compose"]

    brev = Brev()
    api(lambda path, sent: answer({}, 404) if "validation" in path else brev(path, sent))
    assert publish(body).id == "env-1"  # an API without this check


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "the request is at fault, not the server"),
        (401, "`brev ls` renews it"),
        (403, "run `brev ls`, then check --org"),
        (404, "check the id and --org"),
        (409, "change `name`, or use `update --id env-…`"),
        (422, "the request is at fault"),
        (500, "it may have been made all the same"),
        (502, "it may have been made all the same"),
        (503, "try again later"),
    ],
)
def test_refusals_say_what_to_do_and_never_the_token(api, body, status, advice):
    asked = []

    def refuse(path, sent):
        if "validation" in path:
            return answer({})
        asked.append(path)
        return answer({"message": f"no, {TOKEN}"}, status)

    api(refuse)
    with pytest.raises(LaunchableError) as caught:
        publish(body)
    message = str(caught.value)
    assert advice in message and str(status) in message
    assert TOKEN not in message
    assert ("server's fault" in message) == (status >= 500)
    assert ("may have been made" in message) == (status >= 500)
    assert len(asked) == 1  # creating twice would make two


def test_a_slow_server_is_given_up_and_a_reader_asks_again(api, body):
    brev, slow = Brev(), []

    def say(path, sent):
        if path.startswith("/api/launchables/") and len(slow) < 2:
            slow.append(path)
            time.sleep(1.5)
        return brev(path, sent)

    api(say)
    assert publish(body).remarks == []
    assert len(slow) == 2

    def hang(path, sent):
        if "validation" not in path:
            time.sleep(1.5)
        return answer({"id": "env-1"})

    api(hang)
    with pytest.raises(LaunchableError, match=r"did not answer in time\nit may have been made"):
        publish(body)


@pytest.mark.parametrize(
    ("headers", "text", "message"),
    [
        ({"Content-Length": "999"}, b'{"id": "env', r"broke off\nit may have been made"),
        ({}, b'{"id": "env', r"cut short\?\nit may have been made"),
        ({}, b"{}", r"gave no id\nit may have been made"),
    ],
)
def test_a_truncated_answer_is_said_to_be_one(api, body, headers, text, message):
    def say(path, sent):
        return answer({}) if "validation" in path else (200, headers, text)

    api(say)
    with pytest.raises(LaunchableError, match=message):
        publish(body)


@pytest.mark.parametrize("busy", ["/organizations", "/launchables/"])
def test_a_rate_limit_is_waited_for_when_making_and_when_reading(api, body, capsys, busy):
    brev, refused = Brev(), []

    def say(path, sent):
        if path.startswith(f"/api{busy}") and len(refused) < 2:
            refused.append(path)
            return 429, {"Retry-After": "0"}, b"slow down"
        return brev(path, sent)

    api(say)
    assert publish(body) == publishing.Published("env-1", [])
    assert len(refused) == 2
    assert brev.asked.count("/organizations/org-1/v2/launchables") == 1  # made once
    assert capsys.readouterr().err.count("rate limited: trying again in") == 2


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(api, body):
    brev, times = Brev(), []

    def say(path, sent):
        if "validation" in path:
            times.append(time.monotonic())
            if len(times) == 1:
                return 429, {"Retry-After": "1"}, b""
        return brev(path, sent)

    api(say)
    publish(body)
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize(
    ("header", "back", "asked"),
    [
        ("600", "come back in 600 s", 1),  # longer than it waits
        ("in two hours", r"come back in 7[12]\d\d s", 1),  # told as a date
        ("soon", "come back in a few minutes", 4),
        ("-5", "come back in a few minutes", 4),
        (None, "come back in a few minutes", 4),
    ],
)
def test_a_rate_limit_that_lasts_is_told_as_one(api, body, header, back, asked):
    seen = []
    if header == "in two hours":
        header = formatdate(time.time() + 7200, usegmt=True)

    def say(path, sent):
        if "validation" in path:
            return answer({})
        seen.append(path)
        return 429, {"Retry-After": header} if header else {}, b'{"message": "slow down"}'

    api(say)
    with pytest.raises(LaunchableError, match=f"429 .*slow down.*\nrate limited.*{back}") as caught:
        publish(body)
    assert "at fault" not in str(caught.value) and "may have been made" not in str(caught.value)
    assert len(seen) == asked


@pytest.mark.parametrize("url", ["brev.example.com", "localhost:8080", "http://", "https://h:x",
                                 "ftp://h", "http://[::1"])  # fmt: skip
@pytest.mark.parametrize("variable", ["BREV_API_URL", "BREV_PUBLIC_API_URL"])
def test_an_address_that_is_none_is_said_to_be_one(api, monkeypatch, url, variable):
    api(lambda path, sent: answer({}, 404))  # so that the other listing is asked, too
    monkeypatch.setenv(variable, url)
    with pytest.raises(LaunchableError) as caught:
        publishing.instance_types("org-1", TOKEN)
    assert f"{variable}={url!r} is no address: write https://HOST" in str(caught.value)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_address_is_none_given(monkeypatch, empty):
    monkeypatch.setenv("BREV_API_URL", empty)
    assert client.api_url() == f"{client.API}/api"


@pytest.mark.parametrize("text", [b"", b"OK", b"[]"])
def test_success_without_an_answer_is_success_where_nothing_is_read_of_it(api, body, text):
    brev = Brev()

    def say(path, sent):
        result = brev(path, sent)
        return (200, {}, text) if "validation" in path or "/edit" in path else result

    api(say)
    assert publish(body) == publishing.Published("env-1", [])
    changed = body | {"description": "Another description."}
    assert publish(changed, "env-1") == publishing.Published("env-1", [])


# --- Who is logged in, and who provides the machine ----------------------------------------------


def save_login(home, file="credentials.json", **values):
    (home / ".brev" / file).write_text(json.dumps(values))


def jwt(expiry):
    claims = base64.urlsafe_b64encode(json.dumps({"exp": expiry}).encode()).decode()
    return f"header.{claims.rstrip('=')}.signature"


def test_without_a_login_nothing_is_asked(api, tmp_path):
    (tmp_path / ".brev" / "credentials.json").unlink()
    with pytest.raises(LaunchableError, match="run `brev login`"):
        client.login()
    save_login(tmp_path, access_token="", refresh_token="x")
    with pytest.raises(LaunchableError, match="run `brev login`"):
        client.login()


@pytest.mark.parametrize("token", [jwt(time.time() - 5), "auto-login"], ids=["past", "auto-login"])
def test_an_expired_login_is_noticed_before_anything_is_asked(api, tmp_path, token):
    save_login(tmp_path, access_token=token)
    with pytest.raises(LaunchableError, match=r"expired: `brev ls` renews it, `brev login`"):
        client.login()


def test_a_fresh_login_and_its_organization(api, tmp_path):
    token = jwt(time.time() + 60)
    save_login(tmp_path, access_token=token)
    assert client.login() == client.Login(token, None)
    save_login(tmp_path, "active_org.json", id="org-9", name="mine")
    assert client.login() == client.Login(token, "org-9")


def test_an_api_key_is_sent_as_the_login(api, body, tmp_path):
    save_login(tmp_path, access_token="", api_key=" bak-secret ", api_key_org_id="org-1")
    assert client.login() == client.Login("bak-secret", "org-1")
    seen = []
    api(Brev(), seen)
    publishing.publish(body, "org-1", client.login().token)
    assert len(seen) == 3
    assert {headers["Authorization"] for headers in seen} == {"Bearer bak-secret"}


def placed(name, **more):
    workspace = {"instanceType": name, "storage": "100"} | more
    return publishing.place(workspace, "org-1", TOKEN), workspace


def test_the_provider_is_looked_up_for_the_instance_type(api):
    api(Brev())
    _, workspace = placed("a2-ultragpu-1g:nvidia-a100-80gb:1")
    assert (workspace["workspaceGroupId"], workspace["storage"]) == ("gcp-group", "100")
    _, workspace = placed("massedcompute_A100_sxm4_80G_DGX")
    assert workspace["cloudCredId"] == "shadeform-1" and "workspaceGroupId" not in workspace
    _, workspace = placed("hyperstack_A100_80G", cloudCredId="mine")
    assert workspace["cloudCredId"] == "mine" and "workspaceGroupId" not in workspace
    with pytest.raises(LaunchableError, match="give --workspace-group or --cloud-cred"):
        placed("hyperstack_H100")
    with pytest.raises(LaunchableError, match="is not offered to org-1 now"):
        placed("g5.xlarge")


def test_fixed_disks_take_no_size_and_others_one_within_bounds(api):
    api(Brev())
    remarks, workspace = placed("hyperstack_A100_80G")
    assert "storage" not in workspace
    assert remarks == ["hyperstack_A100_80G has a fixed disk (97GiB): the 100 GiB are left out"]
    flexible = "a2-ultragpu-1g:nvidia-a100-80gb:1"
    with pytest.raises(LaunchableError, match="takes 10 to 16384 GiB of disk, not 5"):
        placed(flexible, storage="5")
    assert placed(flexible, storage=None)[1]["storage"] == "100"


def test_sizes_that_cannot_be_read_leave_the_disk_as_it_is(api):
    name = "a2-ultragpu-1g:nvidia-a100-80gb:1"
    for disk in ({"min_size": 10, "max_size": 16384}, {"maxSize": {"value": 1}}, {"max_size": "?"},
                 {"min_size": "1.2.3GiB", "max_size": "1.2.3GiB"}):  # fmt: skip
        listing = [{"type": name, "workspace_groups": [{"id": "g"}], "supported_storage": [disk]}]
        api(Brev(listing))
        (remark,), workspace = placed(name)
        assert f"the disk of {name} was not checked: its largest size is listed as" in remark
        assert workspace["storage"] == "100"


@pytest.mark.parametrize("groups", [[{}], [{"name": "x"}, None, "g"], "g", 7, {"id": "g"}])
def test_a_provider_without_an_id_is_asked_for(api, groups):
    disks = ["97GiB", None]  # no mapping either
    api(Brev([None, {"type": "g5.xlarge", "workspace_groups": groups, "supported_storage": disks}]))
    with pytest.raises(LaunchableError, match="give --workspace-group or --cloud-cred"):
        placed("g5.xlarge")
    assert placed("g5.xlarge", workspaceGroupId="mine")[1]["workspaceGroupId"] == "mine"


@pytest.mark.parametrize("kept", [{"createWorkspaceRequest": "x", "buildRequest": "y"},
                                  {"buildRequest": {"ports": [1, None], "vmBuild": "z"}},
                                  {"buildRequest": {"dockerCompose": {"fileUrl": 5}}}])  # fmt: skip
def test_what_is_kept_in_another_shape_is_a_difference(api, body, kept):
    brev = Brev()

    def say(path, sent):
        result = brev(path, sent)
        return answer(kept) if path.startswith("/api/launchables/") else result

    api(say)
    with pytest.raises(LaunchableError, match="env-1 exists, but was saved otherwise than sent"):
        publish(body)


def test_the_newer_listing_is_read_where_the_older_is_gone(api, loopback, monkeypatch):
    asked = []

    def catalog(path, sent):
        asked.append((path, json.loads(sent)["organizationId"]))
        item = {"type": "hyperstack_A100_80G", "cloudCredId": "cc-1"}
        return answer({"items": [item]})

    api(lambda path, sent: answer({}, 404))
    monkeypatch.setenv("BREV_PUBLIC_API_URL", loopback(catalog))
    assert placed("hyperstack_A100_80G")[1]["cloudCredId"] == "cc-1"
    assert asked == [(publishing.CATALOG, "org-1")]


# --- The command -------------------------------------------------------------------------------


def run(*arguments, **env):
    command = [sys.executable, "-m", "scripts.launchable", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ) | env
    )


@pytest.fixture
def logged_in(tmp_path, loopback):
    """Makes the environment of somebody logged in to an API; `seen` takes the headers."""

    def make(say, seen=None):
        (tmp_path / ".brev").mkdir(exist_ok=True)
        save_login(tmp_path, access_token=TOKEN)
        return {"HOME": str(tmp_path), "BREV_API_URL": loopback(say, seen)}

    return make


def test_validate_render_and_compose():
    assert "is valid" in run("validate").stdout
    rendered = json.loads(run("render", "--repository", REPO).stdout)
    assert rendered == render(load(), REPO)
    compose = yaml.safe_load(run("compose", "--repository", REPO).stdout)
    assert list(compose["services"]) == ["recipe"]
    assert by_hand(rendered) in run("show", "--repository", REPO).stdout


def test_validate_loads_no_heavy_library():
    code = (
        "import runpy, sys; sys.argv[1:] = ['validate']\n"
        "runpy.run_module('scripts.launchable', run_name='__main__')\n"
        "print([m for m in ('torch', 'transformers', 'requests', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")


def test_create_says_how_to_deploy_with_the_parameters(logged_in):
    brev = Brev()
    env = logged_in(brev)
    made = run("create", "--repository", REPO, "--org", "org-1", **env)
    assert made.stderr == "" and "env-1 is saved in org-1, as it was sent" in made.stdout
    link = "https://brev.nvidia.com/launchable/deploy?launchableID=env-1"
    assert f"deploy:  {link}\n" in made.stdout and f"nv-lb-dark.svg)]({link})" in made.stdout
    assert 'brev launch env-1 --param HF_TOKEN="$HF_TOKEN" [--param JUPYTER_TOKEN=' in made.stdout
    assert TOKEN not in made.stdout + made.stderr
    workspace = brev.kept["env-1"]["createWorkspaceRequest"]
    assert workspace["workspaceGroupId"] == "gcp-group"


def test_a_fallback_is_created_with_its_provider_and_disk(logged_in):
    brev = Brev()
    env = logged_in(brev)
    made = run("create", "--repository", REPO, "--org", "org-1", "--instance", "1", **env)
    assert made.returncode == 0, made.stderr
    workspace = brev.kept["env-1"]["createWorkspaceRequest"]
    assert workspace["workspaceGroupId"] == "shadeform-group" and "storage" not in workspace


@pytest.mark.parametrize("option", ["--workspace-group", "--cloud-cred"])
def test_a_provider_that_is_given_is_kept_and_the_disk_looked_up_all_the_same(logged_in, option):
    brev = Brev()
    fixed = [{"type": "a2-ultragpu-1g:nvidia-a100-80gb:1", "cloudCredId": "theirs",
              "supported_storage": [{"size": "97GiB"}]}]  # fmt: skip
    brev.listing = fixed
    env = logged_in(brev)
    made = run("create", "--repository", REPO, "--org", "org-1", option, "mine", **env)
    assert made.returncode == 0, made.stderr
    assert "has a fixed disk (97GiB): the 100 GiB are left out" in made.stdout
    workspace = brev.kept["env-1"]["createWorkspaceRequest"]
    key = {"--workspace-group": "workspaceGroupId", "--cloud-cred": "cloudCredId"}[option]
    assert workspace[key] == "mine" and "storage" not in workspace
    assert len({"workspaceGroupId", "cloudCredId"} & set(workspace)) == 1


def test_a_provider_that_is_given_goes_without_a_listing(logged_in):
    brev = Brev([])
    env = logged_in(brev)
    options = ("--org", "org-1", "--workspace-group", "mine")
    made = run("create", "--repository", REPO, *options, **env)
    assert made.returncode == 0, made.stderr
    assert "was not checked: a2-ultragpu-1g:nvidia-a100-80gb:1 is not offered" in made.stdout
    assert brev.kept["env-1"]["createWorkspaceRequest"]["storage"] == "100Gi"


def test_what_is_missing_is_asked_for(logged_in):
    env = logged_in(Brev())
    missing = run("create", "--repository", REPO, **env)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("error: create needs --org org-…: `brev ls orgs`")
    missing = run("update", "--repository", REPO, "--org", "org-1", **env)
    assert missing.stderr == "error: update needs --id\n"


def test_show_sends_the_login_where_there_is_one(logged_in, tmp_path):
    brev, seen = Brev(), []
    brev.kept["env-1"] = {"id": "env-1", "name": "n"}
    env = logged_in(brev, seen)
    assert json.loads(run("show", "--id", "env-1", **env).stdout)["name"] == "n"
    (tmp_path / ".brev" / "credentials.json").unlink()
    assert json.loads(run("show", "--id", "env-1", **env).stdout)["name"] == "n"
    assert [headers.get("Authorization") for headers in seen] == [f"Bearer {TOKEN}", None]
