"""A run folder to a Hub repository: which files, in one commit, tried again where that can help."""

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

_TRIES = 3
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 8.0  # seconds
_MOMENTARY = (409, 412, 429)  # and all from 500 on


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
    """Write the model card into the run folder and push what `shared_files` names, in one commit.

    An adapter that names the demo encoder's folder is pushed with that model's Hub id in its place, and what is pushed
    names no folders of this machine. Where the Hub or the connection fails for the moment, the push is tried three
    times; what was uploaded is not uploaded again.

    Args:
        folder: what `run_glue.py` left: `run.json` and the saved model, adapter, delta or store.
        repo_id: `owner/name`, or `name` alone for one of your own; made if it does not exist.
        revision: a branch, made if it does not exist; `None` = main.
        private: whether a new repository is private; `None` = the owner's default.
        write_card: whether to write README.md (over one that is there).
        include: patterns of further files in the folder, such as pictures that README.md shows.

    Returns:
        The repository's address.

    Raises:
        InputError: the folder holds no finished run with a saved result, or `revision` cannot be a branch.
        PushError: the Hub refused, or could not be reached. The folder is as it was, but for the card.
    """
    folder = Path(folder)
    record = _record(folder)
    api = HfApi(token=token)
    repository = _tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), folder, repo_id)
    repo_id = repository.repo_id
    _tried(lambda: ensure_branch(repo_id, revision, token), folder, repo_id)
    if write_card:
        write_text(folder / CARD, model_card(folder, record, repo_id))
    files = shared_files(folder, record, include)
    if hooks_of(str(record["method"])) is None:
        logger.warning("Method %r is not installed here: files of its own are not pushed", record["method"])
    if names := left_out(folder, files):
        command = f"hf-ft-ext push {shlex.quote(str(folder))} --hub_model_id {shlex.quote(repo_id)}"
        logger.info("Not pushed: %s. To push one of them: %s --include NAME", ", ".join(names), command)
    _warn_of_local_base(record, folder)
    _tried(
        lambda: api.create_commit(
            repo_id, _operations(folder, record, files), commit_message=message, revision=revision
        ),
        folder,
        repo_id,
    )
    return str(repository)


def ensure_branch(repo_id: str, revision: str | None, token: str | None = None) -> None:
    """Make the branch `revision` of a repository if it does not exist, as `hf upload` does.

    Raises:
        InputError: it is a tag, or no name for a branch.
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
            f"hub_revision {revision!r} is no branch of {repo_id} and cannot become one "
            f"({error.server_message or 'the Hub refuses its name'}); pass the name of a branch"
        ) from error
    logger.info("Made the branch %r of %s", revision, repo_id)


def reason(error: BaseException) -> str:
    """Why the Hub refused or failed, and what to do about it, in one line."""
    chain = list(_chain(error))
    first = first_line(error)
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
        if missing := [key for key in ("method", "task", "model", "metrics", "command") if key not in record]:
            raise ValueError(f"it lacks {missing[0]!r}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{str(folder)!r} holds no finished run ({RUN_RECORD}: {error}); pass the output_dir of one"
        ) from error
    if not any(path.suffix == ".safetensors" for path in shared_files(folder, record)):
        raise InputError(f"{str(folder)!r} holds no saved model; it was an evaluation, and there is nothing to share")
    return record


def _operations(folder: Path, record: dict[str, Any], files: Iterable[Path]) -> list[CommitOperationAdd]:
    """Additions for one commit; new ones for each try, because a commit marks those that it took."""
    operations = []
    for path in files:
        replaced = {}
        if path == folder / ADAPTER_CONFIG and (base := base_model(record)) is not None:
            replaced = {"base_model_name_or_path": base} if os.path.isdir(_named_base(folder)) else {}
        content = public_content(path, folder, replaced)
        operations.append(CommitOperationAdd(path.relative_to(folder).as_posix(), content or str(path)))
    return operations


def _named_base(folder: Path) -> str:
    """What the folder's adapter names as its base model."""
    return str(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or "")


def _warn_of_local_base(record: dict[str, Any], folder: Path) -> None:
    if (folder / ADAPTER_CONFIG).is_file() and base_model(record) is None:
        name = _named_base(folder)
        logger.warning(
            "The adapter names a folder of this machine as its base model (%s): others cannot load it. Push that "
            "model too, and train from its Hub id.", last_part(name) if is_foreign_path(name) else name,
        )  # fmt: skip


def _tried(action: Callable[[], Any], folder: Path, repo_id: str) -> Any:
    """The result of `action`, tried again where the Hub or the connection failed for the moment."""

    def say(state: tenacity.RetryCallState) -> None:
        logger.warning(
            "Push to %s: %s. Next try in %g s.", repo_id, reason(state.outcome.exception()), state.next_action.sleep
        )

    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=tenacity.wait_exponential(multiplier=_FIRST_WAIT, exp_base=4, max=_LONGEST_WAIT),
        retry=tenacity.retry_if_exception(_is_momentary),
        before_sleep=say,
        reraise=True,
    )
    try:
        return tries(action)
    except InputError:
        raise
    except Exception as error:  # whatever the client raises, the run is there: say so
        raise PushError(
            f"--push_to_hub: {reason(error)}. The result is complete in {str(folder)!r}; to push it: "
            f"hf-ft-ext push {shlex.quote(str(folder))} --hub_model_id {shlex.quote(repo_id)}"
        ) from error


def _is_momentary(error: BaseException) -> bool:
    """Whether another try may succeed."""
    if isinstance(error, InputError):
        return False
    chain = list(_chain(error))
    status = _status(chain)
    if status is not None:
        return status in _MOMENTARY or status >= 500
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
