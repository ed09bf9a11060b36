"""The table of README.md, from what run.sh measured: mean and range over the seeds."""

import json
import sys
from pathlib import Path

measured = Path(sys.argv[1])
print("| exported weights | chalk, shapes shown | right, shapes shown | right, shapes left out |\n|---|---|---|---|")
for label in ("base", "raw", "ramp", "warm-22", "warm-67"):
    cells = []
    for shapes, figure in (("circle", "chalk"), ("circle", "shape and color"), ("cross", "shape and color")):
        shares = []
        for path in sorted(measured.glob(f"{label}*/{shapes}/accuracy.json")):
            result = json.loads(path.read_text(encoding="utf-8"))["one object, generated"]
            shares.append(100 * (1 - result["filled"] if figure == "chalk" else result[figure]))
        spread = f" ({min(shares):.0f} to {max(shares):.0f})" if len(shares) > 1 else ""
        cells.append(f"{sum(shares) / len(shares):.1f} %{spread}")
    print(f"| {label} | " + " | ".join(cells) + " |")
