"""`PromptForSequenceClassification`: a classifier by the word that a language model predicts at one position."""

from hf_ft_ext.prompts.model.classifier import PromptForSequenceClassification, architecture, is_prompt_model

__all__ = ["PromptForSequenceClassification", "architecture", "is_prompt_model"]
