"""Write the folder of a saved adapter: the trained model's configuration, and an index of the base model's weights.

How the libraries find the base model and its labels (transformers 5.23, peft 0.21):

- `AutoModelForSequenceClassification.from_pretrained(folder)` and `pipeline(model=folder)`: a local folder with a
  `config.json` is read like a complete model: configuration and base weights from there, then the adapter is added.
  Without a `config.json`, both come from the adapter's base model, which may have other labels.
- `AutoPeftModelForSequenceClassification.from_pretrained(folder)` reads the base model's configuration only; see
  `hf_ft_ext.adapters.auto`.
- `PeftModel.from_pretrained(base, folder)` uses the configuration of `base`.

So the folder gets three files: a `config.json` with the trained labels, an index of weights (as for a sharded model)
with the paths of the base model's files, and a small file with the trained head, which replaces that of the base. A
language model's folder also gets a `generation_config.json`, with the tokens that texts begin with in training.
"""

import copy
import json
import os
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from hf_ft_ext.files import atomic_write, write_json, write_text

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEAD_FILE = "model-head.safetensors"
_INSIDE = ("base_model.model.", "base_model.")  # peft's prefixes of a wrapped model's names; the second: prompt tuning


def set_base_name(model: PeftModel) -> None:
    """Set the base model's name so that the adapter loads from any working directory.

    A folder is set as an absolute path, a Hub id with its revision (from `model.loaded_from`, see
    `load_tokenizer_and_model`).
    """
    for config in model.peft_config.values():
        set_base_name_of(config, model.get_base_model())


def set_base_name_of(config: PeftConfig, base: nn.Module) -> None:
    """As `set_base_name`, for the configuration of one adapter."""
    name = config.base_model_name_or_path or getattr(base, "name_or_path", None)
    if name and os.path.isdir(name):
        config.base_model_name_or_path = os.path.abspath(name)
    elif config.revision is None and (revision := _loaded_from(base).get("revision")) != "main":
        config.revision = revision


def save_configuration(model: PeftModel, folder: str | os.PathLike, shared: bool = False) -> None:
    """Write the configuration of the wrapped model, and the index of its base weights, beside each saved adapter.

    No index is written if the base's weights are not in local safetensors files (a model built from a configuration,
    or pickled weights). Load such an adapter by `PeftModel.from_pretrained` with the base model.

    Args:
        folder: where `PeftModel.save_pretrained` wrote the adapters: `default` in it, others in a folder each.
        shared: whether the folder is for other machines; `local_files` are then removed instead.
    """
    for name, config in model.peft_config.items():
        own = Path(folder) if name == "default" else Path(folder) / name
        if (own / ADAPTER_CONFIG).is_file():
            save_base_configuration(model.get_base_model(), own, config.revision, name, shared)


def save_base_configuration(
    base: nn.Module,
    folder: str | os.PathLike,
    revision: str | None,
    adapter_name: str = "default",
    shared: bool = False,
) -> None:
    """As `save_configuration`, for the base model itself and the `revision` in one adapter's configuration."""
    if not isinstance(getattr(base, "config", None), PreTrainedConfig):
        return  # not a transformers model: only `PeftModel.from_pretrained` loads its adapters
    folder = Path(folder)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = str(base.dtype).removeprefix("torch.")
    for part in (base, config):
        if getattr(part, "_auto_class", None) is not None:  # a model with its own code, which loading the folder runs
            custom_object_save(part, folder, config=config)
    write_text(folder / CONFIG_NAME, config.to_json_string())
    if getattr(base, "generation_config", None) is not None and base.can_generate():
        write_text(folder / GENERATION_CONFIG_NAME, base.generation_config.to_json_string())
    files = weight_files(getattr(base, "name_or_path", None), revision, _loaded_from(base).get("cache_dir"))
    if shared or not files or hasattr(type(base), "from_adapter"):  # a prompt model loads its base itself
        for path in local_files(folder):
            path.unlink()
        return
    shapes = {key: shape for path in files for key, shape in _shapes(path).items()}
    where = {key: str(path) for path in files for key in _shapes(path)}
    head = _head(folder / ADAPTER_WEIGHTS, base, shapes, adapter_name)
    if head:
        with atomic_write(folder / HEAD_FILE) as temporary:
            save_file(head, temporary, metadata={"format": "pt"})
        where |= dict.fromkeys(head, HEAD_FILE)  # read last, as relative names sort after absolute paths
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {}, "weight_map": where})


def local_files(folder: str | os.PathLike) -> list[Path]:
    """Files in an adapter's folder that are valid on this machine only: the index of base weights and the head."""
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        return []
    return [path for name in (SAFE_WEIGHTS_INDEX_NAME, HEAD_FILE) if (path := folder / name).is_file()]


def weight_files(name: str | None, revision: str | None = None, cache_dir: str | None = None) -> list[Path]:
    """Absolute paths of the local safetensors files of a model; empty if there are none.

    Args:
        name: a folder, or a Hub id whose files are in the cache.
    """
    if not name:
        return []
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if os.path.isdir(name):
            path: str | None = os.path.join(name, file)
        else:
            try:
                path = cached_file(
                    name, file, revision=revision, cache_dir=cache_dir, local_files_only=True,
                    _raise_exceptions_for_missing_entries=False,
                )  # fmt: skip
            except (OSError, ValueError):
                path = None
        if path is None or not os.path.isfile(path):
            continue
        found = Path(os.path.abspath(path))
        if file == SAFE_WEIGHTS_NAME:
            return [found]
        parts = json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [Path(os.path.join(found.parent, part)) for part in sorted(set(parts))]
        return paths if all(part.is_file() for part in paths) else []
    return []


def is_adapter_without_weights(folder: str | os.PathLike) -> bool:
    """Whether a local folder holds an adapter, but neither weights of a full model nor an index of them."""
    folder = Path(folder)
    whole = any(next(folder.glob(pattern), None) for pattern in ("model*.safetensors*", "pytorch_model*.bin*"))
    return (folder / ADAPTER_CONFIG).is_file() and not whole


def _loaded_from(base: nn.Module) -> dict:
    return getattr(base, "loaded_from", {})


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def _head(adapter: Path, base: nn.Module, shapes: dict[str, tuple[int, ...]], adapter_name: str) -> dict:
    """The fully trained parameters that are missing in the base's files or have another shape there."""
    if not adapter.is_file():
        return {}
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    names = {name.replace(f".modules_to_save.{adapter_name}.", ".") for name, _ in base.named_parameters()}
    head = {}
    with safe_open(adapter, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name = next((name for inside in _INSIDE if (name := key.removeprefix(inside)) in names), key)
            stored = shapes.get(name, shapes.get(name.removeprefix(prefix)))
            if name in names and stored != tuple(file.get_slice(key).get_shape()):
                head[name] = file.get_tensor(key)
    return head
