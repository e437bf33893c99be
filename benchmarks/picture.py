"""The README's picture: the table that a run ends with, as SVG.

python benchmarks/picture.py runs/quickstart docs/quickstart.svg
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from samovar.show import comparison


def main(run: Path, target: Path) -> None:
    console = Console(record=True, width=96, file=io.StringIO())
    console.print(comparison(json.loads((run / "table" / "table.json").read_text(encoding="utf-8"))))
    svg = console.export_svg(title="samovar run recipes/quickstart.toml", unique_id="samovar")
    svg = re.sub(r"\s*@font-face \{.*?\}\s*", "\n", svg, flags=re.DOTALL)  # no fonts from elsewhere
    target.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
