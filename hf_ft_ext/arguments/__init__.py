"""Arguments shared by all methods: the run, the model, the data.

A method's own arguments are defined in its folder, in a subclass of `MethodTrainingArguments`.
"""

from hf_ft_ext.arguments.data import (
    DEFAULT_LENGTH,
    FEW_SHOT_SPLITS,
    FEW_SHOT_TYPES,
    FINETUNE,
    FIRST,
    PROBLEM_TYPES,
    PROMPT,
    PROMPT_DEMO,
    QUOTINGS,
    RANDOM,
    SAMPLES,
    STRATIFIED,
    WORD_SCORINGS,
    DataArguments,
    FewShotArguments,
    LanguageArguments,
)
from hf_ft_ext.arguments.method import FeatureCacheArguments, Gradients, MethodTrainingArguments, own_fields
from hf_ft_ext.arguments.model import (
    AUTO,
    BITSANDBYTES_4BIT,
    BITSANDBYTES_8BIT,
    DTYPES,
    QUANTIZATIONS,
    TORCHAO_8BIT,
    ModelArguments,
)
from hf_ft_ext.arguments.run import CAUSAL_LM, SEQ2SEQ_LM, SEQUENCE_CLASSIFICATION, TASK_TYPES, RunArguments

__all__ = [
    "AUTO",
    "BITSANDBYTES_4BIT",
    "BITSANDBYTES_8BIT",
    "CAUSAL_LM",
    "DEFAULT_LENGTH",
    "DTYPES",
    "FEW_SHOT_SPLITS",
    "FEW_SHOT_TYPES",
    "FINETUNE",
    "FIRST",
    "PROBLEM_TYPES",
    "PROMPT",
    "PROMPT_DEMO",
    "QUANTIZATIONS",
    "QUOTINGS",
    "RANDOM",
    "SAMPLES",
    "SEQ2SEQ_LM",
    "SEQUENCE_CLASSIFICATION",
    "STRATIFIED",
    "TASK_TYPES",
    "TORCHAO_8BIT",
    "WORD_SCORINGS",
    "DataArguments",
    "FeatureCacheArguments",
    "FewShotArguments",
    "Gradients",
    "LanguageArguments",
    "MethodTrainingArguments",
    "ModelArguments",
    "RunArguments",
    "own_fields",
]
