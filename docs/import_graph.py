"""Draw which packages of hf_ft_ext import which, as an SVG: one row for each layer of pyproject.toml.

    python docs/import_graph.py imports.svg    # or: make imports

The graph is read from the code by grimp, imports inside functions included; no module is run.
"""

import argparse
import tomllib
from collections import Counter
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_ft_ext"
WIDTH, BOX_HEIGHT, ROW_HEIGHT, LETTER = 1200, 30, 92, 8.2
_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14"'
    ' text-anchor="middle"><rect width="100%" height="100%" fill="white"/>'
)
_LINE = (
    '<path d="M{x1:.0f},{y1} C{x1:.0f},{y3:.0f} {x2:.0f},{y4:.0f} {x2:.0f},{y2}" fill="none" stroke="{color}" \
stroke-opacity="0.45" stroke-width="{width:.1f}"><title>{title}</title></path>'
)
_BOX = (
    '<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{height}" rx="5" fill="#eef2fa" stroke="{color}"/>\
<text x="{middle:.0f}" y="{base}">{name}</text>'
)
_COLORS = ("#1f5fa8", "#b04a1a", "#2d7d46", "#7a3f9d", "#8a6d1b", "#a8325a", "#2a7f86")


def read_layers() -> list[list[str]]:
    """The layers of the import contract, the highest first; each a list of packages."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "tool"
    ]["importlinter"]["contracts"]
    layers = next(
        contract["layers"] for contract in contracts if contract["type"] == "layers"
    )
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def count_imports() -> Counter[tuple[str, str]]:
    """Imports between modules, counted by the packages (or single modules) directly below the root: (from, to)."""
    graph = grimp.build_graph(
        PACKAGE, exclude_type_checking_imports=True, cache_dir=None
    )
    counts: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            ends = [name.split(".")[1] for name in (module, imported) if "." in name]
            if len(ends) == 2 and ends[0] != ends[1]:
                counts[ends[0], ends[1]] += 1
    return counts


def draw(layers: list[list[str]], counts: Counter[tuple[str, str]]) -> str:
    """The SVG: lines go down from a package to what it imports, wider for more imports."""
    middles, tops = {}, {}
    for row, names in enumerate(layers):
        for i, name in enumerate(names):
            middles[name] = WIDTH * (i + 0.5 + 0.25 * (row % 2 - 0.5)) / len(names)
            tops[name] = 15 + row * ROW_HEIGHT
    parts = [_HEAD.format(width=WIDTH, height=len(layers) * ROW_HEIGHT)]
    color = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(middles)}
    for (importer, imported), count in sorted(counts.items()):
        y1, y2 = tops[importer] + BOX_HEIGHT, tops[imported]
        bend = 0.5 * (y2 - y1)
        x1, x2 = middles[importer], middles[imported]
        title = f"{importer} imports {imported}: {count}"
        ends = {
            "x1": x1,
            "y1": y1,
            "x2": x2,
            "y2": y2,
            "y3": y1 + bend,
            "y4": y2 - bend,
        }
        parts.append(
            _LINE.format(
                **ends, color=color[importer], width=0.6 + 0.4 * count**0.5, title=title
            )
        )
    for name, middle in middles.items():
        width = LETTER * len(name) + 20
        place = {
            "x": middle - width / 2,
            "y": tops[name],
            "middle": middle,
            "base": tops[name] + 20,
        }
        parts.append(
            _BOX.format(
                **place, width=width, height=BOX_HEIGHT, color=color[name], name=name
            )
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="where the picture goes, as SVG")
    arguments = parser.parse_args()
    arguments.file.write_text(draw(read_layers(), count_imports()), encoding="utf-8")


if __name__ == "__main__":
    main()
