"""Push a run folder to a Hub repository in one commit, with retries."""

import json
import logging
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tenacity
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hf_ft_ext.errors import InputError, PushError, first_line
from hf_ft_ext.files import write_text
from hf_ft_ext.hub.card import base_model, model_card
from hf_ft_ext.hub.files import ADAPTER_CONFIG, CARD, left_out, public_content, shared_files
from hf_ft_ext.methods import hooks_of
from hf_ft_ext.training.runs.record import RUN_RECORD
from hf_ft_ext.training.sharing.privacy import is_foreign_path, last_part

logger = logging.getLogger(__name__)

_MAX_TRIES = 3
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 8.0  # seconds
_TRANSIENT_STATUS = (409, 412, 429)  # and all from 500 on


def push_run(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    write_card: bool = True,
    include: Iterable[str] = (),
    message: str = "Push a run",
) -> str:
    """Write the model card into the run folder and push `shared_files`, in one commit.

    The base model of an adapter is pushed as its Hub id if it is the demo encoder, and pushed files contain no paths
    of this machine. After a temporary failure of the Hub or the connection, the push is tried up to three times; files
    that were uploaded already are not uploaded again.

    Args:
        folder: output folder of `run_glue.py`: `run.json` and the saved model, adapter, delta or store.
        repo_id: `owner/name`, or `name` for a repository of your own; created if it does not exist.
        revision: a branch, created if it does not exist; `None` = main.
        private: whether a new repository is private; `None` = the owner's default.
        write_card: whether to write README.md (an existing one is replaced).
        include: patterns of further files in the folder, such as pictures that README.md shows.

    Returns:
        The repository's address.

    Raises:
        InputError: the folder has no finished run with a saved result, or `revision` cannot be a branch.
        PushError: the Hub refused, or could not be reached. The folder does not change, except for the card.
    """
    folder = Path(folder)
    record = _record(folder)
    api = HfApi(token=token)
    repository = _with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True), folder, repo_id)
    repo_id = repository.repo_id
    _with_retries(lambda: ensure_branch(repo_id, revision, token), folder, repo_id)
    if write_card:
        write_text(folder / CARD, model_card(folder, record, repo_id))
    files = shared_files(folder, record, include)
    if hooks_of(str(record["method"])) is None:
        logger.warning(
            "Method %r is not installed here, so its method-specific files are not pushed", record["method"]
        )
    if names := left_out(folder, files):
        command = f"hf-ft-ext push {shlex.quote(str(folder))} --hub_model_id {shlex.quote(repo_id)}"
        logger.info("Not pushed: %s. To push a file of these too: %s --include NAME", ", ".join(names), command)
    _warn_of_local_base(record, folder)
    _with_retries(
        lambda: api.create_commit(
            repo_id, _operations(folder, record, files), commit_message=message, revision=revision
        ),
        folder,
        repo_id,
    )
    return str(repository)


def ensure_branch(repo_id: str, revision: str | None, token: str | None = None) -> None:
    """Create the branch `revision` of a repository if it does not exist, as `hf upload` does.

    Raises:
        InputError: it is a tag, or not a valid name of a branch.
    """
    if revision is None:
        return
    api = HfApi(token=token)
    refs = api.list_repo_refs(repo_id, include_pull_requests=revision.startswith("refs/"))
    known = (*refs.branches, *(refs.pull_requests or ()))
    if any(revision in (ref.name, ref.ref) for ref in known):
        return
    if any(revision in (tag.name, tag.ref) for tag in refs.tags):
        raise InputError(f"hub_revision {revision!r} is a tag of {repo_id}; pass a branch, which can be pushed to")
    try:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    except BadRequestError as error:
        raise InputError(
            f"hub_revision {revision!r} is not a branch of {repo_id}, and the Hub cannot create it "
            f"({error.server_message or 'the Hub refuses its name'}); pass the name of a branch"
        ) from error
    logger.info("Created the branch %r of %s", revision, repo_id)


