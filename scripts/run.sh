#!/usr/bin/env bash
# Set up if need be, then execute the notebook from top to bottom and print the results.
#   bash scripts/run.sh [--config configs/NAME.yaml] [--set key=value ...] [--output-dir DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m scripts.run "$@"
