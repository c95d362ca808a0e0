"""Which linear layers SparseGrad converts."""

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.model import architecture
from hf_ft_ext.training.plan import fold_layer_numbers

# The dense layers of each block's MLP, by `config.model_type`.
_BERT = r"\.layer\.\d+\.(intermediate|output)\.dense$"
_GATED = r"\.layers\.\d+\.mlp\.(gate|up|down)_proj$"
_T5 = r"\.DenseReluDense\.(wi|wi_0|wi_1|wo)$"
MLP_LAYERS = {
    "albert": r"\.albert_layers\.\d+\.(ffn|ffn_output)$",  # one block's weights serve all layers
    "bert": _BERT,
    "deberta": _BERT,
    "deberta-v2": _BERT,
    "distilbert": r"\.layer\.\d+\.ffn\.lin[12]$",
    "electra": _BERT,
    "gemma": _GATED,
    "gpt2": r"\.h\.\d+\.mlp\.(c_fc|c_proj)$",
    "llama": _GATED,
    "mistral": _GATED,
    "modernbert": r"\.layers\.\d+\.mlp\.(Wi|Wo)$",  # Wi holds gate and input in one weight
    "mt5": _T5,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "roberta": _BERT,
    "t5": _T5,
    "xlm-roberta": _BERT,
}


_LINEAR = (nn.Linear, Conv1D)


def find_targets(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Linear | Conv1D]:
    """Names and modules of the layers to convert.

    Args:
        model: a transformers model.
        pattern: regular expression searched in dotted module names; `None` = the table above.

    Raises:
        InputError: a malformed or unmatched pattern, a matched layer that is not linear, or a model
            type without an entry in the table.
    """
    linear_kinds = sorted({fold_layer_numbers(name) for name, m in model.named_modules() if isinstance(m, _LINEAR)})
    if pattern is None:
        model_type = architecture(model)
        if model_type not in MLP_LAYERS:
            raise InputError(
                f"no MLP layers are known for model type {model_type!r} (known: {', '.join(sorted(MLP_LAYERS))}); "
                f"name them with sparse_target_modules, a regular expression over: {', '.join(linear_kinds)}"
            )
        pattern = MLP_LAYERS[model_type]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"sparse_target_modules={pattern!r} is no regular expression: {error}") from None
    matched = {name: module for name, module in model.named_modules() if expression.search(name)}
    # A pattern that names a block matches everything below it: containers are passed over.
    leaves = {name: module for name, module in matched.items() if not any(True for _ in module.children())}
    if not leaves:
        raise InputError(
            f"sparse_target_modules={pattern!r} matches no layer; linear layers here: {', '.join(linear_kinds)}"
        )
    others = {name: type(module).__name__ for name, module in leaves.items() if type(module) not in _LINEAR}
    if others:
        name, kind = next(iter(others.items()))
        if kind == "SparseGradLinear":
            raise InputError(f"{name} is converted already; call merge_sparse(model) before converting again")
        raise InputError(
            f"sparse_target_modules={pattern!r} matches {name}, a {kind}; SparseGrad trains nn.Linear, Conv1D only: "
            f"narrow the pattern to some of: {', '.join(linear_kinds)}"
        )
    return leaves
