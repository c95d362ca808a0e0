"""The files of a method in its run folder: which it writes, which it shares, and how others load the result.

A trainer class can define these attributes; all are optional:

- `own_files`: patterns of the files that the method writes besides model or adapter and tokenizer.
- `shared_files`: those of them that are pushed to the Hub.
- `loading_code(run)`: a class method; returns Python that loads the result from the Hub, if it is not a plain model or
  adapter.
- `holds_result(folder)`, `load_finished(folder, labels, given, load)`, `from_folder(folder, args, ...)`: class methods
  of a method whose result is more than a model. The first says whether a folder holds such a result. The second
  returns its tokenizer and model (`load` is the launcher's default loader). The third returns a trainer that predicts
  with it.
- `delta_code(run)`: a class method; returns Python that applies a delta to the base model, or `None`.
- `parameters_text`: what the counted parameters are, if none of them trains; for the model card and the final table.

`hf_ft_ext.methods.hooks_of` returns the class. Pushing a finished run and deleting an old one happen without a trainer
instance.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ft_ext.training.sharing.privacy import is_secret

_OWN_CODE = ", trust_remote_code=True"

# Arguments for the location, display and sharing of a run. None of them changes the result.
MACHINE_ARGUMENTS = frozenset({
    "overwrite_output_dir", "push_to_hub", "hub_model_id", "hub_strategy", "hub_revision", "hub_private_repo",
    "hub_always_push", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name", "use_cpu",
})  # fmt: skip


def is_machine_specific(name: str) -> bool:
    """Whether an argument is useless on another machine: local folders, progress display, secrets."""
    return name in MACHINE_ARGUMENTS or name.endswith("_dir") or is_secret(name)


@dataclass(frozen=True)
class FinishedRun:
    """A run that is to be shared.

    Attributes:
        folder: its output folder.
        record: the content of `run.json`, without paths of this machine.
        repo_id: the repository that others load from.
        base: Hub id of the model that training started from; `None` for a local model.
    """

    folder: Path
    record: dict[str, Any]
    repo_id: str
    base: str | None

    def has(self, name: str) -> bool:
        """Whether the folder holds this file."""
        return (self.folder / name).is_file()


def matching(folder: str | os.PathLike, patterns: Iterable[str]) -> list[Path]:
    """The files in `folder` whose relative path matches a pattern; `*` matches within a folder, `**/` any depth.

    Symbolic links are left out, because they may point anywhere.
    """
    folder = Path(folder)
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    inside = (path for path in found if path.resolve().is_relative_to(folder.resolve()))
    return sorted(path for path in inside if path.is_file() and not path.is_symlink())


def rerun_code(run: FinishedRun, settings: dict[str, Any], words: Iterable[str]) -> str:
    """Python code that downloads the run's repository into `folder` and runs the launcher with the run's settings.

    Args:
        settings: arguments that replace the run's own; a value of `None` removes one.
        words: lines of Python with further command-line words, which may use `folder`.
    """
    own = {key: value for key, value in (run.record.get("arguments") or {}).items() if not is_machine_specific(key)}
    own = {key: value for key, value in {**own, **settings}.items() if value is not None}
    own = {key: value for key, value in own.items() if key not in ("method", "do_train")}
    if not own.keys() & {"do_eval", "do_predict"}:
        own["do_eval"] = True
    local = run.repo_id.rpartition("/")[2]
    return "\n".join(
        (
            "from hf_ft_ext.launch.run import main",
            "from huggingface_hub import snapshot_download",
            "",
            f"folder = snapshot_download({run.repo_id!r}, local_dir={local!r})",
            "# It predicts from its training data, which must be available; the pushed files save recomputation.",
            "main([",
            f"    '--method', {run.record['method']!r}, '--do_train', '--output_dir', {local + '-again'!r},",
            *(f"    {', '.join(map(repr, command_words(key, value)))}," for key, value in sorted(own.items())),
            *(f"    {line}" for line in words),
            "])",
        )
    )


def command_words(key: str, value: Any) -> list[str]:
    """An argument as words of a command line."""
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]


def own_code_argument(model: Any) -> str:
    """The further argument of `from_pretrained` for a model, or one inside peft's wrapper, that has its own code."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _OWN_CODE if type(inner).__module__.startswith("transformers_modules.") else ""


def recorded_own_code_argument(run: FinishedRun) -> str:
    """The same for the model of a finished run, by the line that loads it."""
    return _OWN_CODE if _OWN_CODE in (run.record.get("load") or "") else ""


def delta_code(run: FinishedRun, file: str, reader: str) -> str | None:
    """Python code that applies the delta `file` to the base model with the function `reader` of `hf_ft_ext`.

    `None` if the file does not exist, the base model is not on the Hub, or it is inside of a prompt model.
    """
    load = run.record.get("load") or "AutoModelForSequenceClassification"
    kind = load.partition(".")[0]
    if run.base is None or not run.has(file) or not kind.startswith("AutoModel"):
        return None
    own_code = recorded_own_code_argument(run)
    revision = (run.record.get("model_source") or {}).get("revision") or "main"
    chosen = "" if revision == "main" else f", revision={revision!r}"
    return "\n".join(
        (
            "from huggingface_hub import snapshot_download",
            f"from transformers import AutoConfig, {kind}",
            f"from hf_ft_ext import {reader}",
            "",
            "# the labels of the run, and the type of its weights",
            f"config = AutoConfig.from_pretrained({run.repo_id!r}{own_code})",
            f"base = {kind}.from_pretrained(",
            f"    {run.base!r}{chosen}{own_code}, config=config, ignore_mismatched_sizes=True",
            ")",
            f"model = {reader}(base, snapshot_download({run.repo_id!r}, allow_patterns={file!r}))",
        )
    )
