"""A trainer in your own code: curves in TensorBoard, early stopping, the best model kept.

Offline, with the `demo` extra and `pip install tensorboard`; under a minute on two cores:

    python examples/trainer_with_callbacks.py --output_dir runs/callbacks
    tensorboard --logdir runs/callbacks/logs
"""

import argparse
import os
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, EarlyStoppingCallback

from hf_ft_ext import SparseTrainer, SparseTrainingArguments, demo_dataset, demo_encoder, metric_function


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/callbacks"))
    parser.add_argument("--rows", type=int, default=240, help="training rows, and half as many to evaluate on")
    args = parser.parse_args(argv)

    name = demo_encoder()  # or any classifier: a Hub id or a folder
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = demo_dataset().map(lambda row: tokenizer(row["sentence"]), remove_columns="sentence")
    train = data["train"].select(range(args.rows))
    validation = data["validation"].select(range(args.rows // 2))
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(args.output_dir / "logs")
    trainer = SparseTrainer(
        model,
        SparseTrainingArguments(
            str(args.output_dir),
            learning_rate=3e-3,
            sparse_basis_steps=10,  # gradients of the pre-pass
            num_train_epochs=3,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=5,
            save_strategy="steps",
            save_steps=5,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_steps=5,
            report_to="tensorboard",
            seed=42,
        ),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=metric_function("accuracy", model.config.id2label),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    trainer.train()
    metrics = trainer.evaluate()  # of the best checkpoint
    trainer.save_model()  # a PEFT adapter: AutoModelForSequenceClassification.from_pretrained(output_dir) loads it
    print(f"stopped after {trainer.state.global_step} steps, best accuracy {metrics['eval_accuracy']:.3f}")
    return metrics


if __name__ == "__main__":
    main()
