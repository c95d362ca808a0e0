"""`--streaming`: what it cannot go with, and the order in which a stream's rows are trained on."""

from datasets import IterableDataset

from hf_ft_ext.arguments import PROMPT_DEMO, DataArguments, MethodTrainingArguments, RunArguments
from hf_ft_ext.errors import InputError

_IN_ORDER = ("random", "sequential")


def check_streaming(run_args: RunArguments, data_args: DataArguments, args: MethodTrainingArguments) -> None:
    """Check that a run can read its training rows as a stream.

    Raises:
        InputError: `streaming` with something that needs all rows at once, or a setting of streams without it.
    """
    if not data_args.streaming:
        if "stream_buffer" in run_args.given:
            raise InputError(
                f"--stream_buffer {data_args.stream_buffer} shuffles a stream; pass --streaming with it, "
                "or leave it out"
            )
        return
    if not args.do_train:
        raise InputError("--streaming reads the training split; add --do_train, or leave it out")
    if args.needs_all_rows:
        raise InputError(
            f"--streaming: method {run_args.method} solves the task at once and needs all rows for it; leave it out"
        )
    if run_args.from_linearhead:
        raise InputError("--streaming: --from_linearhead fits a head on all rows at once; leave out one of the two")
    if data_args.few_shot_type == PROMPT_DEMO:
        raise InputError("--streaming: demonstrations are drawn from all training rows; leave out one of the two")
    if args.max_steps < 1:
        raise InputError("--streaming: how many rows there are is not known, so neither is an epoch; pass --max_steps")
    if args.train_sampling_strategy not in _IN_ORDER:
        raise InputError(
            f"--streaming takes rows as they come and cannot sort them: train_sampling_strategy="
            f"{args.train_sampling_strategy} has to be one of {', '.join(_IN_ORDER)}"
        )
    if data_args.stream_buffer < 1:
        raise InputError(f"stream_buffer={data_args.stream_buffer} holds no row; pass 1 or more")


def in_training_order(stream: IterableDataset, buffer: int, args: MethodTrainingArguments) -> IterableDataset:
    """Shuffle a stream within a buffer of so many rows, anew in every pass, unless `args` want its own order.

    Every process reads the stream and takes its part of each step's rows, so that batches may differ in length.
    """
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False
    if args.train_sampling_strategy == "sequential":
        return stream
    return stream.shuffle(seed=args.seed if args.data_seed is None else args.data_seed, buffer_size=buffer)
