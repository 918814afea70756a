"""Draws docs/performance.svg from what `sensor-pipeline bench table batch-sizes --json` prints, on standard input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import median

WIDTH, HEIGHT, GAP = 360, 220, 60
PATTERNS = {
    "by batch size": re.compile(r"a batch of ([\d,]+) readings"),
    "by readings in the table": re.compile(r"a table of ([\d,]+) readings"),
}


def main() -> None:
    """Read the figures from standard input and write the picture."""
    lines = json.load(sys.stdin)
    panels = []
    for title, pattern in PATTERNS.items():
        found = ((pattern.fullmatch(line["figure"]), line["values"]) for line in lines)
        points = sorted((int(match[1].replace(",", "")), values) for match, values in found if match)
        panels.append(panel(title, points, left=GAP + len(panels) * (WIDTH + GAP)))
    size = f'width="{2 * (WIDTH + GAP) + GAP}" height="{HEIGHT + 2 * GAP}"'
    style = "text{font:12px sans-serif;fill:#555}line{stroke:#ccc}"
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    picture = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{paper}{"".join(panels)}</svg>\n'
    Path(__file__).with_name("performance.svg").write_text(picture)


def panel(title: str, points: list[tuple[int, list[float]]], left: int) -> str:
    """One curve: medians as dots, with a line from the slowest round to the fastest."""
    highest = 1.1 * max(max(values) for _, values in points)
    most = points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        return round(left + WIDTH * x / most, 1), round(GAP + HEIGHT * (1 - y / highest), 1)

    parts = [f'<text x="{left}" y="{GAP - 30}" font-weight="bold">Readings a second {title}</text>']
    for step in range(0, int(highest), 20_000):
        x, y = place(0, step)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + WIDTH}" y2="{y}"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{step // 1000} k</text>')
    for number, (at, values) in enumerate(points):
        (x, low), (_, high) = place(at, min(values)), place(at, max(values))
        parts.append(f'<line x1="{x}" y1="{low}" x2="{x}" y2="{high}" style="stroke:#06c;stroke-width:2"/>')
        label = f"{at / 1e6:g} M" if at >= 1_000_000 else f"{at // 1000} k"
        # Two rows of labels: small sizes stand close together.
        below = GAP + HEIGHT + (18 if number % 2 else 34)
        parts.append(f'<text x="{x}" y="{below}" text-anchor="middle">{label}</text>')
    curve = " ".join("{},{}".format(*place(at, median(values))) for at, values in points)
    parts.append(f'<polyline points="{curve}" fill="none" stroke="#06c" stroke-width="2"/>')
    dots = (place(at, median(values)) for at, values in points)
    parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="#06c"/>' for x, y in dots]
    return "".join(parts)


if __name__ == "__main__":
    main()
