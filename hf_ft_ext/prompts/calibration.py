"""Contextual calibration: what a prompt model says about a row without content, subtracted from all logits."""

import logging
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_ft_ext.arguments import PROMPT_DEMO, DataArguments
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.collator import ContextCollator
from hf_ft_ext.prompts.model import PromptForSequenceClassification
from hf_ft_ext.prompts.preprocess import prompt_encoder

CONTENT_FREE = "content-free"  # its name where a split's name decides which demonstrations are drawn

logger = logging.getLogger(__name__)


def calibrate(
    model: PromptForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    data_args: DataArguments,
    model_max_length: int | None = None,
    data_seed: int | None = None,
) -> None:
    """Subtract from all logits, from now on, those of the template around empty texts.

    With demonstrations the empty texts stand in `num_sample` contexts, drawn as those of a row to evaluate (without
    `demo_filter`, which has no text to compare), and the mean of their logits is subtracted: one bias for the model.
    The source has the same demonstrations for all rows, and so for the content-free text; it also averages over three
    of these ("N/A", "[MASK]" and the empty text).

    Args:
        data_seed: of the demonstrations.

    Raises:
        InputError: the template is nothing but texts, the model has no common label words, or demonstrations cannot
            be drawn.

    Source: Zhao et al., ICML 2021, arXiv 2102.09690.
    """
    encoder = prompt_encoder(data, tokenizer, data_args, model.config, model_max_length)
    empty = [[""]] * len(data.text_columns)
    rows: dict[str, Any] = encoder(empty)
    if not rows["input_ids"][0]:
        raise InputError(
            f"calibrate: template {model.config.template!r} is nothing but the row's text, so nothing is left without "
            "it; leave --calibrate out"
        )
    if data_args.few_shot_type == PROMPT_DEMO:
        from hf_ft_ext.prompts.demonstrations import DemonstrationRows

        unfiltered = replace(data_args, demo_filter=1.0, demo_filter_model=None)
        rows = DemonstrationRows(encoder, data, unfiltered, model.config, data_seed)(empty, CONTENT_FREE, [0])
    row = {name: column[0] for name, column in rows.items()}
    device = model.get_input_embeddings().weight.device
    batch = {name: values.to(device) for name, values in ContextCollator(tokenizer)([row]).items()}
    bias = model.calibrate(**batch)
    logger.info("Calibrated: %s.", ", ".join(f"{w} {b:.3f}" for w, b in zip(model.config.words, bias, strict=True)))
