#!/usr/bin/env bash
# What the launchable's container runs: set up, then JupyterLab. While set-up goes on, its log is
# shown at the notebook's port; when it fails, the log stays there and the container stays up, for
# a restart that fails the same way tells nobody anything. `docker restart` tries again.
#
# brev-launchable.yaml holds this text. Needs bash, python3 and, where a compiler is missing, apt.
#   REPOSITORY      what to clone
#   JUPYTER_TOKEN   opens JupyterLab; left empty, one is made up, kept, and printed
#   WORKSPACE PORT  other than /workspace and 8888, for tests
set -u
workspace="${WORKSPACE:-/workspace}"
port="${PORT:-8888}"
log="$workspace/setup.log"
cd "$workspace" || exit 1

# A parameter that nobody gave is no value, also where it arrives as the text of its placeholder.
for name in HF_TOKEN WANDB_API_KEY JUPYTER_TOKEN; do
  # shellcheck disable=SC2016
  case "${!name:-}" in '' | '${'*) unset "$name" ;; *) export "${name?}" ;; esac
done

say() { echo "$(date -u +%H:%M:%S) $*"; }

show_log() { # serve the log at the port, on every path, without secrets
  python3 - "$port" "$log" <<'PYTHON' &
import html, http.server, os, sys

names = ("HF_TOKEN", "WANDB_API_KEY", "JUPYTER_TOKEN")
secrets = [os.environ[name] for name in names if os.environ.get(name)]
page = """<!doctype html><meta charset="utf-8"><title>Setting up</title>
<h1>Setting up</h1><p>JupyterLab takes the place of this page when it is ready.</p>
<pre id="log">LOG</pre><script>
setInterval(async () => {
  try {
    const answer = await fetch(location.href), text = await answer.text()
    if (!answer.headers.get("X-Setup")) return answer.ok && location.reload()
    const page = new DOMParser().parseFromString(text, "text/html")
    document.getElementById("log").textContent = page.getElementById("log").textContent
  } catch (error) {}
}, 3000)
</script>"""

class Log(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with open(sys.argv[2], errors="replace") as file:
            text = file.read()
        for secret in secrets:  # before the cut, which could leave a piece of one
            text = text.replace(secret, "***")
        body = page.replace("LOG", html.escape(text[-100_000:]), 1).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Setup", "running")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Log).serve_forever()
PYTHON
  server=$!
}

install() { # each step only where it is not done already, so that a restart is quick
  set -e
  # Triton compiles a C stub when a kernel is first launched: a compiler, libc and Python.h.
  if ! { command -v git && command -v gcc && dpkg -s libc6-dev python3-dev python3-venv; } \
    >/dev/null 2>&1; then
    say "installing git, a compiler and Python's headers"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends \
      ca-certificates git gcc libc6-dev python3-dev python3-venv
  fi
  if [ ! -d recipe ]; then
    say "cloning $REPOSITORY"
    rm -rf recipe.part
    git clone --depth 1 "$REPOSITORY" recipe.part
    mv recipe.part recipe
  fi
  say "setting up the recipe's Python packages"
  bash recipe/scripts/setup.sh
  say "ready: starting JupyterLab"
}

touch "$log"
show_log
install 2>&1 | tee -a "$log"
if [ "${PIPESTATUS[0]}" != 0 ]; then
  say "FAILED: the reason stands above. The container waits; restart it to try again" | tee -a "$log"
  wait "$server"
  exec sleep infinity # if even the log could not be served
fi
kill "$server" 2>/dev/null
wait "$server" 2>/dev/null

if [ -z "${JUPYTER_TOKEN:-}" ]; then # never an open server; the same token after a restart
  [ -s .jupyter-token ] ||
    (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(24))' >.jupyter-token)
  JUPYTER_TOKEN="$(cat .jupyter-token)"
  export JUPYTER_TOKEN
  echo "JupyterLab asks for this token: $JUPYTER_TOKEN"
fi
cd recipe || exit 1
exec .venv/bin/jupyter lab --allow-root --ip 0.0.0.0 --port "$port" --no-browser \
  --LabApp.default_url=/lab/tree/notebooks/llama3_dpo.ipynb
