"""The public names. `__init__.py` reads this file and imports each name when it is first used."""

from .adapters.bottleneck.config import BottleneckConfig as BottleneckConfig
from .adapters.layer_prefix.config import LayerPrefixConfig as LayerPrefixConfig
from .adapters.layer_prefix.model import keep_projection as keep_projection
from .adapters.mixture.config import LayerMixtureConfig as LayerMixtureConfig
from .adapters.sparse_grad.config import SparseGradConfig as SparseGradConfig
from .data.few_shot import few_shot_data as few_shot_data
from .demo.dataset import demo_dataset as demo_dataset
from .demo.encoder import demo_encoder as demo_encoder
from .entries.delta import load_entries as load_entries
from .entries.delta import save_entries as save_entries
from .entries.export import export_shira as export_shira
from .entries.layer import attach_entries as attach_entries
from .entries.layer import merge_entries as merge_entries
from .errors import InputError as InputError
from .fisher.arguments import FisherTrainingArguments as FisherTrainingArguments
from .fisher.information import fisher_information as fisher_information
from .fisher.plan import AdapterPlan as AdapterPlan
from .fisher.selection import select_adapters as select_adapters
from .fisher.trainer import FisherTrainer as FisherTrainer
from .full.arguments import FullTrainingArguments as FullTrainingArguments
from .full.signgd import SignGD as SignGD
from .full.trainer import FullTrainer as FullTrainer
from .gradientless.arguments import GradientlessTrainingArguments as GradientlessTrainingArguments
from .gradientless.direct_search import DirectSearch as DirectSearch
from .gradientless.spsa import SPSA as SPSA
from .gradientless.trainer import GradientlessTrainer as GradientlessTrainer
from .kernel.arguments import KernelTrainingArguments as KernelTrainingArguments
from .kernel.ntk import empirical_ntk as empirical_ntk
from .kernel.trainer import KernelTrainer as KernelTrainer
from .linear_probe import fit_linear_head as fit_linear_head
from .linearhead.arguments import LinearHeadTrainingArguments as LinearHeadTrainingArguments
from .linearhead.trainer import LinearHeadTrainer as LinearHeadTrainer
from .lora.arguments import LoraTrainingArguments as LoraTrainingArguments
from .lora.trainer import LoraTrainer as LoraTrainer
from .metrics.function import MetricFunction as MetricFunction
from .metrics.function import metric_function as metric_function
from .prompts.configuration import PromptConfig as PromptConfig
from .prompts.encode import PromptEncoder as PromptEncoder
from .prompts.model import PromptForSequenceClassification as PromptForSequenceClassification
from .sparse.arguments import SparseTrainingArguments as SparseTrainingArguments
from .sparse.convert import convert_to_sparse as convert_to_sparse
from .sparse.convert import merge_sparse as merge_sparse
from .sparse.convert import sparse_layers as sparse_layers
from .sparse.delta import load_delta as load_delta
from .sparse.delta import save_delta as save_delta
from .sparse.export import export_lora as export_lora
from .sparse.layer import SparseGradLinear as SparseGradLinear
from .sparse.optimizer import SparseAdamW as SparseAdamW
from .sparse.prepare import compute_bases as compute_bases
from .sparse.prepare import prepare_layers as prepare_layers
from .sparse.trainer import SparseTrainer as SparseTrainer
from .structure.find import find_structure as find_structure
from .training.resources import ResourceMonitor as ResourceMonitor

__version__: str
__all__: list[str]
