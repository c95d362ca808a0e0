"""Linear probing: fitting a model's last layer by logistic or linear regression on its inputs."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_ft_ext.errors import InputError
from hf_ft_ext.features.cache import cached_features, feature_bytes
from hf_ft_ext.features.head import HeadReader
from hf_ft_ext.features.linear_fit import LinearFit, fit_classes, fit_labels, fit_probability, fit_regression
from hf_ft_ext.features.rows import inputs_of, labels_of, read_in_order, sample_rows
from hf_ft_ext.label_tokens import check_row_labels
from hf_ft_ext.offload import input_device
from hf_ft_ext.per_example.outputs import logits_of
from hf_ft_ext.per_example.state import batch_size, evaluating, own_precision
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.model import is_prompt_model
from hf_ft_ext.prompts.readout import Reading
from hf_ft_ext.prompts.templates.words import FIRST_TOKEN
from hf_ft_ext.structure.heads import encoder_path

logger = logging.getLogger(__name__)

_ROWS = 4096  # rows of features per forward pass of the head


@dataclass(frozen=True)
class LinearHead:
    """The result of `fit_linear_head`.

    Attributes:
        layer: dotted name of the layer that was written.
        fit: the fit, with regularisation and score.
        rows: number of rows of the fit.
    """

    layer: str
    fit: LinearFit
    rows: int


def fit_linear_head(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list], dict],
    *,
    batch_size: int = 64,
    c: float | None = None,
    folds: int = 5,
    max_iter: int = 1000,
    feature_cache_dir: str | os.PathLike | None = None,
    feature_cache_gb: float = 0.0,
    disable_tqdm: bool = True,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> LinearHead:
    """Fit the last layer of a sequence classifier by linear probing and write the weights into it, in place.

    The encoder runs once over the data, without dropout. Classes are fitted by logistic regression (several labels per
    row: one-vs-rest), numbers by ridge regression. The regularisation is chosen by cross-validation unless `c` is
    given. Layers between encoder and last layer (a pooler, a dense layer) are not changed. In a prompt model the last
    layer consists of the label words' output rows, which first become a separate layer (`untie_label_words`).
    `model.fresh_parameters` names the written parameters, so that an adapter saves them.

    Args:
        model: a classifier on the device on which it should run.
        dataset: tokenised rows with `labels`.
        collate: the collator, which makes a batch of rows.
        c: inverse regularisation strength, for features scaled to variance 1; `None` = by cross-validation.
        folds: folds of the cross-validation.
        max_iter: maximum iterations of the logistic regression.
        feature_cache_dir, feature_cache_gb: folder of the feature cache, and the size up to which features are cached
            there; 0 = in memory only.
        autocast: makes the context in which the encoder runs over each batch, for mixed precision.

    Raises:
        InputError: no labels, a class without rows, a row whose features are not finite, or a model whose last layer
            is not linear or reads more than one vector per row.

    Source: Kumar et al., ICLR 2022, arXiv 2202.10054 (linear probing before fine-tuning).
    """
    labels = labels_of(dataset)
    prepare_linear_head(model)
    sample = inputs_of(collate(sample_rows(dataset)), _device(model))
    name, layer = find_last_layer(model, sample)
    reader = HeadReader.find(model, sample, autocast)
    averaged = reader is None and _averages(model, layer, sample)

    def every(read: Callable[[dict], torch.Tensor], start: int = 0) -> Iterator[torch.Tensor]:
        return read_in_order(read, dataset, collate, batch_size, _device(model), start=start)

    if reader is not None and 0 < feature_bytes(reader, len(dataset)) / 1e9 <= feature_cache_gb:
        with autocast():  # kept for all batches, so that weights are converted once
            table = cached_features(
                reader, dataset, lambda start: every(reader.features, start), feature_cache_dir, disable_tqdm,
                collate, batch_size,
            )  # fmt: skip
        parts = (table[i : i + _ROWS].to(_device(model)) for i in range(0, len(table), _ROWS))
        inputs = [_inputs(model, name, layer, functools.partial(reader.logits, part)) for part in parts]
    else:
        with tqdm(total=len(dataset), desc="encoding the data once", disable=disable_tqdm) as bar:
            inputs = []

            # with the reader, a decoder's head runs on its one relevant token only
            def run(batch: dict) -> Any:
                if reader is not None:
                    return reader.logits(reader.features(batch))
                with autocast():
                    return model(**batch)

            def read(batch: dict) -> torch.Tensor:
                return _inputs(model, name, layer, lambda: run(batch), _mask(batch) if averaged else None)

            for part in every(read):
                inputs.append(part)
                bar.update(len(part))
    features = torch.cat(inputs)
    _refuse_nan(features, "the features")
    x = features.double().numpy()
    fit = _fit(model, x, labels.numpy(), layer.bias is not None, c, folds, max_iter)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(fit.weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(fit.bias))
    _mark_untrained(model, name)
    logger.info("Linear head: %s fitted on %d rows, %s.", name, len(x), fit.summary())
    return LinearHead(name, fit, len(x))


def prepare_linear_head(model: nn.Module) -> None:
    """Give a prompt model the separate layer for a linear head; other models have one already.

    A calibration is dropped: it was measured on the label words' rows, which the fit replaces.

    Call it for a model that gets the weights of its head from elsewhere, such as a checkpoint.
    """
    if is_prompt_model(model):
        _check_words(model.config)
        model.untie_label_words()
        model.config.word_bias = None
        _mark_untrained(model, model.decoder_path)


def _check_words(config: PromptConfig) -> None:
    """Refuse prompt models whose label words cannot have output rows of their own."""
    if config.reading == Reading.DECODER.value:
        cause = "an encoder-decoder's head is scaled and shared with both of its embeddings"
        cure = "a masked or causal language model"
    elif config.word_scoring != FIRST_TOKEN:
        cause = f"word_scoring={config.word_scoring} reads those of the whole vocabulary"
        cure = f"word_scoring={FIRST_TOKEN}"
    else:
        return
    raise InputError(
        f"a linear head needs output rows for the label words alone, but {cause}; pass {cure}, or another method "
        "without from_linearhead"
    )


def find_last_layer(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer whose output, if need be averaged over tokens, is the logits.

    Args:
        batch: some rows, without labels.

    Raises:
        InputError: there is none, or the logits of a row are not finite.
    """
    if is_prompt_model(model):
        path = model.decoder_path
        return path, model.get_submodule(path)
    encoder = encoder_path(model)
    outside = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (encoder is None or not name.startswith(f"{encoder}."))
    }
    last: list[tuple[nn.Module, torch.Tensor]] = []
    handles = [module.register_forward_hook(lambda m, args, out: last.append((m, out))) for module in outside]
    try:
        with torch.no_grad(), evaluating(model), own_precision(model):
            logits = logits_of(model(**batch))
    finally:
        for handle in handles:
            handle.remove()
    _refuse_nan(logits, "the logits")
    classes = logits.shape[-1]
    for module, out in reversed(last):
        if out.shape[-1] == classes and bool((out.reshape(-1, classes)[:, None] == logits).all(-1).any(0).all()):
            return outside[module], module
        if out.ndim == 3 and out.shape[-1] == classes and _same(_mean(out, _mask(batch)), logits):
            return outside[module], module  # logits of every token, averaged: a linear head on the average
    raise InputError(
        f"{type(model).__name__} has no linear layer outside its encoder whose output is the logits; linear probing "
        "needs one"
    )


