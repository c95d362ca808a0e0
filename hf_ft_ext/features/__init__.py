"""What a frozen encoder gives its head (`head`, `rows`, `cache`), and heads fitted on it (`linear_probe`)."""

from hf_ft_ext.features.head import HeadReader, encoder_path, evaluating, head_parameters

__all__ = ["HeadReader", "encoder_path", "evaluating", "head_parameters"]
