"""A few rows of made-up input that a model takes, and a copy of the model to run them through."""

import copy
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

ROWS, LENGTH = 2, 16
_SPECIAL = ("pad", "eos", "bos", "cls", "sep", "mask", "unk", "decoder_start")


def trial_device(model: nn.Module) -> torch.device:
    """Where a trial pass runs: on the model's device, or the CPU for a model without data."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def trial_rows(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Batches that `model` may take, the likeliest first: ids `[2, 16]` with mask, decoder ids too, one row.

    A model whose rows have more than token ids says so in `trial_inputs(ids)`.
    """
    config = getattr(model, "config", None)
    device = trial_device(model)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        yield {"pixel_values": torch.zeros(ROWS, getattr(config, "num_channels", 3), height, width, device=device)}
        return
    ids = _token_ids(model, config).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if hasattr(model, "trial_inputs"):
        batch |= model.trial_inputs(ids)
    yield batch
    yield {**batch, "decoder_input_ids": ids}
    yield {name: value[:1] for name, value in batch.items()}  # without a padding token a decoder takes one row
    yield {"input_ids": ids}


def _token_ids(model: nn.Module, config) -> torch.Tensor:
    """`[2, 16]`, ordinary tokens with an end token last: some heads read the class off it. A mask token if any."""
    try:
        size = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        table = next((m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)), None)
        size = getattr(config, "vocab_size", None) or (2 if table is None else table.num_embeddings)
    named = {kind: getattr(config, f"{kind}_token_id", None) for kind in _SPECIAL}
    special = {i for value in named.values() for i in (value if isinstance(value, list) else [value])}
    plain = [i for i in range(min(size, 500)) if i not in special] or [0]
    ids = torch.tensor([plain[i % len(plain)] for i in range(ROWS * LENGTH)]).view(ROWS, LENGTH)
    for kind, place in (("eos", -1), ("mask", 1)):
        value = named[kind]
        value = value[0] if isinstance(value, list) else value
        if value is not None and 0 <= value < size:
            ids[:, place] = value
    return ids


def trial_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its tensors, in evaluation mode, with adapters switched off.

    A trial pass may change what modules keep (BigBird leaves block-sparse attention after one short batch), hence a
    copy. Tensors on the meta device become ones of stride 0, which take hardly any memory and let the pass run.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shared: dict[int, torch.Tensor] = {id(t): _without_memory(t) if t.is_meta else t for t in tensors}
    shared |= _eight_bit_states(model)
    other = copy.deepcopy(model, shared).eval()
    for module in other.modules():
        # A wrapper around the forward of the original (trl's fused head, accelerate's hooks) would run the original.
        if hasattr(vars(module).get("forward"), "__wrapped__"):
            del module.forward
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = True
    return other


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    value = 0.01 if tensor.is_floating_point() else 0
    shape = tensor.shape[1:] if tensor.dim() > 2 else ()  # kernels of grouped products want one expert's strides
    real = torch.full(shape, value, dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(real, requires_grad=False) if isinstance(tensor, nn.Parameter) else real


def _eight_bit_states(model: nn.Module) -> dict[int, torch.Tensor]:
    """Scales and weights of bitsandbytes' 8-bit layers, by `id`, moved to where the layers' first pass puts them.

    That pass takes them from the weight into the layer's own state. In a copy that shares the weight, it would leave
    the layer itself without any, and its results wrong.
    """
    found = {}
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            if getattr(module.weight, "CB", None) is not None:
                module.init_8bit_state()
            tensors = (getattr(module.state, name, None) for name in ("CB", "SCB"))
            found |= {id(tensor): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return found
