"""Features of a frozen encoder (`head`, `rows`, `cache`), and heads fitted on them (`linear_probe`)."""

from hf_ft_ext.features.head import HeadReader, encoder_path, head_parameters

__all__ = ["HeadReader", "encoder_path", "head_parameters"]
