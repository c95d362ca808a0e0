"""Combinations of arguments for the launcher, sensible and not: what hypothesis draws from."""

import dataclasses
import typing

from hypothesis import strategies as st
from transformers import TrainingArguments

from hf_ft_ext.arguments import DataArguments, FewShotArguments, RunArguments
from hf_ft_ext.launch.parsing import Parser
from hf_ft_ext.methods import METHODS

_TEXTS = ("", "nonsense", "none", "auto", "all", "head", "0", "-1", "a b", "{}", "[]", "{'a': 1}", '{"r": -1}',
          '{"lora": {"r": 0}}', "{", ".*", "(", "dense", "1x1", "0x0", "2x2", "./nowhere", "\u00e9\u2603")  # fmt: skip
_WHOLE = (-1, 0, 1, 2, 3, 7, 50)
_NUMBERS = ("-1", "0", "1e-30", "1e-3", "0.1", "0.5", "1", "1.5", "50", "1e30", "nan", "inf", "-inf")
# Arguments of transformers that a user of the launcher sets, and that neither fetch nor compile anything.
_TRAINING = (
    "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps optim optim_args per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps eval_accumulation_steps eval_strategy eval_steps eval_delay save_strategy save_steps "
    "save_total_limit save_only_model logging_strategy logging_steps logging_first_step logging_nan_inf_filter seed "
    "data_seed full_determinism bf16 fp16 label_smoothing_factor load_best_model_at_end metric_for_best_model "
    "greater_is_better gradient_checkpointing train_sampling_strategy length_column_name dataloader_drop_last "
    "neftune_noise_alpha remove_unused_columns label_names prediction_loss_only batch_eval_metrics "
    "include_for_metrics eval_on_start max_steps use_cpu average_tokens_across_devices torch_empty_cache_steps "
    "ignore_data_skip restore_callback_states_from_checkpoint do_train do_eval do_predict"
).split()
_NOT_DRAWN = {"train_file", "validation_file", "test_file", "dataset_name", "dataset_config_name", "hp_search",
              "method", "overwrite_output_dir", "feature_cache_dir", "kernel_dir", "export_kernels"}  # fmt: skip


def drawn_names(method: str) -> list[str]:
    """The arguments that are drawn for `method`: its own, the launcher's, and transformers' usual ones."""
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    own = [f.name for f in dataclasses.fields(METHODS[method].arguments_class()) if f.init]
    shared = [f.name for t in (RunArguments, FewShotArguments, DataArguments) for f in dataclasses.fields(t) if f.init]
    names = [*(name for name in own if name not in inherited or name in _TRAINING), *shared]
    return list(dict.fromkeys(name for name in names if name not in _NOT_DRAWN))


def commands(method: str, most: int = 4) -> st.SearchStrategy[list[str]]:
    """Words of one to `most` arguments, half of them the method's own where it has any.

    Values are of the right kind or not, in range or not.
    """
    parser = Parser(METHODS[method])
    names = drawn_names(method)
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    method_only = {f.name for f in dataclasses.fields(METHODS[method].arguments_class()) if f.init} - inherited
    own = [name for name in names if name in method_only]
    choice = st.sampled_from(names) if not own else st.one_of(st.sampled_from(own), st.sampled_from(names))

    def words(name: str) -> st.SearchStrategy[list[str]]:
        values = st.sampled_from(_values(name, parser.hints[name], parser.choices.get(name)))
        return values.map(lambda value: [f"--{name}={value}"])

    one = choice.flatmap(words)
    return st.lists(one, min_size=1, max_size=most).map(lambda lists: [word for words in lists for word in words])


def _values(name: str, hint: object, choices: list[str] | None) -> list[str]:
    """What may be given for an argument: of its kind, at and beyond the edges, and a word of another kind."""
    kinds = {hint, *typing.get_args(hint)}
    found: list[str] = []
    if choices:
        found += [*choices, *choices, "nonsense"]  # mostly one that exists
    if bool in kinds:
        found += ["true", "false", "true", "maybe"]
    if int in kinds:
        found += map(str, _WHOLE)
    if float in kinds:
        found += _NUMBERS
    if not found or (str in kinds and not choices):
        found += _TEXTS
    if name == "max_steps":
        found = ["-2", "0", "1", "2"]  # -1 is the whole of num_train_epochs
    if name == "num_train_epochs":
        found = ["-1", "0", "0.5", "1", "nan", "inf"]
    return found
