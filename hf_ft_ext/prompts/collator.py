"""Collate rows with several contexts, or with their own answer options."""

from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithPadding

from hf_ft_ext.prompts.sequences import IGNORED


class ContextCollator(DataCollatorWithPadding):
    """`DataCollatorWithPadding` that also takes rows with several contexts, `[rows, contexts, length]`.

    `option_ids` of the rows become `[rows, options, longest]`, padded with -100.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "option_ids" in features[0]:
            features = [dict(row) for row in features]
            options = [torch.as_tensor(row.pop("option_ids")) for row in features]
            longest = max(tokens.shape[-1] for tokens in options)
            batch = self(features)
            wide = [nn.functional.pad(tokens, (0, longest - tokens.shape[-1]), value=IGNORED) for tokens in options]
            batch["option_ids"] = torch.stack(wide)
            return batch
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
