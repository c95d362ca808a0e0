"""The labels of a classification head: the data's, or the model's own if they match."""

import logging
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_ft_ext.metrics import CLASSIFICATION, REGRESSION

logger = logging.getLogger(__name__)


def set_labels(config: PreTrainedConfig, data: Any) -> None:
    """Write number, names and ids of the labels into `config`; keep the model's own if the names match.

    Afterwards `id2label` and `label2id` agree. Without labels in the data, the model's problem type is kept.
    """
    _sync_label2id(config)
    if data.problem_type == REGRESSION:
        config.problem_type, config.num_labels = REGRESSION, 1
    elif data.label_names is None:  # unlabelled rows, for prediction only
        own = REGRESSION if config.num_labels == 1 else CLASSIFICATION
        config.problem_type = getattr(config, "problem_type", None) or own
    else:
        config.problem_type = data.problem_type
        if not _same_labels(config.id2label or {}, data.label_names):
            config.num_labels = len(data.label_names)
            config.id2label = dict(enumerate(data.label_names))
            config.label2id = {label: i for i, label in enumerate(data.label_names)}


def _sync_label2id(config: PreTrainedConfig) -> None:
    """Make `label2id` the inverse of `id2label`, which names every output; a config.json may contradict itself."""
    by_id = {int(i): str(label) for i, label in (getattr(config, "id2label", None) or {}).items()}
    if not by_id:
        return
    own = {str(label): int(i) for label, i in (getattr(config, "label2id", None) or {}).items()}
    inverse = {label: i for i, label in sorted(by_id.items())}
    if own and own != inverse:
        shown = ", ".join(f"{i} = {label}" for i, label in sorted(by_id.items())[:10])
        logger.warning("id2label and label2id of the model's config.json contradict each other; using %s", shown)
    config.id2label, config.label2id = dict(sorted(by_id.items())), inverse


def _same_labels(id2label: dict[int, str], names: list[str]) -> bool:
    own = {str(label).lower() for label in id2label.values()}
    complete = sorted(id2label) == list(range(len(names)))
    return complete and len(own) == len(names) and own == {name.lower() for name in names}


def warn_of_renamed_labels(model: PreTrainedModel, before: list[str], name: str) -> None:
    """Log a warning if a trained head keeps its weights but its labels get other names."""
    after = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    generic = [f"LABEL_{i}" for i in range(len(before))]
    head = [key for key, _ in model.named_parameters() if not key.startswith(f"{model.base_model_prefix}.")]
    trained = head and not set(head) & set(model.fresh_parameters)
    if trained and len(before) == len(after) > 1 and before != after and before != generic:
        logger.warning(
            "The labels of %s are %s, those of the data %s: its head keeps its weights, and output 0 now stands for "
            "%r. Where these are the same labels in other words, rename those of the data.",
            name, ", ".join(before[:10]), ", ".join(after[:10]), after[0],
        )  # fmt: skip