def reason(error: BaseException) -> str:
    """The reason why the Hub refused or failed, and the next action, in one line."""
    chain = list(_chain(error))
    first = first_line(error)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "offline mode is on; unset HF_HUB_OFFLINE"
    if any(isinstance(link, LocalTokenNotFoundError) for link in chain):
        return "there is no token; log in with `hf auth login`, or pass --hub_token"
    status = _status(chain)
    if status is None:
        if any(map(is_hub_error, chain)):
            return f"the connection failed ({_deepest(chain)}); check the network and try again"
        return first
    advice = {
        401: "the token is missing or not valid; log in with `hf auth login`, or pass --hub_token",
        403: "the token may not write there; use one with write permission, or another --hub_model_id",
        404: "there is no such repository or revision, or the token may not see it; check --hub_model_id",
        409: "the repository was changed by another user at the same time; try again",
        412: "the repository was changed by another user at the same time; try again",
        429: "too many requests; try again later",
    }.get(status)
    if advice is None:
        advice = "the Hub has an internal error; try again later" if status >= 500 else first
    return f"the Hub answered {status}: {advice}"


def is_hub_error(error: BaseException) -> bool:
    """Whether the Hub's client or the network may have raised it (the client's HTTP library has its own errors)."""
    return isinstance(error, OSError) or "httpx" in type(error).__module__


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
        if missing := [key for key in ("method", "task", "model", "metrics", "command") if key not in record]:
            raise ValueError(f"it has no {missing[0]!r}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{str(folder)!r} contains no finished run ({RUN_RECORD}: {error}); pass the output_dir of a run"
        ) from error
    if not any(path.suffix == ".safetensors" for path in shared_files(folder, record)):
        raise InputError(
            f"{str(folder)!r} contains no saved model, so there is nothing to push; pass a run that trained"
        )
    return record


def _operations(folder: Path, record: dict[str, Any], files: Iterable[Path]) -> list[CommitOperationAdd]:
    """Operations of one commit; created anew for each try, as a commit changes them."""
    operations = []
    for path in files:
        replaced = {}
        if path == folder / ADAPTER_CONFIG and (base := base_model(record)) is not None:
            replaced = {"base_model_name_or_path": base} if os.path.isdir(_named_base(folder)) else {}
        content = public_content(path, folder, replaced)
        operations.append(CommitOperationAdd(path.relative_to(folder).as_posix(), content or str(path)))
    return operations


def _named_base(folder: Path) -> str:
    """The base model in the configuration of the folder's adapter."""
    return str(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or "")


def _warn_of_local_base(record: dict[str, Any], folder: Path) -> None:
    if (folder / ADAPTER_CONFIG).is_file() and base_model(record) is None:
        name = _named_base(folder)
        logger.warning(
            "The base model of the adapter is a folder of this machine (%s), so others cannot load the adapter. Push "
            "that model too, and train from its Hub id.", last_part(name) if is_foreign_path(name) else name,
        )  # fmt: skip


def _with_retries(action: Callable[[], Any], folder: Path, repo_id: str) -> Any:
    """Return the result of `action`, with retries after temporary failures of the Hub or the connection."""

    def log_retry(state: tenacity.RetryCallState) -> None:
        failure = None if state.outcome is None else state.outcome.exception()
        cause = "failed" if failure is None else reason(failure)
        logger.warning("Push to %s: %s. Next try in %g s.", repo_id, cause, state.upcoming_sleep)

    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_MAX_TRIES),
        wait=tenacity.wait_exponential(multiplier=_FIRST_WAIT, exp_base=4, max=_LONGEST_WAIT),
        retry=tenacity.retry_if_exception(_is_transient),
        before_sleep=log_retry,
        reraise=True,
    )
    try:
        return tries(action)
    except InputError:
        raise
    except Exception as error:  # of any kind: tell the user that the run is complete and how to push it
        raise PushError(
            f"--push_to_hub: {reason(error)}. The result is complete in {str(folder)!r}; to push it: "
            f"hf-ft-ext push {shlex.quote(str(folder))} --hub_model_id {shlex.quote(repo_id)}"
        ) from error


def _is_transient(error: BaseException) -> bool:
    """Whether another try may succeed."""
    if isinstance(error, InputError):
        return False
    chain = list(_chain(error))
    status = _status(chain)
    if status is not None:
        return status in _TRANSIENT_STATUS or status >= 500
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
    """The first line of the deepest cause with a message."""
    messages = [str(link).strip().splitlines()[0] for link in chain if str(link).strip()]
    return messages[-1] if messages else type(chain[-1]).__name__
