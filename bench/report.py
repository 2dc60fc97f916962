"""Results as text: tables for a terminal and for markdown, and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Format of every column of a comparison.
COLUMNS = {
    "total": ".3f",
    "min": ".3f",
    "spread": ".3f",
    "text": ".3f",
    "denoise": ".3f",
    "decode": ".3f",
    "encode": ".3f",
    "host_ms": ".2f",
    "steps_per_second": ".2f",
    "peak_memory_gib": ".2f",
    "times_as_fast": ".2f",
    "latents_error": ".1e",
    "error_to_float32": ".1e",
    "frames_psnr": ".1f",
}


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """The lines of a markdown table.

    Args:
        columns: format specification of each key of the rows; a row may lack keys, and its cells are then empty.
    """
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ("" if row.get(key) is None else _cell(row[key], spec) for key, spec in columns.items())
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plain(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """The same for a terminal: the first column to the left, the others to the right."""
    cells = [[name.replace("_", " ") for name in columns]]
    cells += [["-" if row.get(k) is None else _cell(row[k], spec) for k, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        line = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(line))
    return lines


def comparison(result: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A comparison's table for a terminal."""
    rows = [{"arm": name} | dict(row) for name, row in result.items()]
    return plain(rows, {"arm": ""} | COLUMNS)


def plot(path: Path, rows: Sequence[Mapping[str, Any]], what: str, arms: Sequence[str]) -> None:
    """Write an SVG: seconds and peak memory over the swept value, a line for each arm."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "t2v"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, key, label in zip(panels, ("total", "peak_memory_gib"), ("seconds for a video", "peak memory, GiB")):
        for name in arms:
            panel.plot([row[what] for row in rows], [row[name][key] for row in rows], marker="o", label=name)
        panel.set(xlabel=what, ylabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, metadata={"Date": None})


def _cell(value: Any, spec: str) -> str:
    return value if isinstance(value, str) else format(value, spec)
