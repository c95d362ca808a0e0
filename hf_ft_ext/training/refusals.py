"""Reporting errors that a model's own code raises on the first training batch as bad input, not as a traceback."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import transformers
from torch import nn

from hf_ft_ext.errors import InputError

_MODELS = str(Path(transformers.__file__).parent / "models")


@contextlib.contextmanager
def model_errors_as_input_errors(model: nn.Module, first: bool) -> Iterator[None]:
    """Turn a `ValueError` of the model's code into an `InputError` while nothing has been trained yet (`first`).

    Some models take batches in evaluation that they refuse in training, such as Reformer with a length that its
    position embeddings do not cover.
    """
    try:
        yield
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not first or isinstance(error, InputError) or not frames[-1].filename.startswith(_MODELS):
            raise
        raise InputError(
            f"{type(model).__name__} refuses the first training batch: {str(error).rstrip('.')}. Change the data's "
            "lengths (--max_seq_length, --pad_to_max_length) or the model's configuration"
        ) from error
