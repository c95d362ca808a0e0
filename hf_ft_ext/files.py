"""Writing files atomically (a temporary name, then a rename), and what hashes of tensors and adapters are made of."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A context that yields a temporary name beside `path` and renames it to `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path` in one step: a crash leaves the old file or the new one."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON; non-finite floats become `null` (JSON has no NaN)."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if is_traceable_wrapper_subclass(tensor):  # a quantizer's tensor subclass: hash the tensors that it consists of
        for name in tensor.detach().__tensor_flatten__()[0]:
            digest.update(f"{name} {tensor_hash(getattr(tensor, name))}".encode())
        return digest.hexdigest()
    tensor = tensor.detach().cpu().contiguous()
    digest.update(tensor.view(torch.uint8).numpy() if tensor.ndim else tensor[None].view(torch.uint8).numpy())
    return digest.hexdigest()


def adapters_text(model: nn.Module) -> str:
    """Text of the settings of a model's peft adapters that its weights do not show, such as LoRA's alpha; "" if none.

    Settings that a running model changes are those of its layers: the scaling, and which adapters are active.
    """
    about: dict[str, Any] = {}
    for name, config in sorted((getattr(model, "peft_config", None) or {}).items()):
        about[name] = {key: value for key, value in config.to_dict().items() if key not in _ABOUT_FILES}
    for path, module in model.named_modules():
        # a list in peft's layers, and a method of transformers' models
        if path and isinstance(getattr(module, "active_adapters", None), list):
            about[path] = {key: getattr(module, key, None) for key in _OF_LAYERS}
    return json.dumps(about, sort_keys=True, default=_text) if about else ""


_ABOUT_FILES = ("base_model_name_or_path", "inference_mode", "revision")
_OF_LAYERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def _text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _finite(value: Any) -> Any:
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
