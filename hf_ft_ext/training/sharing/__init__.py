"""What a run shares with others (`run_files`), without secrets and paths of this machine (`privacy`, `text`)."""

from hf_ft_ext.training.sharing.run_files import (
    OF_THE_MACHINE,
    FinishedRun,
    command_words,
    delta_code,
    matching,
    of_the_machine,
    rerun_code,
)

__all__ = ["OF_THE_MACHINE", "FinishedRun", "command_words", "delta_code", "matching", "of_the_machine", "rerun_code"]
