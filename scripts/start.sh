#!/usr/bin/env bash
# What the container of brev-launchable.yaml runs, from the clone: set up, then start JupyterLab.
# Meanwhile the log of set-up is shown at the notebook's port. Set-up is tried three times; after
# that, the page has a button that tries again.
#   JUPYTER_TOKEN   JupyterLab's password, 8 characters or more; without one no port is opened
#   DPO_CONFIG      the notebook's config; by default the one for the GPU's memory
#   PORT RETRY      the port (8888), and the seconds between two tries (20)
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
port="${PORT:-8888}"
log=../setup.log
state=../setup.state # running, or failed: the page's button makes it running again

# A parameter that nobody gave may arrive empty, or as the text of its placeholder: unset it.
for name in HF_TOKEN WANDB_API_KEY JUPYTER_TOKEN DPO_CONFIG; do
  # shellcheck disable=SC2016
  case "${!name:-}" in '' | '${'*) unset "$name" ;; *) export "${name?}" ;; esac
done

say() { echo "$(date -u +%H:%M:%S) $*"; }

if [ "$(printf %s "${JUPYTER_TOKEN:-}" | wc -m)" -lt 8 ]; then
  say "error: JUPYTER_TOKEN must have 8 characters or more: choose a password for JupyterLab and" \
    "deploy again. No port is opened without one"
  exec sleep infinity # an exit would only make Docker start it again
fi

show_log() { # on every path of the port, without the secrets
  python3 - "$port" "$log" "$state" <<'PYTHON' &
import html, http.server, os, sys
from pathlib import Path

names = ("HF_TOKEN", "WANDB_API_KEY", "JUPYTER_TOKEN")
secrets = [os.environ[name] for name in names if os.environ.get(name)]
log, state = Path(sys.argv[2]), Path(sys.argv[3])
button = '<form method="post" action="/"><button>Try again</button></form>'
page = """<!doctype html><meta charset="utf-8"><title>Setting up</title>
<h1>Setting up</h1><p>JupyterLab takes the place of this page when it is ready.</p>
<pre id="log">LOG</pre><div id="again">AGAIN</div><script>
setInterval(async () => {
  try {
    const answer = await fetch(location.href), text = await answer.text()
    if (!answer.headers.get("X-Setup")) return answer.ok && location.reload()
    const page = new DOMParser().parseFromString(text, "text/html")
    for (const id of ["log", "again"])
      document.getElementById(id).innerHTML = page.getElementById(id).innerHTML
  } catch (error) {}
}, 3000)
</script>"""

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        text = log.read_text(errors="replace")
        for secret in secrets:  # before the cut, which could leave a piece of one
            text = text.replace(secret, "***")
        status = state.read_text().strip()
        parts = page.replace("AGAIN", button if status == "failed" else "", 1)
        body = parts.replace("LOG", html.escape(text[-100_000:]), 1).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Setup", status)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        if state.read_text().strip() == "failed":
            state.write_text("running")
        self.send_response(303)
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Page).serve_forever()
PYTHON
  server=$!
}

install() { # what is there already is not installed again, so a restart is quick
  # Triton compiles a C stub when a kernel is first launched: a compiler, libc and Python.h.
  if ! { command -v gcc && dpkg -s libc6-dev python3-dev python3-venv; } >/dev/null 2>&1; then
    say "installing a compiler and Python's headers"
    apt-get update -qq &&
      apt-get install -y -qq --no-install-recommends gcc libc6-dev python3-dev python3-venv ||
      return 1
  fi
  say "installing the recipe's Python packages"
  bash scripts/setup.sh
}

try_install() { # three times
  local try
  for try in 1 2 3; do
    say "set-up, try $try of 3" | tee -a "$log"
    install 2>&1 | tee -a "$log"
    [ "${PIPESTATUS[0]}" != 0 ] || return 0
    [ "$try" = 3 ] || sleep "${RETRY:-20}"
  done
  return 1
}

config_for_gpu() { # by the memory of the first GPU, in MiB: an 80 GB card has 81,559 or more
  local memory
  memory="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)"
  case "$memory" in '' | *[!0-9]*) memory=0 ;; esac
  if ((memory >= 75000)); then
    echo llama3-8b-a100-short
  elif ((memory >= 39000)); then
    echo llama3-8b-a100-40gb-short
  elif ((memory >= 22000)); then
    echo llama3-8b-24gb
  else
    echo smollm2-135m-cpu
  fi
  say "the GPU has $memory MiB" >&2
}

echo running >"$state"
touch "$log"
show_log
until try_install; do
  say "FAILED three times: the reason is above. The button on this page tries again" | tee -a "$log"
  echo failed >"$state"
  until [ "$(cat "$state")" = running ]; do sleep 1; done
done
if [ -z "${DPO_CONFIG:-}" ]; then
  DPO_CONFIG="configs/$(config_for_gpu).yaml"
  export DPO_CONFIG
fi
say "starting JupyterLab; the notebook uses $DPO_CONFIG (DPO_CONFIG names another)" | tee -a "$log"
kill "$server" 2>/dev/null
wait "$server" 2>/dev/null
# 0.0.0.0 inside the container: Docker forwards from outside it. brev-launchable.yaml says which
# address of the machine that is. Another port than the published one would be of no use.
exec .venv/bin/jupyter lab --allow-root --ip 0.0.0.0 --port "$port" --ServerApp.port_retries=0 \
  --no-browser --LabApp.default_url=/lab/tree/notebooks/llama3_dpo.ipynb
