"""Print 100,000 pairs, the default ones over and over, each under a prompt of its own.

python tests/big_pairs.py > big.jsonl
"""

import json
from itertools import cycle, islice
from pathlib import Path

lines = (Path(__file__).parent.parent / "data" / "concise" / "train.jsonl").open(encoding="utf-8")
rows = [json.loads(line) for line in lines]
for number, row in enumerate(islice(cycle(rows), 100_000)):
    prompt = f"{number}: {row['prompt'][0]['content']}"
    print(json.dumps({"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}))
