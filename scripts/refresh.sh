#!/usr/bin/env bash
# Run the notebooks from top to bottom and keep their outputs: what is committed in notebooks/. The
# second reads the run folder of the first. About ten minutes on two cores. Then copy the table that the main notebook ends with into the
# README; tests/test_readme.py says whether the two agree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
for notebook in llama3_dpo dpo_explained preference_data; do
  .venv/bin/jupyter nbconvert --to notebook --execute --inplace "notebooks/$notebook.ipynb"
done
cp outputs/smollm2-135m-cpu/figures/before_after.png notebooks/before_after.png
