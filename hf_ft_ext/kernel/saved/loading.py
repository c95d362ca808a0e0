"""Read the folder of a solved kernel: model and tokenizer, the arguments of a trainer, code that predicts."""

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from hf_ft_ext.adapters.folder import ADAPTER_CONFIG
from hf_ft_ext.arguments.completion import chosen
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.kernel.arguments import KernelTrainingArguments
from hf_ft_ext.kernel.options import Engine
from hf_ft_ext.kernel.saved.model import load_model, load_tokenizer, without_report
from hf_ft_ext.kernel.saved.record import COEFFICIENTS, SAVED_ARGUMENTS, SavedKernel
from hf_ft_ext.kernel.saved.training_data import TrainingFeatures
from hf_ft_ext.kernel.solvers import Coupling
from hf_ft_ext.problem_types import REGRESSION
from hf_ft_ext.training.sharing import FinishedRun, recorded_own_code_argument, rerun_code


def load_finished(
    folder: str | os.PathLike,
    labels: Sequence[str] | None,
    given: Mapping[str, Any],
    load: Callable[[], tuple],
) -> tuple[PreTrainedTokenizerBase, nn.Module]:
    """Load tokenizer and model of the solved kernel in `folder`.

    Args:
        labels: names of the data's labels, if it has any.
        given: arguments that the user set by name.
        load: loads a plain model from the folder.

    Raises:
        InputError: the data has labels that the kernel lacks, or an option does not apply to a model with an adapter.
    """
    folder, own_code = Path(folder), bool(given.get("trust_remote_code", False))
    saved = SavedKernel.read(folder)
    try:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
    except (OSError, ValueError) as error:
        cure = "copy the folder again"
        if "trust_remote_code" in str(error):
            cure = "pass --trust_remote_code if you trust the code in this folder"
        raise InputError(
            f"the configuration of the model in {str(folder)!r} cannot be read ({first_line(error)}); {cure}"
        ) from error
    names = [str(own.id2label[i]) for i in range(own.num_labels)]
    if labels is not None and not {name.lower() for name in labels} <= {name.lower() for name in names}:
        advice = f"--problem_type {REGRESSION}" if len(names) == 1 else "data with these labels"
        raise InputError(
            f"the kernel in {str(folder)!r} was solved for the labels {', '.join(names[:10])}, but this data has "
            f"{', '.join(labels[:10])}; pass {advice}"
        )
    if not (folder / ADAPTER_CONFIG).is_file():
        with without_report():
            return load()
    for name in ("attn_implementation", "device_map", "dtype", "model_revision", "quantization", "tokenizer_name"):
        if name in given:
            raise InputError(
                f"{name}={given[name]}: the model of the kernel in {str(folder)!r} has an adapter, and is loaded as "
                "it was saved; leave it out"
            )
    tokenizer = load_tokenizer(folder, own_code)
    if tokenizer is None:
        raise InputError(f"{str(folder)!r} holds no tokenizer; copy its files from the run's folder too")
    return tokenizer, load_model(folder, saved, own_code)


def loading_code(run: FinishedRun) -> str:
    """Return Python code that predicts with the solved kernel of a run on the Hub."""
    if not run.has(COEFFICIENTS):  # the kernels were loaded from files
        if run.has(ADAPTER_CONFIG):  # the adapter is drawn again from the seed, on its base model
            return rerun_code(run, {"model_name_or_path": run.base or run.record["model"]}, [])
        of_the_model = ("model_name_or_path", "model_revision", "tokenizer_name", "from_linearhead")
        return rerun_code(run, dict.fromkeys(of_the_model), ["'--model_name_or_path', folder,"])
    own_code = recorded_own_code_argument(run)
    lines = [
        "from hf_ft_ext import load_kernel",
        "from huggingface_hub import snapshot_download",
        "",
        f"kernel = load_kernel(snapshot_download({run.repo_id!r}){own_code})",
        "batch = kernel.tokenizer(['a text', 'another one'], padding=True, return_tensors='pt')",
        "print(kernel(batch).labels)",
    ]
    template = json.loads((run.folder / CONFIG_NAME).read_text(encoding="utf-8")).get("template")
    if template is not None:  # a prompt model: each list holds one text for every row
        texts = 2 if "sent_1" in template else 1
        length = (run.record.get("arguments") or {}).get("max_seq_length") or 128
        lines[0] = "from hf_ft_ext import PromptEncoder, load_kernel"
        lines[4:5] = [
            f"encode = PromptEncoder(kernel.tokenizer, kernel.model.config.template, {texts}, {length})",
            "rows = encode([" + ", ".join(["['a text', 'another one']"] * texts) + "])",
            "batch = kernel.tokenizer.pad(rows, return_tensors='pt')",
        ]
    return "\n".join(lines)


def arguments_as_saved(
    args: KernelTrainingArguments, saved: SavedKernel, folder: Path, given: Mapping[str, Any]
) -> KernelTrainingArguments:
    """Copy `args` with the settings that the saved kernel was solved with.

    Raises:
        InputError: the user set a different value.
    """
    args = copy.copy(args)
    projected = isinstance(saved.training, TrainingFeatures)
    if projected != (args.kernel_engine == Engine.PROJECTED.value):
        if "kernel_engine" in given or chosen(args, "kernel_engine"):
            kind = "projected gradients" if projected else "an exact kernel"
            raise InputError(
                f"kernel_engine={args.kernel_engine} was passed, but the kernel in {str(folder)!r} was solved with "
                f"{kind}; leave it out, or solve again from training data"
            )
        args.kernel_engine = Engine.PROJECTED.value
    for name in SAVED_ARGUMENTS:
        value, passed = saved.arguments.get(name), getattr(args, name)
        if (name in given or chosen(args, name)) and not _equal(passed, value):
            raise InputError(
                f"{name}={passed} was passed, but the kernel in {str(folder)!r} was solved with {name}={value}; leave "
                "it out, or solve again from training data"
            )
        setattr(args, name, value)
    if projected or saved.model.options.coupling is Coupling.PSEUDO:
        args.seed = saved.arguments["seed"]  # the projection, or the random signs, depend on it
    # The saved model already has its adapter and its random weights.
    args.kernel_peft, args.kernel_peft_config, args.random_model_init = None, {}, False
    return args


def _equal(passed: Any, value: Any) -> bool:
    """Whether two values of an argument are the same; numbers by value, as `1e-2` and `0.01`."""
    if isinstance(passed, bool) or isinstance(value, bool):
        return str(passed) == str(value)
    try:
        return float(passed) == float(value)
    except (TypeError, ValueError):
        return str(passed) == str(value)
