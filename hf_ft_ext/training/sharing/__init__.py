"""The files and code that a run shares (`run_files`), without secrets and local paths (`privacy`, `text`)."""

from hf_ft_ext.training.sharing.run_files import (
    MACHINE_ARGUMENTS,
    FinishedRun,
    command_words,
    delta_code,
    is_machine_specific,
    matching,
    own_code_argument,
    recorded_own_code_argument,
    rerun_code,
)

__all__ = [
    "MACHINE_ARGUMENTS",
    "FinishedRun",
    "command_words",
    "delta_code",
    "is_machine_specific",
    "matching",
    "own_code_argument",
    "recorded_own_code_argument",
    "rerun_code",
]
