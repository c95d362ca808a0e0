"""Save the prompt of the base model with an adapter."""

from pathlib import Path

from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ft_ext.files import write_text
from hf_ft_ext.prompts.configuration import PROMPT_FILE
from hf_ft_ext.prompts.model import is_prompt_model


class SavePrompt(TrainerCallback):
    """Writes a prompt model's configuration, with template and words, next to every saved adapter of it.

    `PromptForSequenceClassification.from_adapter(folder)` loads the base model from it. A prompt model saved in full
    does not need this file.
    """

    def on_save(self, args, state, control, model=None, **kwargs):
        self._write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", args, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._write(Path(args.output_dir), args, model)

    @staticmethod
    def _write(folder: Path, args, model) -> None:
        if args.should_save and isinstance(model, PeftModel) and is_prompt_model(model):
            write_text(folder / PROMPT_FILE, model.get_base_model().config.to_json_string(use_diff=False))
