"""The container's start script, run for real: set up, show the log, hand the port to JupyterLab.

What it would fetch comes from stand-ins: apt-get, dpkg and gcc on PATH, a git repository on disk.
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

from scripts.base import ROOT
from scripts.launchable.rendering import START_SCRIPT

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
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        git = ["git", "-c", "user.name=n", "-c", "user.email=e@e", "-C", str(folder)]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "recipe"], check=True)
        return f"file://{folder}"

    return make


class Container:
    """The start script in a folder of its own, as the container runs it."""

    def __init__(self, folder, repository, **env):
        self.workspace = folder / "workspace"
        self.workspace.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        log = f'echo "$(basename "$0") $*" >>{folder}/called\n'
        stubs = folder / "stubs"
        for name, status in (("apt-get", 0), ("dpkg", 1), ("gcc", 0)):
            if not (stubs / name).exists():
                executable(stubs / name, f"#!/bin/bash\n{log}exit {status}\n")
        path = f"{stubs}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        self.log, self.called = folder / "container.log", folder / "called"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                ["bash", "-c", START_SCRIPT.read_text()],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={"PATH": path, "HOME": str(folder), "WORKSPACE": str(self.workspace),
                     "PORT": str(self.port), "REPOSITORY": repository} | env,
            )  # fmt: skip

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
    assert "cloning file://" in page and "installing git, a compiler" in page
    assert container.get()[0]["X-Setup"] == "running"
    go.touch()
    assert container.wait_for("the notebook") == "the notebook"
    log = container.log.read_text()
    assert f"--ip 0.0.0.0 --port {container.port}" in log
    assert f"folder: {container.workspace}/recipe" in log
    called = container.called.read_text()
    assert re.search(r"apt-get install .* git gcc libc6-dev python3-dev python3-venv\n", called)


def test_without_a_token_one_is_made_up_printed_and_kept(tmp_path, recipe, start):
    repository = recipe(good_setup())
    tokens = set()
    for given in ("", "${JUPYTER_TOKEN}"):  # the second: a placeholder that nobody filled in
        container = start(repository, JUPYTER_TOKEN=given, HF_TOKEN="hf_1", WANDB_API_KEY="")
        container.wait_for("the notebook")
        log = container.log.read_text()
        asked = re.search(r"JupyterLab asks for this token: (\w{48})\n", log)[1]
        assert f"token: {asked} arguments" in log  # what JupyterLab was started with
        assert "recipe True False" in log  # what was not given is no variable
        assert asked not in (container.workspace / "setup.log").read_text()
        tokens.add(asked)
        container.stop()
    assert len(tokens) == 1
    assert (container.workspace / ".jupyter-token").stat().st_mode & 0o077 == 0


def test_a_token_that_was_chosen_opens_it_and_is_not_printed(recipe, start):
    container = start(recipe(good_setup()), JUPYTER_TOKEN="my-own")
    container.wait_for("the notebook")
    log = container.log.read_text()
    assert "token: my-own arguments" in log and "asks for this token" not in log


def test_a_failure_stays_readable_and_the_container_stays_up(tmp_path, recipe, start):
    setup = (ROOT / "scripts" / "setup.sh").read_text()  # the real one, and the real pip
    repository = recipe(
        setup,
        requirements_txt="no-such-package-of-this-recipe==1\n",
        requirements_lock="six==1.17.0\n",
    )
    container = start(repository, PIP_NO_INDEX="1", SYSTEM_TORCH="1", HF_TOKEN="hf_secret")
    page = container.wait_for("FAILED: the reason stands above")
    assert "No matching distribution found for no-such-package-of-this-recipe" in page
    assert "FAILED" in container.wait_for("FAILED", "/lab")
    assert container.process.poll() is None  # nothing for Docker to restart
    assert "No matching distribution" in container.log.read_text()  # `docker logs` has it too


def test_secrets_do_not_show_in_the_log(recipe, start):
    setup = '#!/bin/bash\necho "token $HF_TOKEN and $JUPYTER_TOKEN"; exit 1\n'
    container = start(recipe(setup), HF_TOKEN="hf_secret", JUPYTER_TOKEN="my-own")
    page = container.wait_for("FAILED")
    assert "token *** and ***" in page and "hf_secret" not in page and "my-own" not in page


def test_a_failing_apt_is_a_failure(tmp_path, recipe, start):
    executable(tmp_path / "stubs" / "apt-get", "#!/bin/bash\necho 'E: no network'; exit 100\n")
    container = start(recipe(good_setup()))
    assert "E: no network" in container.wait_for("FAILED")
    assert not (container.workspace / "recipe").exists()


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
    assert mark.exists() and "cloning" not in second.log.read_text()
    assert not second.called.exists()  # apt-get was never asked: everything was there


def test_shellcheck_finds_nothing():
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(START_SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_script_is_well_formed():
    assert subprocess.run(["bash", "-n", str(START_SCRIPT)]).returncode == 0
