#!/usr/bin/env bash
# Set up if need be, then lint and test. Arguments go to pytest: bash scripts/test.sh -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
