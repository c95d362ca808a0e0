"""Fitting a causal model and trl's `SFTTrainer` to each other: losses of routers, the fused head, packed rows.

Forward passes over a few tokens show what a model does, so that no list of model types is needed.
"""

import functools
import logging
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import Trainer

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.per_example.state import evaluating
from hf_ft_ext.training.weights.sharding import FSDP, sharding

logger = logging.getLogger(__name__)

_PROBED = 16  # tokens of a row that show whether trl's fused head is the model's own
_PACKED = 50  # packed sequences among which one of several rows is looked for
_ROUTERS = "output_router_logits"


def is_sft(trainer: Trainer) -> bool:
    """Whether the trainer derives from trl's `SFTTrainer`."""
    return any(
        kind.__name__ == "SFTTrainer" and kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__
    )


def asks_for_routers(model: nn.Module | None) -> bool | None:
    """Whether the outputs of a mixture of experts are set to contain router logits; `None` without this setting."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(), _ROUTERS, None)


def fit_sft(trainer: Any, routers: bool | None) -> None:
    """Make trl's loss that of the model's own logits, and check packed rows.

    Args:
        trainer: a trainer that derives from `SFTTrainer`, after its construction.
        routers: `asks_for_routers` before it. trl turns the setting on, and asks for the logits itself in each forward
            pass; `generate` stops at it.

    Raises:
        InputError: `router_aux_loss_coef` for a model that returns no such loss; rows that read each other.
    """
    model = trainer.model
    whole = _is_whole(trainer)
    if routers is not None:
        model.config.get_text_config().output_router_logits = routers
    if trainer.aux_loss_enabled and whole and not _returns_router_loss(model):
        if trainer.args.router_aux_loss_coef:
            raise InputError(
                f"router_aux_loss_coef={trainer.args.router_aux_loss_coef} weighs the balance of experts, which "
                f"{_name(model)} does not return; leave it out"
            )
        logger.info("%s returns no loss of its routers, so none is added.", _name(model))
        trainer.aux_loss_enabled = False
    use_own_head(trainer, whole)
    if getattr(trainer.args, "packing", False) and whole:
        check_packing(trainer)


def use_own_head(trainer: Any, whole: bool = True) -> None:
    """Let trl compute losses from the model's own logits, where its fused head gives other ones.

    trl multiplies the last hidden states by the output weights. This leaves out layers between them (ModernBERT's
    decoder) and functions of the logits that it does not know (RecurrentGemma's soft cap).

    Args:
        whole: whether this process holds all weights. If not, no forward pass can tell, and the own logits are used.
    """
    base = _base(trainer.model)
    fused = base.forward
    if whole and _fused_head_fits(base, trainer.aux_loss_enabled):
        return
    if whole:
        logger.info("%s computes its logits in its own way, so trl's fused head is not used.", type(base).__name__)
    else:
        logger.warning(
            "The weights of %s are spread over processes, so trl's fused head cannot be compared with the model's own "
            "and is not used: a batch takes memory for the logits of all its tokens.", type(base).__name__,
        )  # fmt: skip

    @functools.wraps(fused)
    def forward(*positional, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        more = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return fused(*positional, **kwargs, **{name: v for name, v in more.items() if v is not None})
        outputs = fused(*positional, **{**kwargs, "use_cache": False})
        return _from_logits(outputs, labels[:, 1:] if shift_labels is None else shift_labels, shift_labels is not None)

    base.forward = forward


@torch.no_grad()
def check_packing(trainer: Any) -> None:
    """Refuse to pack rows for a model in which rows of one sequence read each other.

    Many models separate the rows by their position ids; OPT, Bloom, MPT and Falcon, among others, need flash attention
    for it. A row of the first packed sequences has to get the same logits as alone.

    Raises:
        InputError: it gets other ones, or the model fails on packed rows.
    """
    model, rows = trainer.model, trainer.train_dataset.select(range(min(_PACKED, len(trainer.train_dataset))))
    packed = next((row for row in rows if len(row["seq_lengths"]) > 1), None)
    if packed is None:
        return
    device = model.get_input_embeddings().weight.device
    made = {name: value for name, value in trainer.data_collator([packed]).items() if name != "labels"}
    batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in made.items()}
    begin, end = packed["seq_lengths"][0], sum(packed["seq_lengths"][:2])
    name = _name(model)
    advice = "leave packing out, or pass attn_implementation flash_attention_2 where the model supports it"
    with evaluating(model):
        try:
            together = model(**batch, use_cache=False).logits[0, begin:end].float()
            alone = model(input_ids=batch["input_ids"][:, begin:end], use_cache=False).logits[0].float()
        except (ValueError, NotImplementedError) as error:  # Mamba2 without its kernels
            raise InputError(f"packing: {name} cannot read packed rows ({first_line(error)}); {advice}") from error
    tolerance = 0.1 if model.dtype.itemsize < 4 else 1e-3  # of the largest logit
    if bool((together - alone).abs().max() > tolerance * alone.abs().max()):
        raise InputError(f"packing: rows in one sequence of {name} read each other; {advice}")


def _name(model: nn.Module) -> str:
    return type(_base(model)).__name__


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_whole(trainer: Any) -> bool:
    """Whether this process holds all weights, where they can compute."""
    model, args = trainer.model, trainer.args
    if any(parameter.is_meta or hasattr(parameter, "ds_shape") for parameter in model.parameters()):  # ZeRO-3
        return False
    if sharding(args) == FSDP and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):  # only the first process
        return False
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    return not ("flash" in attention and next(model.parameters()).device.type == "cpu")  # not yet moved


def _some_ids(model: nn.Module) -> torch.Tensor:
    """A row of `_PROBED` different tokens, as far as there are."""
    embedding = _base(model).get_input_embeddings().weight
    return ((torch.arange(_PROBED, device=embedding.device) + 3) % len(embedding))[None]


def _returns_router_loss(model: nn.Module) -> bool:
    """Whether outputs have the loss that balances experts; a dense Doge and Llama 4 have the setting alone."""
    with torch.no_grad(), evaluating(model):
        try:
            outputs = _base(model)(input_ids=_some_ids(model), use_cache=False, **{_ROUTERS: True})
        except (IndexError, TypeError, ValueError, AttributeError):
            return False
    return isinstance(getattr(outputs, "aux_loss", None), torch.Tensor)


def _fused_head_fits(base: Any, routers: bool) -> bool:
    """Whether trl's fused head gives the log probabilities of the model's own logits."""
    ids = _some_ids(base)
    with torch.no_grad(), evaluating(base):
        wanted = _from_logits(base.forward(input_ids=ids, use_cache=False), ids[:, 1:]).log_probs
        more = {_ROUTERS: True} if routers else {}
        try:
            found = base.forward(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False, **more)
        except AttributeError:  # trl looks for experts and hidden states under names that GraniteMoe and Llama 4 lack
            return False
    tolerance = 0.1 if base.dtype.itemsize < 4 else 5e-5  # of the largest log probability
    difference = (found.log_probs.float() - wanted).abs().max()
    return bool(difference <= tolerance * wanted.abs().max())


def _from_logits(outputs: Any, labels: torch.Tensor, whole: bool = False) -> Any:
    """What trl's fused head returns, from a model's logits `[rows, length, vocabulary]`.

    Args:
        labels: of the next tokens, -100 where none is predicted.
        whole: whether the last position has a label too.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    log_p = (outputs.logits if whole else outputs.logits[:, :-1]).float().log_softmax(-1)
    mask = labels != -100
    log_probs = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
    with torch.no_grad():
        terms = log_p.exp() * log_p
        entropy = -terms.masked_fill_(log_p == -torch.inf, 0).sum(-1).masked_fill(~mask, 0)  # lim p log p = 0
        is_top1 = (log_p.argmax(-1) == labels) & mask
    aux_loss = getattr(outputs, "aux_loss", None)
    return FusedCausalLMOutput(
        log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask, aux_loss=aux_loss
    )
