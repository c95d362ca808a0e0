"""Draw the idea of each method: python docs/figures.py writes docs/figures/*.svg

The drawings are schematic, but their matrices are computed: a gradient is rotated into its own basis, and the kernel
is that of random Jacobians. The background is white, for light and dark pages.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "figures"
WIDTH, HEIGHT = 720, 250
INK, PALE, BLUE, ORANGE, GREEN = "#333333", "#d8d8d8", "#3b6fb6", "#d9792b", "#3f9142"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def text(
    x: float,
    y: float,
    words: str,
    anchor: str = "middle",
    colour: str = INK,
    size: int = 13,
) -> str:
    about = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {about}>{escape(words)}</text>'


def box(
    x: float,
    y: float,
    wide: float,
    high: float,
    fill: str = "#ffffff",
    edge: str = INK,
    words: str = "",
) -> str:
    drawn = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" rx="3" '
        f'fill="{fill}" stroke="{edge}"/>'
    )
    return drawn + (text(x + wide / 2, y + high / 2 + 4.5, words) if words else "")


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    colour: str = INK,
    head: bool = True,
    wide: float = 1.5,
) -> str:
    end = f' marker-end="url(#{colour[1:]})"' if head else ""
    path = f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"
    return (
        f'<path d="{path}" stroke="{colour}" stroke-width="{wide}" fill="none"{end}/>'
    )


def matrix(
    values: np.ndarray, x: float, y: float, cell: float, colour: str = BLUE
) -> str:
    """Cells as dark as their magnitudes, relative to the largest."""
    shade = np.abs(values) / np.abs(values).max()
    parts = [box(x, y, cell * values.shape[1], cell * values.shape[0])]
    for i, j in np.argwhere(shade > 0.02):
        parts.append(
            f'<rect x="{x + cell * j:.1f}" y="{y + cell * i:.1f}" width="{cell}" height="{cell}" '
            f'fill="{colour}" fill-opacity="{shade[i, j]:.2f}"/>'
        )
    return "".join(parts)


def figure(title: str, parts: Iterable[str], height: int = HEIGHT) -> str:
    heads = "".join(
        f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="11" '
        f'markerHeight="11" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
        for colour in (INK, PALE, BLUE, ORANGE, GREEN)
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="{FONT}" role="img">',
            f"<title>{escape(title)}</title><defs>{heads}</defs>",
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def sparse() -> str:
    random = np.random.default_rng(3)
    out_size, in_size, cell = 14, 18, 10
    decay = np.exp(-np.arange(out_size)[:, None] / 2.2 - np.arange(in_size) / 2.6)
    core = decay * random.standard_normal((out_size, in_size))
    left, right = (
        np.linalg.qr(random.standard_normal((n, n)))[0] for n in (out_size, in_size)
    )
    gradient = left @ core @ right.T  # V S U^T, so that V^T G U = S
    high, wide, top = cell * out_size, cell * in_size, 52
    block = np.zeros_like(core)
    block[:4, :5] = core[:4, :5]
    parts = [
        text(20 + wide / 2, 34, "gradient G of an MLP weight"),
        matrix(gradient, 20, top, cell),
        line(28 + wide, top + high / 2, 62 + wide, top + high / 2),
        text(70 + 1.5 * wide, 34, "in the basis of a pre-pass: Vᵀ G U"),
        matrix(left.T @ gradient @ right, 70 + wide, top, cell),
        line(78 + 2 * wide, top + high / 2, 112 + 2 * wide, top + high / 2),
        text(120 + 2.5 * wide, 34, "only the leading block D trains"),
        matrix(block, 120 + 2 * wide, top, cell, ORANGE),
        box(120 + 2 * wide, top, 5 * cell, 4 * cell, "none", ORANGE),
        text(WIDTH / 2, 226, "y = W x + V D Uᵀ x; W, V and U do not change", size=14),
    ]
    return figure(
        "SparseGrad: the gradient in a basis, and the block that trains", parts
    )


def contours(x: float, y: float) -> str:
    rings = (
        f'<ellipse cx="{x}" cy="{y}" rx="{24 * k}" ry="{14 * k}" fill="none" stroke="{PALE}"/>'
        for k in range(1, 6)
    )
    return "".join(rings) + f'<circle cx="{x}" cy="{y}" r="3" fill="{GREEN}"/>'


def gradientless() -> str:
    parts = [text(180, 30, "direct search (GLD)"), contours(150, 122)]
    start = np.array([248.0, 150.0])
    angles = (2.2, 3.5, 0.6, 4.9, 5.6)
    radii = 104 * 0.62 ** np.arange(5)
    for number, (angle, radius) in enumerate(zip(angles, radii, strict=True)):
        end = start + radius * np.array([np.cos(angle), 0.6 * np.sin(angle)])
        colour = ORANGE if number == 1 else BLUE
        parts.append(line(*start, *end, colour, wide=2.5 if number == 1 else 1.3))
    parts += [
        f'<circle cx="{start[0]}" cy="{start[1]}" r="4" fill="{INK}"/>',
        text(180, 216, "candidates θ + R 2⁻ᵏ z on the same batch;"),
        text(180, 234, "the best one is kept, or none"),
        text(540, 30, "SPSA (MeZO)"),
        contours(510, 122),
    ]
    start, z = np.array([600.0, 146.0]), np.array([38.0, -6.0])
    parts += [
        line(*start, *(start + z), BLUE),
        line(*start, *(start - z), BLUE),
        text(start[0] + 42, start[1] - 12, "θ + ε z", "start", BLUE),
        text(start[0] - 42, start[1] - 8, "θ - ε z", "end", BLUE),
        line(*start, *(start - 1.7 * z), ORANGE, wide=2.5),
        f'<circle cx="{start[0]}" cy="{start[1]}" r="4" fill="{INK}"/>',
        text(540, 216, "two losses give the slope g along a random z;"),
        text(540, 234, "the step is -η g z, without a backward pass"),
    ]
    return figure("Gradient-free search: direct search and SPSA", parts)


def fisher() -> str:
    random = np.random.default_rng(5)
    kinds = (("prefix", BLUE), ("bottleneck", GREEN), ("LoRA", ORANGE))
    scores = random.uniform(0.2, 0.7, (5, 3))
    for layer, best in enumerate((0, 0, 1, 1, 2)):  # of layer 0, 1, ...
        scores[layer, best] = 0.85 + 0.03 * layer
    parts = [
        text(170, 30, "gradients of 64 examples score each candidate"),
        text(560, 30, "the best one of each layer trains"),
    ]
    for layer, row in enumerate(scores):
        y = 184 - 34 * layer
        parts.append(text(66, y + 17, f"layer {layer}", "end"))
        for place, ((_, colour), score) in enumerate(zip(kinds, row, strict=True)):
            parts.append(box(74 + 82 * place, y + 4, 76 * score, 16, colour, colour))
        name, colour = kinds[int(row.argmax())]
        parts += [
            box(440, y, 130, 26, "#f4f4f4", PALE, f"layer {layer}, frozen"),
            box(578, y, 96, 26, "#ffffff", colour, name),
        ]
    for place, (name, colour) in enumerate(kinds):
        parts.append(text(74 + 82 * place, 236, name, "start", colour))
    parts.append(line(340, 118, 420, 118))
    return figure("FishPAL: a pre-pass scores adapters, one per layer trains", parts)


def kernel() -> str:
    random = np.random.default_rng(2)
    labels = np.repeat([1.0, -1.0], 6)
    shared = np.outer(labels, random.standard_normal(22))
    jacobian = 0.55 * shared + 0.6 * random.standard_normal((12, 22))
    product = jacobian @ jacobian.T
    cell, top = 11, 56
    parts = [
        text(142, 30, "J: gradients of the output, per example"),
        matrix(jacobian, 21, top, cell),
        line(276, top + 66, 316, top + 66),
        text(392, 30, "kernel K = J Jᵀ"),
        matrix(np.clip(product, 0, None), 326, top, cell, ORANGE),
        line(470, top + 66, 510, top + 66),
        box(518, top + 14, 186, 40, "#f4f4f4", PALE, "solve (K + r‖K‖ I) a = y"),
        line(611, top + 56, 611, top + 80),
        box(518, top + 84, 186, 40, "#f4f4f4", PALE, "f(x) = K(x, X) a"),
        text(WIDTH / 2, 226, "no training step: the weights do not change", size=14),
    ]
    return figure("Kernel regression with per-example gradients", parts)


def linearhead() -> str:
    parts = [
        box(24, 24, 120, 70, "#f4f4f4", PALE, "training rows"),
        line(148, 59, 178, 59),
        box(184, 24, 140, 70, "#f4f4f4", PALE, "encoder, frozen"),
        line(328, 59, 358, 59),
        box(364, 24, 150, 70, "#ffffff", BLUE, "features, cached"),
        line(518, 59, 548, 59),
        box(554, 24, 142, 70, "#ffffff", ORANGE, "last layer"),
        text(254, 124, "one forward pass"),
        text(625, 116, "logistic or ridge regression,"),
        text(625, 134, "penalty by cross-validation"),
    ]
    title = "Linear probing: the last layer is fitted on frozen features"
    return figure(title, parts, 150)


def baselines() -> str:
    side = 120
    parts = [
        text(130, 34, "full: every weight trains"),
        box(70, 56, side, side, ORANGE, ORANGE),
        text(470, 34, "lora: W + B A, only B and A train"),
        box(330, 56, side, side, "#c8d6ea", BLUE),
        text(476, 122, "+", size=22),
        box(500, 56, 20, side, ORANGE, ORANGE),
        box(528, 56, side, 20, ORANGE, ORANGE),
        text(390, 196, "W, frozen", colour=BLUE),
        text(510, 196, "B", colour=ORANGE),
        text(588, 96, "A", colour=ORANGE),
        text(WIDTH / 2, 230, "in both, the classification head trains too", size=14),
    ]
    return figure("Full fine-tuning and LoRA", parts)


FIGURES = {
    "baselines": baselines,
    "fisher": fisher,
    "gradientless": gradientless,
    "kernel": kernel,
    "linearhead": linearhead,
    "sparse": sparse,
}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
