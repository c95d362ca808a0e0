"""hf_ft_ext: published fine-tuning methods as Hugging Face Trainers.

The public names are imported when first used, so that `import hf_ft_ext` costs next to nothing.
"""

from importlib import import_module

from hf_ft_ext.adapters.registration import register_when_peft_is_there

__version__ = "0.1.0"

_EXPORTS = {
    "AdapterPlan": "hf_ft_ext.fisher.plan",
    "attach_entries": "hf_ft_ext.entries.layer",
    "BottleneckConfig": "hf_ft_ext.adapters.bottleneck.config",
    "compute_bases": "hf_ft_ext.sparse.prepare",
    "convert_to_sparse": "hf_ft_ext.sparse.convert",
    "demo_dataset": "hf_ft_ext.data.demo",
    "demo_encoder": "hf_ft_ext.models",
    "DirectSearch": "hf_ft_ext.gradientless.direct_search",
    "empirical_ntk": "hf_ft_ext.kernel.ntk",
    "export_lora": "hf_ft_ext.sparse.export",
    "FullTrainer": "hf_ft_ext.full.trainer",
    "FullTrainingArguments": "hf_ft_ext.full.arguments",
    "GradientlessTrainer": "hf_ft_ext.gradientless.trainer",
    "GradientlessTrainingArguments": "hf_ft_ext.gradientless.arguments",
    "InputError": "hf_ft_ext.errors",
    "few_shot_data": "hf_ft_ext.data.few_shot",
    "fit_linear_head": "hf_ft_ext.linear_probe",
    "LinearHeadTrainer": "hf_ft_ext.linearhead.trainer",
    "LinearHeadTrainingArguments": "hf_ft_ext.linearhead.arguments",
    "fisher_information": "hf_ft_ext.fisher.information",
    "FisherTrainer": "hf_ft_ext.fisher.trainer",
    "FisherTrainingArguments": "hf_ft_ext.fisher.arguments",
    "keep_projection": "hf_ft_ext.adapters.layer_prefix.model",
    "LayerMixtureConfig": "hf_ft_ext.adapters.mixture.config",
    "LayerPrefixConfig": "hf_ft_ext.adapters.layer_prefix.config",
    "KernelTrainer": "hf_ft_ext.kernel.trainer",
    "KernelTrainingArguments": "hf_ft_ext.kernel.arguments",
    "load_delta": "hf_ft_ext.sparse.delta",
    "load_entries": "hf_ft_ext.entries.delta",
    "LoraTrainer": "hf_ft_ext.lora.trainer",
    "LoraTrainingArguments": "hf_ft_ext.lora.arguments",
    "merge_entries": "hf_ft_ext.entries.layer",
    "merge_sparse": "hf_ft_ext.sparse.convert",
    "prepare_layers": "hf_ft_ext.sparse.prepare",
    "PromptConfig": "hf_ft_ext.prompts.configuration",
    "PromptEncoder": "hf_ft_ext.prompts.encode",
    "PromptForSequenceClassification": "hf_ft_ext.prompts.model",
    "ResourceMonitor": "hf_ft_ext.training.resources",
    "select_adapters": "hf_ft_ext.fisher.selection",
    "save_delta": "hf_ft_ext.sparse.delta",
    "SignGD": "hf_ft_ext.full.signgd",
    "save_entries": "hf_ft_ext.entries.delta",
    "sparse_layers": "hf_ft_ext.sparse.convert",
    "SparseAdamW": "hf_ft_ext.sparse.optimizer",
    "SparseGradLinear": "hf_ft_ext.sparse.layer",
    "SparseTrainer": "hf_ft_ext.sparse.trainer",
    "SparseTrainingArguments": "hf_ft_ext.sparse.arguments",
    "SPSA": "hf_ft_ext.gradientless.spsa",
}

__all__ = sorted(_EXPORTS)

register_when_peft_is_there()  # so that `PeftModel.from_pretrained` knows our adapters


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
