#!/usr/bin/env bash
# Set up if need be, look for secrets, lint and test. Arguments go to pytest: bash scripts/test.sh -k config
# Two tests run at a time, with one thread each; -n 0 runs them one by one, as a debugger wants it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dev
bash .ci/secrets
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
