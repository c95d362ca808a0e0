"""Features of a frozen encoder (`head`, `rows`, `cache`), and heads fitted on them (`linear_probe`)."""

from hf_ft_ext.features.head import HeadReader, head_parameters
from hf_ft_ext.structure.heads import encoder_path

__all__ = ["HeadReader", "encoder_path", "head_parameters"]
