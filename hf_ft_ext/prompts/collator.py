"""Batches of rows with several contexts each."""

from typing import Any

import torch
from transformers import DataCollatorWithPadding


class ContextCollator(DataCollatorWithPadding):
    """`DataCollatorWithPadding` that also takes rows of several contexts: `[rows, contexts, length]`."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = features[0]["input_ids"]
        if not len(ids) or (not isinstance(ids[0], list | tuple) and getattr(ids, "ndim", 1) == 1):
            return super().__call__(features)
        contexts = len(ids)
        nested = [key for key in self.tokenizer.model_input_names if key in features[0]]
        flat = [{key: row[key][i] for key in nested} for row in features for i in range(contexts)]
        batch = {key: value.unflatten(0, (-1, contexts)) for key, value in super().__call__(flat).items()}
        for key in ("label", "labels"):
            if key in features[0]:
                batch["labels"] = torch.tensor([row[key] for row in features])
        return batch
