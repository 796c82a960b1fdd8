"""The container's start, run for real: clone, set up, show the log, hand the port to JupyterLab.

What it would fetch comes from stand-ins: apt-get, dpkg, gcc and nvidia-smi on PATH, a git
repository on disk. The command is the one in brev-launchable.yaml.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from urllib.error import URLError

import pytest
import yaml

from scripts.base import ROOT

START_SCRIPT = ROOT / "scripts" / "start.sh"
SERVICE = yaml.safe_load((ROOT / "brev-launchable.yaml").read_text())["services"]["recipe"]
PASSWORD = "my-own-password"

JUPYTER = """#!{python}
import http.server, os, sys
print("token:", os.environ["JUPYTER_TOKEN"], "arguments:", *sys.argv[1:], flush=True)
print("folder:", os.getcwd(), "HF_TOKEN" in os.environ, "WANDB_API_KEY" in os.environ, flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the notebook")
http.server.HTTPServer(("", port), Answer).serve_forever()
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def recipe(tmp_path):
    """A repository on disk; `setup` is its set-up script."""

    def make(setup, **files):
        folder = tmp_path / "origin"
        executable(folder / "scripts" / "setup.sh", setup)
        executable(folder / "scripts" / "start.sh", START_SCRIPT.read_text())
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        git = ["git", "-c", "user.name=n", "-c", "user.email=e@e", "-C", str(folder)]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "recipe"], check=True)
        return f"file://{folder}"

    return make


