"""Synthetic inputs for a trial forward pass, and a copy of the model to run it."""

import copy
import math
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

ROWS, LENGTH = 2, 16
_SPECIAL = ("pad", "eos", "bos", "cls", "sep", "mask", "unk", "decoder_start")


def trial_device(model: nn.Module) -> torch.device:
    """The device of a trial pass: the model's, or the CPU for a model on the meta device."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def trial_rows(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Iterate over batches that `model` may accept, the likeliest first.

    Token ids `[2, 16]` with attention mask; the same with decoder ids; one row; ids only; two choices per row,
    `[2, 2, 16]`. For models of images or sounds these, of the size that the configuration states. A model that needs
    more inputs than token ids returns them from a method `trial_inputs(ids)`.
    """
    config = getattr(model, "config", None)
    device = trial_device(model)
    main = getattr(model, "main_input_name", "input_ids")
    if main in ("pixel_values", "input_values", "input_features"):
        floating = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), None)
        for shape in _images(config) if main == "pixel_values" else _sounds(config, main):
            batch = {main: torch.zeros(shape, dtype=floating, device=device)}
            yield batch
            if getattr(config, "is_encoder_decoder", False):
                yield {**batch, "decoder_input_ids": _token_ids(model, config).to(device)}
        return
    ids = _token_ids(model, config).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if hasattr(model, "trial_inputs"):
        batch |= model.trial_inputs(ids)
    yield batch
    yield {**batch, "decoder_input_ids": ids}
    yield {name: value[:1] for name, value in batch.items()}  # a decoder without a padding token takes one row only
    yield {"input_ids": ids}
    yield {name: torch.stack((value, value), 1) for name, value in batch.items()}  # of multiple choice


def trial_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its tensors, in evaluation mode, with adapters disabled.

    It is a copy because a forward pass may change the state of modules (BigBird turns block-sparse attention off after
    a short batch). Tensors on the meta device are replaced by expanded tensors of stride 0, which take hardly any
    memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shared: dict[int, torch.Tensor] = {id(t): _without_memory(t) if t.is_meta else t for t in tensors}
    shared |= _eight_bit_states(model)
    other = copy.deepcopy(model, shared).eval()
    for module in other.modules():
        # A wrapped forward (trl's fused head, accelerate's hooks) would call the forward of the original module.
        if hasattr(vars(module).get("forward"), "__wrapped__"):
            del module.forward
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module._disable_adapters = True
        if isinstance(module, ModulesToSaveWrapper):  # its `original_module` runs
            module.modules_to_save = nn.ModuleDict()
    return other


def _images(config) -> list[tuple[int, ...]]:
    config = config if hasattr(config, "image_size") else getattr(config, "vision_config", config)  # CLIP, SigLIP
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    image = (getattr(config, "num_channels", 3), height, width)
    frames = getattr(config, "num_frames", None)
    return [(ROWS, *image)] if frames is None else [(ROWS, frames, *image), (ROWS, *image)]


def _sounds(config, main: str) -> list[tuple[int, ...]]:
    """Shapes of sounds, the likeliest first: samples, or spectra in either order of time and frequency."""
    samples = 32 * math.prod(getattr(config, "conv_stride", None) or (1,))
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bands = next((value for name in names if (value := getattr(config, name, None))), 80)
    positions = getattr(config, "max_source_positions", None)
    frames = getattr(config, "max_length", 128) if positions is None else 2 * positions  # after a stride of 2
    spectra: list[tuple[int, ...]] = [(ROWS, bands, frames), (ROWS, min(frames, 128), bands), (ROWS, frames, bands)]
    return [(ROWS, samples), *spectra] if main == "input_values" else spectra


def _token_ids(model: nn.Module, config) -> torch.Tensor:
    """Ids `[2, 16]` of ordinary tokens, with a mask token (if any) and an end token last, which some heads read."""
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


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    value = 0.01 if tensor.is_floating_point() else 0
    shape = tensor.shape[1:] if tensor.dim() > 2 else ()  # grouped matrix products need the strides of one expert
    real = torch.full(shape, value, dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(real, requires_grad=False) if isinstance(tensor, nn.Parameter) else real


def _eight_bit_states(model: nn.Module) -> dict[int, torch.Tensor]:
    """Scales and weights of bitsandbytes' 8-bit layers, by `id`, after moving them into the layers' state.

    The first forward pass of such a layer moves them from the weight into the layer's state. The pass of a copy that
    shares the weight would remove them from the weight of the original layer, whose results would then be wrong.
    """
    found = {}
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            if getattr(module.weight, "CB", None) is not None:
                module.init_8bit_state()
            tensors = (getattr(module.state, name, None) for name in ("CB", "SCB"))
            found |= {id(tensor): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return found
