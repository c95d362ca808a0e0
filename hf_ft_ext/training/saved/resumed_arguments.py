"""Comparing the arguments of a resumed run with those that its checkpoint was written with.

A checkpoint decides some settings itself: what a pre-pass chose, and what the optimizer's state holds. Others apply
and change the course of the run. Neither happens silently.
"""

import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from hf_ft_ext.errors import InputError
from hf_ft_ext.files import write_json
from hf_ft_ext.training.sharing.privacy import hide_tokens, is_secret

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "checkpoint_arguments.json"
_FORMAT = "hf_ft_ext arguments 1"

# Arguments that do not change what a training step computes: logging, evaluation, saving, sharing, the end of
# training, devices. All others do, also those of classes that this package does not know.
_HARMLESS = frozenset({
    "num_train_epochs", "max_steps", "early_stopping_patience", "ignore_data_skip", "resume_from_checkpoint",
    "restore_callback_states_from_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "do_train", "do_eval", "do_predict", "prediction_loss_only", "batch_eval_metrics", "per_device_eval_batch_size",
    "bf16_full_eval", "fp16_full_eval", "disable_tqdm", "report_to", "run_name", "project", "debug", "log_level",
    "log_level_replica", "log_on_each_node", "skip_memory_metrics", "include_for_metrics", "enable_jit_checkpoint",
    "include_num_input_tokens_seen", "use_cpu", "local_rank", "tf32", "deepspeed", "use_cache", "accelerator_config",
    "parallelism_config", "torch_empty_cache_steps", "auto_find_batch_size", "activation_offloading",
    "trust_remote_code", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "dataset_num_proc",
    "device_map", "attn_implementation", "method", "recipe_row", "overwrite_output_dir", "dry_run", "hp_search",
    "prediction_probabilities", "validation_split", "validation_file", "test_split", "test_file", "max_eval_samples",
    "max_predict_samples", "metric", "positive_label", "multi_label_threshold", "predict_with_generate",
    "max_new_tokens", "num_beams", "feature_cache_gb", "search_candidates_per_forward", "search_trajectory",
    "max_evaluations_per_step", "sparse_show_steps",
})  # fmt: skip
_HARMLESS_BEGINNINGS = (
    "logging_", "save_", "eval_", "hub_", "push_to_hub", "trackio_", "ddp_", "fsdp", "torch_compile",
    "gradient_checkpointing", "activation_checkpointing",
)  # fmt: skip

_TEXT_TOKENS = ("pad_token", "eos_token")  # trl's arguments, tokens of a text

# Keys of an optimizer's parameter groups -> the arguments that set them; others end with the key.
_ARGUMENTS_OF_KEY = {
    "lr": ("learning_rate", "fisher_learning_rates"),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "num_candidates": ("search_candidates",),
}
_NOT_SETTINGS = ("params", "initial_lr", "fused", "foreach", "capturable", "differentiable")


def compared_arguments(*arguments: Any) -> dict[str, Any]:
    """The arguments in these dataclasses that change what a training step computes, as JSON values by name."""
    found = {}
    for each in arguments:
        for f in fields(each):
            if f.init and not _is_harmless(f.name) and hasattr(each, f.name):
                found[f.name] = _plain(getattr(each, f.name))
    return found


