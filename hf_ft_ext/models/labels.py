"""The labels of a classification head: the data's, or the model's own if they match."""

import logging
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import CLASSIFICATION, REGRESSION

logger = logging.getLogger(__name__)


def set_labels(config: PreTrainedConfig, data: Any, trains: bool = True) -> None:
    """Write number, names and ids of the labels into `config`; keep the model's own if the names match.

    Afterwards `id2label` and `label2id` agree. Without labels in the data, the model's problem type is kept.

    Args:
        data: the run's data (`label_names` and `problem_type` are read).
        trains: whether the run trains. If not, the model's own labels are also kept where the data has only some of
            them, by name or, for a head without names (`LABEL_0`, ...), by number.

    Raises:
        InputError: the data has a single class, which is not one of the model's.
    """
    _sync_label2id(config)
    if data.problem_type == REGRESSION:
        config.problem_type, config.num_labels = REGRESSION, 1
    elif data.label_names is None:  # unlabelled rows, for prediction only
        own = REGRESSION if config.num_labels == 1 else CLASSIFICATION
        config.problem_type = getattr(config, "problem_type", None) or own
    else:
        if not trains and getattr(config, "problem_type", None) not in (None, data.problem_type):
            logger.warning(
                "The model was trained for %s, and the labels of this data are for %s, as are scores and predictions.",
                config.problem_type,
                data.problem_type,
            )
        config.problem_type = data.problem_type
        by_id: dict[int, str] = config.id2label or {}
        names = list(data.label_names)
        if not trains and _is_generic(by_id) and set(names) < {str(i) for i in by_id}:
            names = [str(i) for i in sorted(by_id)]
        elif _same_labels(by_id, names) or (not trains and _holds_labels(by_id, names)):
            return
        if len(names) < 2 and data.problem_type == CLASSIFICATION:
            raise InputError(
                f"the data has only one class ({names[0]}), and the model's are "
                f"{', '.join(list(by_id.values())[:10])}; rename it, or add rows of other classes"
            )
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {label: i for i, label in enumerate(names)}


def check_untrained_head(model: PreTrainedModel, replaced: bool, own_labels: list[str], name: str) -> None:
    """Refuse to evaluate a new head in place of a trained one; warn if the model never had one.

    Args:
        model: a model that this run does not train; its `fresh_parameters` are set.
        replaced: whether the head of the file has another shape than that of the data's labels.
        own_labels: names of the labels in the model's file.
        name: folder or Hub id of the model, for messages.

    Raises:
        InputError: the head was replaced.
    """
    if replaced:
        regression = model.config.problem_type == REGRESSION
        wanted = "numbers" if regression else ", ".join(list(map(str, model.config.id2label.values()))[:10])
        outputs = f"{len(own_labels)} output{'s' * (len(own_labels) > 1)} ({', '.join(own_labels[:10])})"
        advice = f"--problem_type {REGRESSION}" if len(own_labels) == 1 else "data with the model's labels"
        raise InputError(
            f"model {name!r} was trained for {outputs}, but this data has {wanted}, and without training the head for "
            f"them is random; pass {advice}, or add --do_train"
        )
    head = sorted(key for key in model.fresh_parameters if not key.startswith(f"{model.base_model_prefix}."))
    if head:
        logger.warning(
            "Model %s has no trained %s, and this run does not train it: its scores and predictions are random.",
            name,
            head[0],
        )


def warn_of_renamed_labels(model: PreTrainedModel, before: list[str], name: str, trains: bool = True) -> None:
    """Log a warning if a trained head keeps its weights but its labels get other names.

    Raises:
        InputError: the run does not train, and some of the names are the model's, for other outputs perhaps.
    """
    after = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    generic = [f"LABEL_{i}" for i in range(len(before))]
    head = [key for key, _ in model.named_parameters() if not key.startswith(f"{model.base_model_prefix}.")]
    trained = head and not set(head) & set(model.fresh_parameters)
    if trained and len(before) == len(after) > 1 and before != after and before != generic:
        common = {label.lower() for label in before} & {label.lower() for label in after}
        if common and not trains and sorted(map(str.lower, before)) != sorted(map(str.lower, after)):
            raise InputError(
                f"model {name!r} was trained for the labels {', '.join(before[:10])}, but this data has "
                f"{', '.join(after[:10])}; rename those of the data that mean the same, or add --do_train"
            )
        logger.warning(
            "The labels of %s are %s, those of the data %s: its head keeps its weights, and output 0 now stands for "
            "%r. Where these are the same labels in other words, rename those of the data.",
            name, ", ".join(before[:10]), ", ".join(after[:10]), after[0],
        )  # fmt: skip


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
    return len(id2label) == len(names) and _holds_labels(id2label, names)


def _holds_labels(id2label: dict[int, str], names: list[str]) -> bool:
    """Whether the data's labels are, ignoring case, among those of a model that names each of its outputs."""
    own = {str(label).lower() for label in id2label.values()}
    wanted = {name.lower() for name in names}
    complete = sorted(id2label) == list(range(len(own)))
    return complete and len(wanted) == len(names) and wanted <= own


def _is_generic(id2label: dict[int, str]) -> bool:
    return [str(id2label.get(i)) for i in range(len(id2label))] == [f"LABEL_{i}" for i in range(len(id2label))]
