"""Make `report.md` and the plot of result folders again from their `rows.jsonl`, after the report's form has changed.

python benchmarks/rebuild_report.py benchmarks/results/*
"""

import json
import sys
from pathlib import Path

from lora_kit.comparison import report

for name in sys.argv[1:]:
    folder = Path(name)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    picture = folder / "memory_and_quality.png"
    report.plot(rows, picture)
    (folder / "report.md").write_text(report.markdown(rows, picture.name))
    print(folder / "report.md")
