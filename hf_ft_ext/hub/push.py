"""A run folder to a Hub repository: which files, in one commit, tried again where that can help."""

import fnmatch
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hf_ft_ext.adapters.folder import local_files
from hf_ft_ext.errors import InputError, PushError
from hf_ft_ext.hub.card import ADAPTER_CONFIG, base_model, model_card
from hf_ft_ext.training.files import write_text
from hf_ft_ext.training.record import RUN_RECORD

logger = logging.getLogger(__name__)

_CARD = "README.md"
# Steps on the way, and what is not the model's: pickles, caches, logs, predictions on others' data.
_NOT_SHARED = (
    "checkpoint-*", "run-*", "training_args.bin", "optimizer.pt", "scheduler.pt", "*.pth", "*.tmp", "*.log", "*.lock",
    "predictions*.tsv", "hp_search.json", "__pycache__",
)  # fmt: skip
_WAITS = (2.0, 8.0)  # seconds before the second and the third try


def shared_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a run that go to the Hub: all but checkpoints, pickles, logs, predictions, hidden files."""
    folder = Path(folder)

    def wanted(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return not any(p.startswith((".", "_")) or any(fnmatch.fnmatch(p, n) for n in _NOT_SHARED) for p in parts)

    here_only = set(local_files(folder))
    return sorted(path for path in folder.rglob("*") if path.is_file() and wanted(path) and path not in here_only)


def push_run(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    write_card: bool = True,
    message: str = "Push a run",
) -> str:
    """Write the model card into the run folder and push the folder, in one commit.

    An adapter that names the demo encoder's folder is pushed with that model's Hub id in its place. Where the Hub or
    the connection fails for the moment, the push is tried three times; what was uploaded is not uploaded again.

    Args:
        folder: what `run_glue.py` left: `run.json` and the saved model, adapter, delta or store.
        repo_id: `owner/name`, or `name` alone for one of your own; made if it does not exist.
        private: whether a new repository is private; `None` = the owner's default.
        write_card: whether to write README.md (over one that is there).

    Returns:
        The repository's address.

    Raises:
        InputError: the folder holds no finished run with a saved result.
        PushError: the Hub refused, or could not be reached. The folder is as it was, but for the card.
    """
    folder = Path(folder)
    record = _record(folder)
    api = HfApi(token=token)
    repository = _tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), folder, repo_id)
    repo_id = repository.repo_id
    if write_card:
        write_text(folder / _CARD, model_card(folder, record, repo_id))
    _tried(lambda: api.create_commit(repo_id, _operations(folder, record), commit_message=message, revision=revision),
           folder, repo_id)  # fmt: skip
    return str(repository)


def reason(error: BaseException) -> str:
    """Why the Hub refused or failed, and what to do about it, in one line."""
    chain = list(_chain(error))
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "offline mode is on; unset HF_HUB_OFFLINE"
    if any(isinstance(link, LocalTokenNotFoundError) for link in chain):
        return "there is no token; log in with `hf auth login`, or pass --hub_token"
    status = _status(chain)
    if status is None:
        if any(map(is_of_the_hub, chain)):
            return f"the connection failed ({_deepest(chain)}); check the network and try again"
        return first
    advice = {
        401: "the token is missing or not valid; log in with `hf auth login`, or pass --hub_token",
        403: "the token may not write there; use one with write permission, or another --hub_model_id",
        404: "there is no such repository or revision, or the token may not see it; check --hub_model_id",
        409: "the repository was changed by somebody else at the same time; try again",
        412: "the repository was changed by somebody else at the same time; try again",
        429: "too many requests for now; try again later",
    }.get(status)
    if advice is None:
        advice = "the Hub has a fault of its own; try again later" if status >= 500 else first
    return f"the Hub answered {status}: {advice}"


def is_of_the_hub(error: BaseException) -> bool:
    """Whether the Hub's client or the network may have raised it (the client's HTTP library has errors of its own)."""
    return isinstance(error, OSError) or "httpx" in type(error).__module__


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(folder)!r} holds no finished run ({RUN_RECORD}: {error}); pass the output_dir of one"
        ) from error
    if not any(path.suffix == ".safetensors" for path in shared_files(folder)):
        raise InputError(f"{str(folder)!r} holds no saved model; it was an evaluation, and there is nothing to share")
    return record


def _operations(folder: Path, record: dict[str, Any]) -> list[CommitOperationAdd]:
    """Additions for one commit; new ones for each try, because a commit marks those that it took."""
    operations = []
    for path in shared_files(folder):
        content: str | bytes = str(path)
        if path.name == ADAPTER_CONFIG and path.parent == folder:
            content = _with_hub_base(path, base_model(record))
        operations.append(CommitOperationAdd(path.relative_to(folder).as_posix(), content))
    return operations


def _with_hub_base(path: Path, base: str | None) -> bytes:
    """The adapter's configuration, its base model named so that it loads on other machines too."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path") or ""
    if base is not None and name != base and os.path.isdir(name):
        config["base_model_name_or_path"] = base
    elif base is None:
        logger.warning(
            "The adapter names a folder of this machine as its base model (%s): others cannot load it. Push that "
            "model too, and train from its Hub id.", name,
        )  # fmt: skip
    return (json.dumps(config, indent=2) + "\n").encode()


def _tried(action: Callable[[], Any], folder: Path, repo_id: str) -> Any:
    """The result of `action`, tried again where the Hub or the connection failed for the moment."""
    for wait in (*_WAITS, None):
        try:
            return action()
        except InputError:
            raise
        except Exception as error:  # whatever the client raises, the run is there: say so
            status = _status(list(_chain(error)))
            again = status in (409, 412, 429) or (status or 0) >= 500 or (status is None and _is_of_the_network(error))
            if wait is None or not again:
                raise PushError(
                    f"--push_to_hub: {reason(error)}. The result is complete in {str(folder)!r}; to push it: "
                    f"python -m hf_ft_ext.hub {folder} --hub_model_id {repo_id}"
                ) from error
            logger.warning("Push to %s: %s. Next try in %g s.", repo_id, reason(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _is_of_the_network(error: BaseException) -> bool:
    chain = list(_chain(error))
    if any(isinstance(link, OfflineModeIsEnabled | LocalTokenNotFoundError) for link in chain):
        return False
    return any(isinstance(link, ConnectionError | TimeoutError) or "httpx" in type(link).__module__ for link in chain)


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(chain: list[BaseException]) -> int | None:
    responses = (getattr(link, "response", None) for link in chain if isinstance(link, HfHubHTTPError))
    return next((response.status_code for response in responses if response is not None), None)


def _deepest(chain: list[BaseException]) -> str:
    """The last cause that says something."""
    said = [str(link).strip().splitlines()[0] for link in chain if str(link).strip()]
    return said[-1] if said else type(chain[-1]).__name__
