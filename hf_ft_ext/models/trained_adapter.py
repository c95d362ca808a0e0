"""Loading the adapter that a run saved, on its base model, for evaluation and prediction."""

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hf_ft_ext.adapters.folder import ADAPTER_CONFIG
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.models.source import checked_name, loading_errors_as_input_errors
from hf_ft_ext.training.finite import first_not_finite
from hf_ft_ext.training.weights.precision import HALF, train_in_float32


@dataclass(frozen=True)
class TrainedAdapter:
    """The folder of a trained adapter.

    Attributes:
        folder: where it was saved.
        base: folder or Hub id of its base model.
        revision: of the base model on the Hub.
    """

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


def find_adapter(name: str) -> TrainedAdapter | None:
    """Return the adapter in a local folder, or `None` if the folder holds none.

    Raises:
        InputError: its configuration cannot be read, or its base model is not there.
    """
    folder = os.path.expanduser(name)
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
    return TrainedAdapter(folder, base, config.revision or "main")


def add_adapter(model: PreTrainedModel, folder: str, fresh: Collection[str] = ()) -> PeftModel:
    """Add the trained adapter in `folder` to its base model, for inference.

    In 16 bits, modules that trained in full (the head) compute in float32, as in training.

    Args:
        fresh: names of parameters of the base model that were not loaded; the adapter has to contain them.

    Raises:
        InputError: the adapter cannot be read, does not fit the model, or lacks parameters.
    """
    with loading_errors_as_input_errors(folder, "adapter"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            wrapped = PeftModel.from_pretrained(model, folder)
        except UserWarning as warning:
            raise InputError(
                f"the file of the adapter in {folder!r} does not hold all of its weights ({first_line(warning)}); "
                "save or copy it again"
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
            f"neither the adapter in {folder!r} nor its base model has trained weights for {missing[0]}, so "
            "predictions would be random; pass an adapter that was saved with its head (modules_to_save)"
        )
    if (bad := first_not_finite(wrapped)) is not None:
        raise InputError(f"the adapter in {folder!r} holds NaN or infinity in {bad}; save or copy it again")
    wrapped.eval()
    return wrapped
