"""`--push_to_hub` in the launcher: push once at the end, with the metrics; a failed push does not lose the run."""

import os

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_ft_ext.arguments import RunArguments
from hf_ft_ext.errors import InputError, PushError
from hf_ft_ext.hub.push import ensure_branch, is_hub_error, push_run, reason


def prepare(run_args: RunArguments, args: TrainingArguments) -> None:
    """Create no repository in a dry run, push only at the end by default, and keep the token out of saved files.

    transformers pushes at every save by default, including unfinished results. Each checkpoint also holds pickled
    arguments, and these hold the token. The token is therefore passed to the Hub client by its environment variable.
    """
    if run_args.dry_run:
        args.push_to_hub = False
    if "hub_strategy" not in run_args.given:
        args.hub_strategy = HubStrategy.END
    if args.hub_token and args.push_to_hub:
        os.environ["HF_TOKEN"] = args.hub_token
    args.hub_token = None


def prepare_branch(trainer: Trainer) -> None:
    """Create the branch to push to if it does not exist, on the first process, before training.

    Raises:
        InputError: it cannot be created.
    """
    args = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero():
        return
    try:
        ensure_branch(trainer.hub_model_id, args.hub_revision)
    except InputError:
        raise
    except Exception as error:
        if not is_hub_error(error):
            raise
        raise InputError(
            f"--hub_revision {args.hub_revision}: the branch cannot be found or made: {reason(error)}"
        ) from error


def postpone_push(trainer: Trainer) -> bool:
    """Return whether the run is to be pushed, and keep the trainer from pushing by itself.

    Its arguments are not the launcher's where it needs a class of its own (trl's, `Seq2SeqTrainer`'s).
    """
    wanted, trainer.args.push_to_hub = trainer.args.push_to_hub, False
    return wanted


def push_finished(trainer: Trainer, push: bool) -> PushError | InputError | None:
    """Push the finished run, on the first process.

    Returns:
        The error, if any; the caller raises it after all processes have finished.
    """
    if not push or not trainer.is_world_process_zero():
        return None
    args = trainer.args
    try:
        if hasattr(trainer, "save_for_sharing"):  # a method with further files to share
            trainer.save_for_sharing(args.output_dir)
        address = push_run(
            args.output_dir, trainer.hub_model_id, revision=args.hub_revision, private=args.hub_private_repo
        )
    except (PushError, InputError) as error:
        return error
    print(f"pushed: {address}")
    return None
