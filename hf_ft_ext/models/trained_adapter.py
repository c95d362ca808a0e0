"""Loading the adapter that a run saved, on its base model, for evaluation and prediction."""

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, find_adapter_config_file

from hf_ft_ext.adapters.folder import ADAPTER_CONFIG
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.models.source import checked_name, is_hub_id, loading_errors_as_input_errors
from hf_ft_ext.training.finite import first_not_finite
from hf_ft_ext.training.weights.precision import HALF, train_in_float32

# What is read of an adapter's repository: configurations, tokenizer, and weights of the adapter alone.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "adapter_model.*")


@dataclass(frozen=True)
class TrainedAdapter:
    """The folder of a trained adapter.

    Attributes:
        name: the folder, or Hub id, that the user passed.
        folder: where its files are.
        base: folder or Hub id of its base model.
        revision: of the base model on the Hub.
    """

    name: str
    folder: str
    base: str
    revision: str

    @property
    def has_configuration(self) -> bool:
        """Whether the folder has the trained model's configuration, with its labels, as runs of this package save."""
        return os.path.isfile(os.path.join(self.folder, CONFIG_NAME))

    @property
    def has_generation_configuration(self) -> bool:
        """Whether the folder says how texts are generated."""
        return os.path.isfile(os.path.join(self.folder, GENERATION_CONFIG_NAME))

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has files of a tokenizer."""
        return next(Path(self.folder).glob("tokenizer*"), None) is not None


def find_adapter(name: str, revision: str = "main", **hub: Any) -> TrainedAdapter | None:
    """Return the adapter in a local folder or a repository of the Hub, or `None` if there is none.

    Args:
        name: folder or Hub id.
        revision: of the adapter on the Hub.
        hub: `cache_dir` and `token`.

    Raises:
        InputError: its files cannot be downloaded, its configuration cannot be read, or it names no base model.
    """
    folder = os.path.expanduser(name)
    if not os.path.isdir(folder):
        if not is_hub_adapter(name, revision, **hub):
            return None
        with loading_errors_as_input_errors(name, "adapter"):
            folder = snapshot_download(
                name, revision=revision, allow_patterns=_FILES, ignore_patterns="checkpoint-*", **hub
            )
    if not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        return None
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the configuration of the adapter in {name!r} cannot be read ({first_line(error)}); save or copy the "
            "adapter again"
        ) from error
    if not config.base_model_name_or_path:
        raise InputError(
            f"the adapter in {name!r} names no base model; set base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    try:
        base = checked_name(config.base_model_name_or_path)
    except InputError as error:
        raise InputError(
            f"the base model of the adapter in {name!r} is not usable: {error}; correct base_model_name_or_path in "
            f"its {ADAPTER_CONFIG}"
        ) from error
    return TrainedAdapter(name, folder, base, config.revision or "main")


def is_hub_adapter(name: str, revision: str = "main", **hub: Any) -> bool:
    """Whether the repository `name` of the Hub, or of its cache, holds a PEFT adapter; `False` for local paths."""
    if not is_hub_id(name):
        return False
    with loading_errors_as_input_errors(name, "configuration"):
        return find_adapter_config_file(name, revision=revision, **hub) is not None


def add_adapter(model: PreTrainedModel, adapter: TrainedAdapter, fresh: Collection[str] = ()) -> PeftModel:
    """Add a trained adapter to its base model, for inference.

    In 16 bits, modules that trained in full (the head) compute in float32, as in training.

    Args:
        fresh: names of parameters of the base model that were not loaded; the adapter has to contain them.

    Raises:
        InputError: the adapter cannot be read, does not fit the model, or lacks parameters.
    """
    folder = adapter.folder
    with loading_errors_as_input_errors(folder, "adapter"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            wrapped = PeftModel.from_pretrained(model, folder)
        except UserWarning as warning:
            raise InputError(
                f"the file of the adapter in {adapter.name!r} does not hold all of its weights "
                f"({first_line(warning)}); save or copy it again"
            ) from warning
        if model.dtype in HALF:  # peft has rounded the head to 16 bits
            set_peft_model_state_dict(train_in_float32(wrapped), load_peft_weights(folder, device="cpu"))
    saved = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        for name, _ in wrapped.named_parameters()
        if ".modules_to_save." in name
    }
    if missing := sorted(set(fresh) - saved):
        raise InputError(
            f"neither the adapter in {adapter.name!r} nor its base model has trained weights for {missing[0]}, so "
            "predictions would be random; pass an adapter that was saved with its head (modules_to_save)"
        )
    if (bad := first_not_finite(wrapped)) is not None:
        raise InputError(f"the adapter in {adapter.name!r} holds NaN or infinity in {bad}; save or copy it again")
    wrapped.eval()
    return wrapped
