"""Contextual calibration: subtract a prompt model's logits for a content-free row from all logits."""

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

CONTENT_FREE = "content-free"  # stands for a split's name in the draw of demonstrations

logger = logging.getLogger(__name__)


def calibrate(
    model: PromptForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    data_args: DataArguments,
    model_max_length: int | None = None,
    data_seed: int | None = None,
) -> None:
    """Calibrate the model: subtract the logits of the template around empty texts from all later logits.

    With demonstrations, the mean logits over `num_sample` contexts with empty texts are subtracted: one bias for the
    model. These contexts are drawn as for a row to evaluate, without `demo_filter`, which needs a text to compare. The
    source uses the same demonstrations for all rows and for the content-free text. It also averages over three
    content-free texts ("N/A", "[MASK]" and the empty text).

    Args:
        data_seed: seed of the demonstrations.

    Raises:
        InputError: the template has only texts, the model has no common label words, or demonstrations cannot be
            drawn.

    Source: Zhao et al., ICML 2021, arXiv 2102.09690.
    """
    encoder = prompt_encoder(data, tokenizer, data_args, model.config, model_max_length)
    empty = [[""]] * len(data.text_columns)
    rows: dict[str, Any] = encoder(empty)
    if not rows["input_ids"][0]:
        raise InputError(
            f"calibrate: template {model.config.template!r} has only the row's text, so it is empty without a text; "
            "leave --calibrate out"
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
