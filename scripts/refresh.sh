#!/usr/bin/env bash
# Run the notebooks from top to bottom and keep their outputs: what is committed in notebooks/. The
# second reads the run folder of the first. An hour on two cores without AVX-512, ten minutes with it.
# Then copy the table of the main notebook's section 11 into README.md and docs/results.md;
# tests/test_readme.py says whether they agree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
for notebook in llama3_dpo dpo_explained preference_data; do
  .venv/bin/jupyter nbconvert --to notebook --execute --inplace "notebooks/$notebook.ipynb"
done
cp outputs/smollm2-135m-cpu/figures/before_after.png notebooks/before_after.png
