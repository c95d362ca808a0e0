"""The files and code that a run shares (`run_files`), without secrets and local paths (`privacy`, `text`)."""

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
