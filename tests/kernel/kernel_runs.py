"""A KernelTrainer on tiny data, for one process and for two."""

from pathlib import Path

import numpy as np
from tiny import one_layer_model, tiny_dataset, tiny_tokenizer

from hf_ft_ext import KernelTrainer, KernelTrainingArguments


def make(folder, model=None, train=None, evaluation=None, function=None, **settings) -> KernelTrainer:
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, **settings}
    return KernelTrainer(
        one_layer_model() if model is None else model,
        KernelTrainingArguments(str(folder), **settings),
        train_dataset=tiny_dataset(12) if train is None else train,
        eval_dataset=tiny_dataset(7, seed=1) if evaluation is None else evaluation,
        processing_class=tiny_tokenizer(),
        function=function,
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
    )


SETTINGS = {
    "sgd": {"kernel_regularization": "1e-3"},  # without it rounding is multiplied by the condition number
    "asym": {"kernel_formula": "asymmetric_signgd", "kernel_solver": "asym", "kernel_regularization": "auto"},
    "svc": {"kernel_solver": "svc", "binary_classification": False},  # class by class
    "projected": {"kernel_engine": "projected", "kernel_dimension": 300, "kernel_regularization": "1e-3"},
}


def run(folder: Path, name: str) -> tuple[dict, np.ndarray]:
    """Metrics of train and evaluation, and the predictions, in double precision."""
    trainer = make(folder, one_layer_model().double(), **SETTINGS[name])
    metrics = trainer.train().metrics | trainer.evaluate()
    return metrics, trainer.predict(trainer.eval_dataset).predictions
