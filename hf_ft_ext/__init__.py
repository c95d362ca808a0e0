"""hf_ft_ext: published fine-tuning methods as Hugging Face Trainers.

The public names are imported when first used, so that `import hf_ft_ext` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ft_ext.adapters.registration import register_when_peft_is_there

if TYPE_CHECKING:  # the same table, for those who read types; `tests/test_types.py` compares the two
    from hf_ft_ext.adapters.bottleneck.config import BottleneckConfig as BottleneckConfig
    from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig as LayerPrefixConfig
    from hf_ft_ext.adapters.layer_prefix.model import keep_projection as keep_projection
    from hf_ft_ext.adapters.mixture.config import LayerMixtureConfig as LayerMixtureConfig
    from hf_ft_ext.data.demo import demo_dataset as demo_dataset
    from hf_ft_ext.data.few_shot import few_shot_data as few_shot_data
    from hf_ft_ext.entries.delta import load_entries as load_entries
    from hf_ft_ext.entries.delta import save_entries as save_entries
    from hf_ft_ext.entries.layer import attach_entries as attach_entries
    from hf_ft_ext.entries.layer import merge_entries as merge_entries
    from hf_ft_ext.errors import InputError as InputError
    from hf_ft_ext.fisher.arguments import FisherTrainingArguments as FisherTrainingArguments
    from hf_ft_ext.fisher.information import fisher_information as fisher_information
    from hf_ft_ext.fisher.plan import AdapterPlan as AdapterPlan
    from hf_ft_ext.fisher.selection import select_adapters as select_adapters
    from hf_ft_ext.fisher.trainer import FisherTrainer as FisherTrainer
    from hf_ft_ext.full.arguments import FullTrainingArguments as FullTrainingArguments
    from hf_ft_ext.full.signgd import SignGD as SignGD
    from hf_ft_ext.full.trainer import FullTrainer as FullTrainer
    from hf_ft_ext.gradientless.arguments import GradientlessTrainingArguments as GradientlessTrainingArguments
    from hf_ft_ext.gradientless.direct_search import DirectSearch as DirectSearch
    from hf_ft_ext.gradientless.spsa import SPSA as SPSA
    from hf_ft_ext.gradientless.trainer import GradientlessTrainer as GradientlessTrainer
    from hf_ft_ext.kernel.arguments import KernelTrainingArguments as KernelTrainingArguments
    from hf_ft_ext.kernel.ntk import empirical_ntk as empirical_ntk
    from hf_ft_ext.kernel.trainer import KernelTrainer as KernelTrainer
    from hf_ft_ext.linear_probe import fit_linear_head as fit_linear_head
    from hf_ft_ext.linearhead.arguments import LinearHeadTrainingArguments as LinearHeadTrainingArguments
    from hf_ft_ext.linearhead.trainer import LinearHeadTrainer as LinearHeadTrainer
    from hf_ft_ext.lora.arguments import LoraTrainingArguments as LoraTrainingArguments
    from hf_ft_ext.lora.trainer import LoraTrainer as LoraTrainer
    from hf_ft_ext.models import demo_encoder as demo_encoder
    from hf_ft_ext.prompts.configuration import PromptConfig as PromptConfig
    from hf_ft_ext.prompts.encode import PromptEncoder as PromptEncoder
    from hf_ft_ext.prompts.model import PromptForSequenceClassification as PromptForSequenceClassification
    from hf_ft_ext.sparse.arguments import SparseTrainingArguments as SparseTrainingArguments
    from hf_ft_ext.sparse.convert import convert_to_sparse as convert_to_sparse
    from hf_ft_ext.sparse.convert import merge_sparse as merge_sparse
    from hf_ft_ext.sparse.convert import sparse_layers as sparse_layers
    from hf_ft_ext.sparse.delta import load_delta as load_delta
    from hf_ft_ext.sparse.delta import save_delta as save_delta
    from hf_ft_ext.sparse.export import export_lora as export_lora
    from hf_ft_ext.sparse.layer import SparseGradLinear as SparseGradLinear
    from hf_ft_ext.sparse.optimizer import SparseAdamW as SparseAdamW
    from hf_ft_ext.sparse.prepare import compute_bases as compute_bases
    from hf_ft_ext.sparse.prepare import prepare_layers as prepare_layers
    from hf_ft_ext.sparse.trainer import SparseTrainer as SparseTrainer
    from hf_ft_ext.training.resources import ResourceMonitor as ResourceMonitor

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


if not TYPE_CHECKING:  # else any name would pass for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
