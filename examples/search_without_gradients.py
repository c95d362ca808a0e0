"""MeZO (SPSA) with an objective that has no derivative: what the predictions cost.

The head is fitted by logistic regression, which treats all mistakes alike; the search then moves it to where
mistakes are cheap. Offline, with the `demo` extra; the frozen encoder runs once, so a step costs next to nothing:

    python examples/search_without_gradients.py --output_dir runs/cost
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_ft_ext import (
    GradientlessTrainer,
    GradientlessTrainingArguments,
    demo_dataset,
    demo_encoder,
    fit_linear_head,
)

# What a prediction costs, by true label (negative, positive) and prediction. A missed complaint costs twice as much.
COSTS = torch.tensor([[0.0, 2.0], [1.0, 0.0]])


def cost(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cost of the predictions of a step's rows: piecewise constant, so its gradient is zero."""
    return COSTS[labels, logits.argmax(-1)].mean()


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/cost"))
    parser.add_argument("--rows", type=int, default=600, help="training rows")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)

    name = demo_encoder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = demo_dataset().map(lambda row: tokenizer(row["sentence"]), remove_columns="sentence")
    train = data["train"].select(range(min(args.rows, len(data["train"]))))
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    fit_linear_head(model, train, DataCollatorWithPadding(tokenizer))
    trainer = GradientlessTrainer(
        model,
        GradientlessTrainingArguments(
            str(args.output_dir),
            search_method="spsa",
            search_target="classifier",  # 770 parameters; the pooler before it does not change
            search_eps=3e-2,  # wide enough that some predictions change
            search_directions=4,
            learning_rate=5e-3,
            max_steps=args.steps,
            per_device_train_batch_size=512,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            seed=42,
        ),
        objective=cost,
        train_dataset=train,
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )

    def cost_of_validation() -> float:
        predicted = trainer.predict(data["validation"])
        return float(cost(torch.from_numpy(predicted.predictions), torch.from_numpy(predicted.label_ids)))

    before = cost_of_validation()
    trainer.train()
    after = cost_of_validation()
    trainer.save_model()
    print(f"mean cost of a prediction: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
