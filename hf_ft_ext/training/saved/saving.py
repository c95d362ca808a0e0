"""Saving complete adapters (with the model's configuration), and the configuration that training and saving need."""

import concurrent.futures
import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint

from hf_ft_ext.adapters.folder import save_configuration, set_base_name
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.training.saved.checkpoints import (
    check_labels,
    check_moments,
    check_weights,
    loading_saved_state_dict,
)
from hf_ft_ext.training.saved.resumed_arguments import (
    changes,
    compared_settings,
    optimizer_settings,
    read_arguments,
    report_changes,
    write_arguments,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

# Outputs besides logits that a configuration may request, with the values that training needs.
_PLAIN_OUTPUTS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


class CompleteSaves(_Trainer):
    """Mixin for a `Trainer` (before it in the bases): adapters are saved with their labels, models return only logits.

    `plain_outputs` and `keep_weights_in_evaluation` are applied to the trainer's model and to each model that
    `model_init` returns. Checkpoints hold the run's arguments, with which those of a resumed run are compared.

    Attributes:
        launcher_settings: settings of the run that `args` lack, such as those of its data, by name.
    """

    launcher_settings: Mapping[str, Any] = {}
    _shares = False  # whether what is saved is pushed at once

    def __init__(self, model: nn.Module | None = None, *positional, **kwargs):
        if isinstance(model, nn.Module):
            plain_outputs(model)
            keep_weights_in_evaluation(model)
        super().__init__(model, *positional, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        plain_outputs(model)
        keep_weights_in_evaluation(model)
        return model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        loaded = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            check_labels(resume_from_checkpoint, loaded)
        else:  # this process holds all weights
            check_weights(resume_from_checkpoint, loaded)
        with loading_saved_state_dict(loaded, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        # transformers saves states of callbacks under the names in the checkpoint, where a new callback has none.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

    def settled_arguments(self, checkpoint: str) -> tuple[str, ...]:
        """Names of the arguments whose result `checkpoint` holds, so that a resumed run does not read them."""
        return ("from_linearhead",)  # the checkpoint holds the head

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        before = optimizer_settings(self.optimizer)
        self._load_state_of_optimizer(checkpoint)
        if checkpoint is None:
            return
        recorded = read_arguments(checkpoint)
        if recorded is None:
            logger.info("%s has no record of arguments, so those of this run are not compared.", checkpoint)
        differing = changes(self._settings(), recorded or {})
        settled = self.settled_arguments(checkpoint)
        report_changes(checkpoint, differing, settled, before, optimizer_settings(self.optimizer))

    def _settings(self) -> dict[str, Any]:
        return compared_settings(self.args, self.model, self.launcher_settings)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            write_arguments(os.path.join(self._get_output_dir(trial=trial), name), self._settings())

    def _load_state_of_optimizer(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.optimizer is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        groups = [set(group) for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            if groups != [set(group) for group in self.optimizer.param_groups]:
                raise ValueError("it belongs to another optimizer")  # torch would load its settings without an error
            check_moments(self.optimizer)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"--resume_from_checkpoint: the optimizer's state in {checkpoint!r} does not fit "
                f"({first_line(error)}); pass the arguments that the run started with"
            ) from error

    def _load_best_model(self) -> None:
        with loading_saved_state_dict(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.model
        if isinstance(model, PeftModel):
            set_base_name(model)
        super()._save(output_dir, state_dict)
        if isinstance(model, PeftModel) and self.args.should_save:
            save_configuration(model, output_dir if output_dir is not None else self.args.output_dir, self._shares)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy == HubStrategy.END:
            return
        with self._sharing(checkpoint_folder):
            super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *positional, **kwargs) -> Any:
        with self._sharing(self.args.output_dir):
            pushed = super().push_to_hub(*positional, **kwargs)
            if isinstance(self.model, PeftModel) and isinstance(pushed, Future):
                concurrent.futures.wait([pushed])
        return pushed

    @contextlib.contextmanager
    def _sharing(self, folder: str) -> Iterator[None]:
        """A context in which `folder` is pushed: without the files of an adapter that this machine alone can use.

        transformers would take the base model's files, which they name, for parts of the checkpoint.
        """
        if not isinstance(self.model, PeftModel) or not self.is_world_process_zero():
            yield
            return
        self._shares = True
        try:
            save_configuration(self.model, folder, shared=True)
            yield
            self._finish_current_push()  # the files come back after the upload
        finally:
            self._shares = False
            save_configuration(self.model, folder)


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """The folder that `Trainer.train(resume_from_checkpoint)` continues from; `True` is the latest in `output_dir`.

    Raises:
        InputError: there is none.
    """
    if not resume_from_checkpoint:
        return None
    if isinstance(resume_from_checkpoint, bool):
        found = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
        if found is None:
            raise InputError(f"resume_from_checkpoint=True: {output_dir!r} holds no checkpoint; leave it out")
        return found
    if not os.path.isdir(resume_from_checkpoint):
        raise InputError(
            f"resume_from_checkpoint={resume_from_checkpoint!r} is not a folder; pass a checkpoint-<step> of a run"
        )
    return resume_from_checkpoint


def plain_outputs(model: nn.Module) -> None:
    """Switch off all outputs besides loss and logits in the model's configuration.

    Attention weights and hidden states of all layers cost memory in each step, and evaluation would treat them as
    extra predictions. `return_dict=False` gives tuples, which our losses do not read. The saved configuration keeps
    these values; request such outputs in the call (`model(..., output_attentions=True)`) or in `from_pretrained`.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    changed = {}
    for config in configs.values():
        if isinstance(config, PreTrainedConfig):
            changed |= _make_plain(config)
    if changed:
        logger.info(
            "The model's configuration asks for %s: set to %s for training and in what is saved.",
            ", ".join(changed),
            ", ".join(f"{name}={value}" for name, value in changed.items()),
        )


def keep_weights_in_evaluation(model: nn.Module) -> None:
    """Set `rescale_every=0` in RWKV models, whose forward pass otherwise changes weights in place.

    transformers divides the weights of deeper layers by powers of two at the first forward pass in evaluation mode,
    and multiplies them at the next one in training mode. Logits are the same up to layer normalization's epsilon. What
    is saved in between is divided again when it is loaded, and changes by an adapter or a search are not divided along
    with the weights. The division keeps float16 from overflowing.
    """
    for module in model.modules():
        if not hasattr(module, "layers_are_rescaled") or module.config.rescale_every <= 0:
            continue
        if module.layers_are_rescaled:
            if not module.blocks[0].attention.output.weight.is_floating_point():
                continue  # quantized weights cannot be multiplied back; they do not train either
            before, module.training = module.training, True
            module._rescale_layers()
            module.training = before
        if len(module.blocks) > module.config.rescale_every:
            logger.warning(
                "rescale_every=%d of the model's configuration is set to 0 for training and in what is saved: "
                "evaluation would change the weights in place. Load an adapter with "
                "AutoPeftModelForCausalLM.from_pretrained(folder, rescale_every=0).", module.config.rescale_every,
            )  # fmt: skip
        module.config.rescale_every = 0


def _make_plain(config: PreTrainedConfig) -> dict[str, bool]:
    changed = {}
    for name, value in _PLAIN_OUTPUTS.items():
        if bool(getattr(config, name, value)) != value:
            setattr(config, name, value)
            changed[name] = value
    return changed