def compared_settings(args: TrainingArguments, model: nn.Module, of_launcher: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run that are compared: arguments, processes, and dropout of model and adapters."""
    found = {**of_launcher, **compared_arguments(args), "world_size": args.world_size}
    configs: dict[str, Any] = {"model.config": getattr(model, "config", None)}
    if isinstance(model, PeftModel):
        configs["peft_config"] = model.active_peft_config
    for place, config in configs.items():
        values = config.to_dict() if hasattr(config, "to_dict") else {}
        for name, value in values.items():
            if "drop" in name and not hasattr(args, name):
                found[f"{place}.{name}"] = _plain(value)
    return found


def write_arguments(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into its checkpoint `folder`."""
    write_json(Path(folder) / ARGUMENTS_FILE, {"format": _FORMAT, "arguments": dict(settings)})


def read_arguments(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The settings in a checkpoint; `None` if it has no readable record, as those of earlier versions."""
    try:
        found = json.loads((Path(folder) / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return None
    return found["arguments"] if isinstance(found.get("arguments"), dict) else None


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's.

    Attributes:
        now: its value in this run.
        before: its value in the run that wrote the checkpoint.
    """

    name: str
    now: Any
    before: Any

    def __str__(self) -> str:
        return f"{self.name}={self.now} (checkpoint: {self.before})"


def changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[Change]:
    """The settings of both runs whose values differ; one that only one of them has is of another version."""
    return [Change(name, now[name], before[name]) for name in now if name in before and now[name] != before[name]]


def optimizer_settings(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    """The settings in an optimizer's parameter groups; `lr` is the rate before its schedule."""
    found = []
    for group in () if optimizer is None else optimizer.param_groups:
        settings = {key: _plain(value) for key, value in group.items() if key not in _NOT_SETTINGS}
        found.append({**settings, "lr": _plain(group.get("initial_lr", group.get("lr")))})
    return found


def report_changes(
    folder: str,
    differing: Iterable[Change],
    settled: Collection[str],
    before_loading: list[dict[str, Any]],
    after_loading: list[dict[str, Any]],
) -> None:
    """Refuse or report what differs from the checkpoint `folder`.

    Args:
        differing: the differing settings.
        settled: names of arguments that have no effect any more, as what they decide is in the checkpoint.
        before_loading: the optimizer's settings before its state was loaded.
        after_loading: those after that.

    Raises:
        InputError: one of `settled` differs.
    """
    differing = list(differing)
    for change in differing:
        if change.name in settled:
            before, back = f"with {change.name}={change.before}", f"pass {change.before}"
            if change.before is None:
                before, back = "without it", "leave it out"
            raise InputError(
                f"--resume_from_checkpoint: {change.name}={change.now} has no effect, because {folder!r} holds what "
                f"was chosen {before}; {back}, or start a new run"
            )
    replaced = _replaced(before_loading, after_loading)
    kept, applied, explained = [], [], set()
    for change in differing:
        keys = {key for key in replaced if _sets(change, key)}
        explained |= keys
        (kept if keys else applied).append(str(change))
    kept += [str(Change(key, *replaced[key])) for key in replaced if key not in explained]
    if applied:
        logger.warning(
            "These arguments differ from those of the checkpoint %r and change the course of the run: %s. Pass the "
            "checkpoint's values to get what an uninterrupted run gives.", folder, ", ".join(applied),
        )  # fmt: skip
    if kept:
        logger.warning(
            "These settings have no effect, because the optimizer's state in %r holds them: %s. Start a new run from "
            "the checkpoint's model to change them.", folder, ", ".join(kept),
        )  # fmt: skip


def _is_harmless(name: str) -> bool:
    secret = is_secret(name) and name not in _TEXT_TOKENS
    return name in _HARMLESS or name.startswith(_HARMLESS_BEGINNINGS) or name.endswith("_dir") or secret


def _replaced(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """The settings that loading a state replaced: the value of this run and the checkpoint's, by key."""
    found: dict[str, tuple[Any, Any]] = {}
    for own, loaded in zip(before, after, strict=False):
        for key in own.keys() & loaded.keys():
            if own[key] != loaded[key]:
                found.setdefault(key, (own[key], loaded[key]))
    return found


def _sets(change: Change, key: str) -> bool:
    """Whether the changed argument sets the key of a parameter group."""
    if change.name == "optim_args":  # such as `momentum=0.9,nesterov=true`
        return any(re.search(rf"\b{key}\b", str(text)) for text in (change.now, change.before))
    if key in _ARGUMENTS_OF_KEY:
        return change.name in _ARGUMENTS_OF_KEY[key]
    return change.name == key or change.name.endswith(f"_{key}")


def _plain(value: Any) -> Any:
    """`value` as it comes back from a JSON file, without access tokens."""
    text = hide_tokens(json.dumps(value, default=_text, skipkeys=True))
    return json.loads(text, parse_constant=lambda name: None)  # as `write_json` writes numbers that are not finite


def _text(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    # The default text of an object holds its address.
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else str(value)