def _refuse_nan(values: torch.Tensor, what: str) -> None:
    """Raise an `InputError` for rows that the model has no finite result for, such as the mean over no token."""
    broken = (~values.isfinite()).reshape(len(values), -1).any(1)
    if broken.any():
        raise InputError(
            f"{what} of row {int(broken.nonzero()[0])} are not finite; remove rows without tokens (whose attention "
            "mask is 0), and load the model in float32 or bfloat16"
        )


def _mark_untrained(model: nn.Module, name: str) -> None:
    written = [f"{name}.{part}" for part, _ in model.get_submodule(name).named_parameters()]
    model.fresh_parameters = frozenset(getattr(model, "fresh_parameters", ())) | set(written)


def _mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The attention mask `[rows, tokens]`; of rows without tokens (images, sounds), zeros `[rows, 0]`."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is not None:
        return mask
    return torch.zeros(batch_size(batch), 0) if ids is None else torch.ones_like(ids)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each row's tokens except padding: `[rows, tokens, width]` -> `[rows, width]`."""
    if values.shape[:2] != mask.shape:
        return values.mean(1)
    return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def _averages(model: nn.Module, layer: nn.Linear, batch: dict[str, torch.Tensor]) -> bool:
    """Whether the logits are those of the mean of `layer`'s inputs over the tokens."""
    with own_precision(model), torch.no_grad():
        x, output = _seen(model, layer, lambda: model(**batch))
        if x.ndim != 3 or x.shape[1] == 1:
            return False
        return _same(layer(_mean(x, _mask(batch))), logits_of(output))


