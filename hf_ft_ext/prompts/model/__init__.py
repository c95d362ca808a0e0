"""`PromptForSequenceClassification`: a language model whose word at one position is the class."""

from hf_ft_ext.prompts.model.classifier import PromptForSequenceClassification, architecture, is_prompt_model

__all__ = ["PromptForSequenceClassification", "architecture", "is_prompt_model"]
