#!/usr/bin/env bash
# Make .venv and install the pinned requirements into it; does nothing when that is done already.
#   bash scripts/setup.sh          what the recipe needs
#   bash scripts/setup.sh --dev    and what its tests need
# The launchable, a container and a bare machine all run this. It needs no root. It can be stopped
# and run again, and goes on. What it does is also written to .venv/setup.log.
#   PYTHON=...       the interpreter to use (3.11 or newer); by default the first that is found
#   SYSTEM_TORCH=1   use the torch that is there already, as in a PyTorch image, not the pinned one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

files=(requirements.txt)
[[ "${1:-}" == "--dev" ]] && files+=(requirements-dev.txt)

find_python() {
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "setup: Python 3.11 or newer is needed (transformers 5 asks for it); set PYTHON=..." >&2
  exit 1
}

if [[ ! -x .venv/bin/python ]]; then
  python="$(find_python)"
  echo "setup: making .venv with $("$python" --version)"
  if ! "$python" -m venv ${SYSTEM_TORCH:+--system-site-packages} .venv; then
    rm -rf .venv
    echo "setup: making a venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  fi
fi

# With SYSTEM_TORCH the pins of torch itself are left out; all else is installed over it.
pins=.venv/constraints.txt
if [[ -n "${SYSTEM_TORCH:-}" ]]; then
  grep -vE '^(torch|triton|nvidia-|cuda-)' requirements.lock >"$pins"
  grep -vE '^torch==' requirements.txt >.venv/requirements.txt
  files[0]=.venv/requirements.txt
else
  cp requirements.lock "$pins"
fi

# The stamp names what is installed; it is written last, so a run that was stopped starts again.
stamp=.venv/.installed-"${#files[@]}"
wanted="$(cat "${files[@]}" "$pins" | cksum)"
if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
  echo "setup: installing ${files[*]} (a few minutes the first time; torch is large)"
  # Piped, not -q: pip's own progress stays visible, its lines about what is there already do not.
  .venv/bin/python -m pip install --disable-pip-version-check "${files[@]/#/-r}" -c "$pins" 2>&1 |
    tee -a .venv/setup.log | { grep -v "^Requirement already satisfied" || true; }
  .venv/bin/python -m scripts.selfcheck | tee -a .venv/setup.log
  echo "$wanted" >"$stamp"
fi
