"""An adapter's folder says which prompt its base model had."""

from pathlib import Path

from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ft_ext.files import write_json
from hf_ft_ext.prompts.configuration import PROMPT_FILE
from hf_ft_ext.prompts.model import is_prompt_model


class SavePrompt(TrainerCallback):
    """Writes template, words and configuration of a prompt model beside every adapter that is saved of it.

    `PromptForSequenceClassification.from_adapter(folder)` makes the base model of them. A prompt model that is saved
    as a whole needs nothing of this.
    """

    def on_save(self, args, state, control, model=None, **kwargs):
        self._write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", args, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._write(Path(args.output_dir), args, model)

    @staticmethod
    def _write(folder: Path, args, model) -> None:
        if args.should_save and isinstance(model, PeftModel) and is_prompt_model(model):
            write_json(folder / PROMPT_FILE, model.get_base_model().config.to_dict())
