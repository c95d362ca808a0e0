"""A kernel of a pretrained encoder: its classes, its spectrum, what it predicts, with pictures.

Offline, with the `demo` extra; under a minute on two cores:

    python examples/kernel_analysis.py --output_dir runs/kernel-analysis
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_ft_ext import demo_encoder, empirical_ntk, fit_linear_head

matplotlib.use("Agg")
from matplotlib import pyplot

THINGS = ("film", "hotel", "meal", "concert", "book", "course", "museum", "journey")
# Negative, positive; what is predicted uses other words than what is trained on.
TRAIN_WORDS = (("boring", "terrible", "dull", "awful"), ("great", "wonderful", "exciting", "lovely"))
TEST_WORDS = (("dreadful", "tedious"), ("brilliant", "delightful"))


def sentences(words: tuple[tuple[str, ...], tuple[str, ...]]) -> Dataset:
    """Rows ordered by class."""
    rows = [(f"the {thing} was {word}", label) for label in (0, 1) for thing in THINGS for word in words[label]]
    return Dataset.from_dict({"sentence": [text for text, _ in rows], "label": [label for _, label in rows]})


def margin(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One scalar per row, positive where the model says "positive"."""
    return model(**batch).logits.diff(dim=-1)


def regression(kernel: np.ndarray, targets: np.ndarray, rows: np.ndarray, ridge: float) -> np.ndarray:
    """Kernel ridge regression: `rows (K + ridge |K| I)^-1 targets`, |K| the largest eigenvalue."""
    scale = np.linalg.norm(kernel, 2)
    return rows @ np.linalg.solve(kernel + ridge * scale * np.eye(len(kernel)), targets)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kernel-analysis"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    name = demo_encoder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    train, test = sentences(TRAIN_WORDS), sentences(TEST_WORDS)
    tokens = [tokenizer(list(split["sentence"]), padding=True, return_tensors="pt") for split in (train, test)]
    targets = 2.0 * np.array(train["label"]) - 1

    # A fitted head first: where the head is random, so are the kernel's directions in the encoder.
    rows = train.map(lambda row: tokenizer(row["sentence"]), remove_columns="sentence")
    fit_linear_head(model, rows, DataCollatorWithPadding(tokenizer))
    kernel = empirical_ntk(model, tokens[0], function=margin)[:, 0, :, 0].numpy()
    to_predict = empirical_ntk(model, tokens[1], tokens[0], function=margin)[:, 0, :, 0].numpy()

    sizes = np.sqrt(kernel.diagonal())
    scaled = kernel / np.outer(sizes, sizes)
    same = targets[:, None] == targets
    off_diagonal = ~np.eye(len(kernel), dtype=bool)
    eigenvalues = np.linalg.eigvalsh(kernel)[::-1]
    predicted = regression(kernel, targets, to_predict, ridge=1e-2) > 0
    found = {
        "within_classes": float(scaled[same & off_diagonal].mean()),
        "between_classes": float(scaled[~same].mean()),
        # How well the kernel's own directions fit the labels: <K, y y^T> / (|K| |y y^T|), 1 at best.
        "alignment": float(targets @ kernel @ targets / (np.linalg.norm(kernel) * len(targets))),
        "largest_eigenvalue_share": float(eigenvalues[0] / eigenvalues.sum()),
        "accuracy": float((predicted == np.array(test["label"])).mean()),
    }

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    image = left.imshow(scaled, cmap="viridis", vmax=1)
    figure.colorbar(image, ax=left, label="kernel, diagonal scaled to 1")
    left.set(title="training rows, ordered by class", xlabel="row", ylabel="row")
    right.semilogy(eigenvalues.clip(min=1e-12) / eigenvalues[0], marker=".")
    right.set(title="spectrum", xlabel="eigenvalue", ylabel="relative to the largest")
    right.grid(alpha=0.3)
    figure.savefig(args.output_dir / "kernel.png", dpi=130)
    pyplot.close(figure)
    for key, value in found.items():
        print(f"{key:<25} {value:.3f}")
    print(f"picture: {args.output_dir / 'kernel.png'}")
    return found


if __name__ == "__main__":
    main()