class Container:
    """The Compose file's command in a folder of its own, as the container runs it."""

    def __init__(self, folder, repository, **env):
        self.workspace = folder / "workspace"
        self.workspace.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        log = f'echo "$(basename "$0") $*" >>{folder}/called\n'
        stubs = folder / "stubs"
        for name, status in (("apt-get", 0), ("dpkg", 1), ("gcc", 0), ("nvidia-smi", 9)):
            if not (stubs / name).exists():
                executable(stubs / name, f"#!/bin/bash\n{log}exit {status}\n")
        path = f"{stubs}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        self.log, self.called = folder / "container.log", folder / "called"
        command = [part.replace("$$", "$") for part in SERVICE["command"]]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=self.workspace,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={"PATH": path, "HOME": str(folder), "PORT": str(self.port), "RETRY": "0",
                     "REPOSITORY": repository, "JUPYTER_TOKEN": PASSWORD} | env,
            )  # fmt: skip

    def wait_for_log(self, text):
        for _ in range(400):
            if text in self.log.read_text():
                return self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"{text!r} not in the log:\n{self.log.read_text()}")

    def get(self, path="/"):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
            return answer.headers, answer.read().decode()

    def wait_for(self, text, path="/"):
        """The page, once it has this text; the port may be between two owners meanwhile."""
        page = ""
        for _ in range(400):
            try:
                page = self.get(path)[1]
            except (URLError, OSError):
                page = ""
            if text in page:
                return page
            time.sleep(0.05)
        raise AssertionError(f"{text!r} not served; last {page!r}; log:\n{self.log.read_text()}")

    def stop(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    containers = []

    def run(repository, **env):
        containers.append(Container(tmp_path, repository, **env))
        return containers[-1]

    yield run
    for container in containers:
        container.stop()


def good_setup(before=""):
    jupyter = JUPYTER.format(python=sys.executable)
    return (
        f"#!/bin/bash\nset -e\ncd \"$(dirname \"$0\")/..\"\n{before}\nmkdir -p .venv/bin\n"
        f"cat >.venv/bin/jupyter <<'JUPYTER'\n{jupyter}JUPYTER\nchmod +x .venv/bin/jupyter\n"
        'echo "setup: installed"\n'
    )  # fmt: skip


def test_the_log_is_shown_until_jupyterlab_has_the_port(tmp_path, recipe, start):
    go = tmp_path / "go"
    setup = good_setup(f'echo "Collecting trl <2"; while [ ! -e {go} ]; do sleep 0.05; done')
    container = start(recipe(setup))
    page = container.wait_for("Collecting trl &lt;2", "/lab/tree/any.ipynb")
    assert "installing a compiler" in page and "<button>" not in page
    assert container.get()[0]["X-Setup"] == "running"
    go.touch()
    assert container.wait_for("the notebook") == "the notebook"
    log = container.log.read_text()
    assert f"--ip 0.0.0.0 --port {container.port} --ServerApp.port_retries=0" in log
    assert f"folder: {container.workspace}/recipe" in log
    called = container.called.read_text()
    assert re.search(r"apt-get install .* gcc libc6-dev python3-dev python3-venv\n", called)


@pytest.mark.parametrize("given", ["short", "${JUPYTER_TOKEN}"])  # the last: nobody filled it in
def test_without_a_password_no_port_is_opened(recipe, start, given):
    container = start(recipe(good_setup()), JUPYTER_TOKEN=given)
    log = container.wait_for_log("JUPYTER_TOKEN must have 8 characters or more")
    assert "installing" not in log
    with pytest.raises(URLError):
        container.get()
    assert container.process.poll() is None  # or Docker would start it again and again


def test_the_password_opens_jupyterlab_and_is_not_printed(recipe, start):
    given = {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "", "DPO_CONFIG": "configs/mine.yaml"}
    container = start(recipe(good_setup()), **given)
    container.wait_for("the notebook")
    log = container.log.read_text()
    assert f"token: {PASSWORD} arguments" in log  # the stand-in for JupyterLab prints it
    assert log.count(PASSWORD) == 1
    assert "recipe True False" in log  # what was not given is no variable
    assert "uses configs/mine.yaml (" in log


def test_a_failed_set_up_is_tried_three_times_then_at_the_press_of_a_button(
    tmp_path, recipe, start
):
    fails = f"echo x >>{tmp_path}/tries; [ -e {tmp_path}/mended ] || {{ echo no network; exit 1; }}"
    container = start(recipe(good_setup(fails)))
    page = container.wait_for("<button>Try again</button>", "/lab")
    assert page.count("no network") == 3 and "FAILED three times" in page
    assert "no network" in container.log.read_text()  # `docker logs` has it too
    assert (tmp_path / "tries").read_text().count("x") == 3
    (tmp_path / "mended").touch()
    assert container.process.poll() is None
    urllib.request.urlopen(f"http://127.0.0.1:{container.port}/", data=b"", timeout=5).close()
    container.wait_for("the notebook")
    assert (tmp_path / "tries").read_text().count("x") == 4


def test_secrets_do_not_show_in_the_log(recipe, start):
    setup = '#!/bin/bash\necho "token $HF_TOKEN and $JUPYTER_TOKEN"; exit 1\n'
    container = start(recipe(setup), HF_TOKEN="hf_secret")
    page = container.wait_for("FAILED")
    assert "token *** and ***" in page and "hf_secret" not in page and PASSWORD not in page


def test_a_failing_apt_is_a_failure(tmp_path, recipe, start):
    executable(tmp_path / "stubs" / "apt-get", "#!/bin/bash\necho 'E: no network'; exit 100\n")
    container = start(recipe(good_setup()))
    assert "E: no network" in container.wait_for("FAILED")


def test_a_clone_that_fails_ends_the_container_so_that_docker_tries_again(tmp_path, start):
    container = start(f"file://{tmp_path}/nowhere")
    assert container.process.wait(timeout=20) != 0
    assert "nowhere" in container.log.read_text()
    assert SERVICE["restart"] == "unless-stopped"


def test_a_restart_installs_and_clones_nothing_twice(tmp_path, recipe, start):
    executable(tmp_path / "stubs" / "dpkg", "#!/bin/bash\nexit 0\n")
    repository = recipe(good_setup())
    (tmp_path / "workspace" / "recipe.part").mkdir(parents=True)  # a clone that was cut short
    first = start(repository)
    first.wait_for("the notebook")
    first.stop()
    mark = first.workspace / "recipe" / "my-change"
    mark.touch()
    second = start(repository)
    second.wait_for("the notebook")
    assert mark.exists() and "Cloning" not in second.log.read_text()
    assert "apt-get" not in second.called.read_text()  # everything was there


@pytest.mark.parametrize(
    ("memory", "config"),
    [
        ("81920", "llama3-8b-a100-short"),
        ("40960", "llama3-8b-a100-40gb-short"),
        ("23034", "llama3-8b-24gb"),
        ("15360", "smollm2-135m-cpu"),
        (None, "smollm2-135m-cpu"),
    ],
)
def test_the_config_fits_the_gpu(tmp_path, recipe, start, memory, config):
    assert (ROOT / "configs" / f"{config}.yaml").is_file()
    if memory:
        executable(tmp_path / "stubs" / "nvidia-smi", f"#!/bin/bash\necho '{memory}'\n")
    container = start(recipe(good_setup()))
    assert f"the notebook uses configs/{config}.yaml" in container.wait_for_log("starting")


@pytest.mark.parametrize("name", ["start", "setup", "run", "test", "refresh"])
def test_the_shell_scripts_are_well_formed(name):
    path = ROOT / "scripts" / f"{name}.sh"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
