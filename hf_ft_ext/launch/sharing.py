"""`--push_to_hub` in the launcher: at the end, with the run's numbers, and without risk for the run."""

import os

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_ft_ext.arguments import RunArguments
from hf_ft_ext.errors import InputError, PushError
from hf_ft_ext.hub.push import push_run


def prepare(run_args: RunArguments, args: TrainingArguments) -> None:
    """Make no repository for a dry run, push once at the end unless asked otherwise, and keep the token out of files.

    transformers' own default pushes at every save, unfinished results and pickled arguments included. These hold the
    token, in every checkpoint: so it is handed to the Hub's client by its environment variable.
    """
    if run_args.dry_run:
        args.push_to_hub = False
    if "hub_strategy" not in run_args.given:
        args.hub_strategy = HubStrategy.END
    if args.push_to_hub and args.hub_token:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


def postponed(args: TrainingArguments) -> bool:
    """Whether the run is to be pushed; from here on the trainer itself pushes nothing."""
    wanted, args.push_to_hub = args.push_to_hub, False
    return wanted


def push_finished(trainer: Trainer, push: bool) -> PushError | InputError | None:
    """Push the finished run, on the first process.

    Returns:
        What went wrong, to be raised when all processes have ended their work.
    """
    if not push or not trainer.is_world_process_zero():
        return None
    args = trainer.args
    try:
        if hasattr(trainer, "save_for_sharing"):  # a method with files for others beside what it saves
            trainer.save_for_sharing(args.output_dir)
        address = push_run(
            args.output_dir, trainer.hub_model_id, revision=args.hub_revision, private=args.hub_private_repo
        )
    except (PushError, InputError) as error:
        return error
    print(f"pushed: {address}")
    return None
