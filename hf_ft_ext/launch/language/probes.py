"""Forward passes that show whether a causal model fits what trl does: its fused head, and packed rows."""

import functools
import logging
from typing import Any

import torch

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.per_example.state import evaluating

logger = logging.getLogger(__name__)

_PROBED = 16  # tokens of a row that show whether trl's fused head is the model's own
_PACKED = 50  # packed sequences among which one of several rows is looked for


def use_own_head(trainer: Any) -> None:
    """Let trl compute losses from the model's own logits, where its fused head gives other ones.

    trl multiplies the last hidden states by the output weights. This leaves out layers between them (ModernBERT's
    decoder) and functions of the logits that it does not know (RecurrentGemma's soft cap).
    """
    model = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if trainer.is_deepspeed_enabled or not len(trainer.train_dataset):  # a process may hold only parts of the weights
        return
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([list(trainer.train_dataset[0]["input_ids"])[:_PROBED]], device=device)
    if ids.shape[1] < 2:
        return
    fused = base.forward
    routers = {"output_router_logits": True} if getattr(trainer, "aux_loss_enabled", False) else {}
    with torch.no_grad(), evaluating(base):
        wanted = _from_logits(fused(input_ids=ids, use_cache=False), ids[:, 1:]).log_probs
        try:
            found = fused(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False, **routers).log_probs.float()
        except AttributeError:  # trl looks for the number of experts under one name, GraniteMoe has another
            found = torch.full_like(wanted, torch.inf)
    tolerance = 5e-5 if base.dtype == torch.float32 else 0.1  # of the largest log probability
    if bool((found - wanted).abs().max() <= tolerance * wanted.abs().max()):
        return
    logger.info("%s computes its logits in its own way, so trl's fused head is not used.", type(base).__name__)

    @functools.wraps(fused)
    def forward(*positional, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        more = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return fused(*positional, **kwargs, **{name: v for name, v in more.items() if v is not None})
        outputs = fused(*positional, **{**kwargs, "use_cache": False})
        return _from_logits(outputs, labels[:, 1:] if shift_labels is None else shift_labels, shift_labels is not None)

    base.forward = forward


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
        entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~mask, 0)
        is_top1 = (log_p.argmax(-1) == labels) & mask
    aux_loss = getattr(outputs, "aux_loss", None)
    return FusedCausalLMOutput(
        log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask, aux_loss=aux_loss
    )


@torch.no_grad()
def check_packing(trainer: Any) -> None:
    """Refuse to pack rows for a model in which rows of one sequence read each other.

    Many models separate the rows by their position ids; OPT, Bloom, MPT and Falcon, among others, need flash attention
    for it. A row of the first packed sequences has to get the same logits as alone.

    Raises:
        InputError: it gets other ones, or the model fails on packed rows.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # a process holds only parts of the weights
        return
    model, rows = trainer.model, trainer.train_dataset.select(range(min(_PACKED, len(trainer.train_dataset))))
    packed = next((row for row in rows if len(row["seq_lengths"]) > 1), None)
    if packed is None:
        return
    device = model.get_input_embeddings().weight.device
    made = {name: value for name, value in trainer.data_collator([packed]).items() if name != "labels"}
    batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in made.items()}
    begin, end = packed["seq_lengths"][0], sum(packed["seq_lengths"][:2])
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    advice = "leave --packing out, or pass --attn_implementation flash_attention_2 where the model supports it"
    with evaluating(model):
        try:
            together = model(**batch, use_cache=False).logits[0, begin:end].float()
            alone = model(input_ids=batch["input_ids"][:, begin:end], use_cache=False).logits[0].float()
        except (ValueError, NotImplementedError) as error:  # Mamba2 without its kernels
            raise InputError(f"--packing: {name} cannot read packed rows ({first_line(error)}); {advice}") from error
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1  # of the largest logit
    if bool((together - alone).abs().max() > tolerance * alone.abs().max()):
        raise InputError(f"--packing: rows in one sequence of {name} read each other; {advice}")