def _seen(model: nn.Module, layer: nn.Linear, run: Callable[[], Any]) -> tuple[torch.Tensor, Any]:
    """Inputs of `layer` during `run()`, and what that returns."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        with torch.no_grad(), evaluating(model):
            output = run()
    finally:
        handle.remove()
    return seen[-1], output


def _inputs(
    model: nn.Module, name: str, layer: nn.Linear, run: Callable[[], Any], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Inputs of `layer` during `run()`, `[rows, width]`, on the CPU: with `mask` their mean over the tokens."""
    x = _seen(model, layer, run)[0].float()
    if x.ndim == 3 and mask is not None:
        x = _mean(x, mask)
    if x.ndim == 3 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 2:
        raise InputError(
            f"{name} reads {x.shape[1]} vectors per row, not one, so no linear head can be fitted to it; use another "
            "model"
        )
    return x.cpu()


def _fit(model: nn.Module, x: np.ndarray, labels: np.ndarray, bias: bool, c, folds: int, max_iter: int) -> LinearFit:
    config = model.config
    if config.problem_type == REGRESSION or (config.num_labels == 1 and config.problem_type != MULTI_LABEL):
        if is_prompt_model(model):
            low, high = config.bounds
            position = ((labels.reshape(-1) - low) / (high - low)).clip(0, 1)
            return fit_probability(x, position, bias, c, folds, max_iter)
        check_row_labels(torch.from_numpy(labels), 1, REGRESSION)
        if labels.size != len(labels) * config.num_labels:
            raise InputError(
                f"each row has {labels.size // len(labels)} numbers as labels, and the model {config.num_labels} "
                "outputs; pass as many, or a model with num_labels of them"
            )
        return fit_regression(x, labels, bias, c)
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if labels.shape[1:] == (1,) and labels.dtype.kind != "f" and config.problem_type != MULTI_LABEL:
        labels = labels[:, 0]  # a class id in a list, as transformers' classifiers take it too
    if config.problem_type == MULTI_LABEL or (config.problem_type is None and labels.ndim == 2):
        if labels.shape != (len(x), len(names)):
            raise InputError(f"labels of shape {labels.shape} are not 0 or 1 for each of {len(names)} labels")
        check_row_labels(torch.from_numpy(labels), len(names), MULTI_LABEL)
        return fit_labels(x, labels, names, bias, c, folds, max_iter)
    if labels.dtype.kind == "f" or labels.ndim > 1:
        raise InputError(
            f"labels of shape {labels.shape} and type {labels.dtype} are not class ids; for several labels per row "
            'set config.problem_type = "multi_label_classification"'
        )
    return fit_classes(x, labels, names, bias, c, folds, max_iter)


def _device(model: nn.Module) -> torch.device:
    return input_device(model)
