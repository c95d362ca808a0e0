"""The former place of `hf_ft_ext.files`."""

import warnings

from hf_ft_ext.files import replacing, tensor_hash, write_json, write_text

__all__ = ["replacing", "tensor_hash", "write_json", "write_text"]

warnings.warn("hf_ft_ext.training.files has moved to hf_ft_ext.files", DeprecationWarning, stacklevel=2)
