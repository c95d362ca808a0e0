"""The gradient pre-pass: gradients of some training batches at the current weights, without any update."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer

from hf_ft_ext.errors import InputError
from hf_ft_ext.label_tokens import label_count, predicts_next_tokens
from hf_ft_ext.per_example.state import evaluating
from hf_ft_ext.sparse.basis import GRADIENT
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.training.loader_batches import draws_own_batches, loader_batches
from hf_ft_ext.training.method_trainer import loss_of_batch
from hf_ft_ext.training.weights.precision import training_precision

logger = logging.getLogger(__name__)

_BY_LENGTH = "group_by_length"  # of transformers' train_sampling_strategy
_NO_ROWS = "the training data yields no rows, but the pre-pass needs some; check it"


def for_each_gradient(
    trainer: Trainer,
    layers: Mapping[str, SparseGradLinear],
    steps: int,
    receive: Callable[[str, torch.Tensor], None],
    desc: str,
    draw: int = 0,
) -> dict[str, float]:
    """Call `receive(name, gradient)` for each layer's weight gradient in each of `steps` training batches.

    Each gradient, shape (out, in), belongs to one optimizer step (all processes and micro-batches together), at the
    current weights and without dropout. Whole batches are distributed over the processes. A sum in `receive`, reduced
    over processes, is therefore the same up to rounding for any number of processes and any split into micro-batches.
    No global random generator is used: a private one, seeded with `args.seed`, draws the same batches in each call
    with the same `draw`. If training groups rows by length, so do these batches.

    If the trainer's data loader or sampler was overridden, its batches are used: each process reads its part of every
    step's batch, as in training, and the gradients are summed over processes.

    Returns:
        Tokens that reach each kind of layer in one optimizer step of one process, by kind.

    Raises:
        InputError: a gradient is not finite (names the batch and the layer), no batch has a label, or there is no
            training data.
    """
    args, model = trainer.args, trainer.model
    tokens = {layer.kind: torch.zeros((), device=layer.weight.device) for layer in layers.values()}
    first_of_kind = {layer.kind: layer for layer in reversed(list(layers.values()))}
    hooks = [layer.register_forward_pre_hook(_token_counter(tokens[kind])) for kind, layer in first_of_kind.items()]
    weights = [layer.weight for layer in layers.values()]
    own_batches = draws_own_batches(trainer)
    mine = range(args.process_index, steps, args.world_size)
    labels = 0.0
    bar = tqdm(total=len(mine), desc=desc, disable=args.disable_tqdm or not trainer.is_world_process_zero())
    batches = _loader_batches(trainer, steps, draw) if own_batches else _batches(trainer, steps, draw)
    try:
        with evaluating(model):
            for number, micro_batches in enumerate(batches):
                if number not in mine and not own_batches:
                    continue
                with _plain_gradients(layers.values()):
                    gradients, found = _batch_gradient(trainer, weights, micro_batches, over_processes=own_batches)
                    labels += found
                if number not in mine:
                    continue
                for name, gradient in zip(layers, gradients, strict=True):
                    if not torch.isfinite(gradient).all():
                        raise InputError(
                            f"the gradient of {name} is not finite in batch {number} of the pre-pass; look for bad "
                            "rows or labels in the training data, or load the model in float32"
                        )
                    receive(name, gradient)
                bar.update()
    finally:
        bar.close()
        for hook in hooks:
            hook.remove()
    if not trainer.accelerator.reduce(torch.tensor(labels, device=args.device)):
        raise InputError(
            "no batch of the pre-pass has a label to predict (all are -100); check the labels of the training data"
        )
    shared = steps * args.world_size
    return {kind: trainer.accelerator.reduce(count).item() / shared for kind, count in tokens.items()}


def own_steps(trainer: Trainer, count: int) -> Iterator[list[tuple[dict, float]]]:
    """Yield this process's micro-batches of each of `count` optimizer steps, with weights for their mean losses.

    Together the processes read the rows that one process with the total batch size would read. If the trainer's data
    loader or sampler was overridden, each process reads its own loader. The gradient of the mean loss over all labels
    of a step is the sum of the weighted gradients here, averaged over the processes. No global random generator is
    used.

    Raises:
        InputError: the training data set, or the stream, has no rows.
    """
    processes = trainer.args.world_size
    for batches in _own_batches(trainer, count):
        # times the number of processes, as the gradients are averaged over them
        shares, _ = _label_shares(trainer, batches, over_processes=True)
        yield [(batch, processes * share) for batch, share in zip(batches, shares, strict=True)]


@contextlib.contextmanager
def _plain_gradients(layers: Collection[SparseGradLinear]) -> Iterator[None]:
    """Make every layer compute the unrotated gradient of its whole weight, in any state of preparation."""
    before = [(layer, layer.weight.requires_grad, layer.support, layer.basis.rotates) for layer in layers]
    try:
        for layer in layers:
            layer.weight.requires_grad_(True)
            layer.support, layer.basis.rotates = None, GRADIENT
        yield
    finally:
        for layer, trains, support, rotates in before:
            layer.weight.requires_grad_(trains)
            layer.support, layer.basis.rotates = support, rotates


def _token_counter(total: torch.Tensor):
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        total.add_(inputs[0].numel() // inputs[0].shape[-1])

    return hook


def _batch_gradient(
    trainer: Trainer, weights: list[nn.Parameter], micro_batches: list[dict], over_processes: bool
) -> tuple[list[torch.Tensor], float]:
    """Return the gradients of the mean loss over one optimizer step's batch, and the number of its labels.

    Args:
        over_processes: whether the batch is distributed over the processes.
    """
    total = [torch.zeros_like(weight) for weight in weights]
    shares, labels = _label_shares(trainer, micro_batches, over_processes)
    for batch, share in zip(micro_batches, shares, strict=True):
        if not share:  # no label token: the mean loss is not defined, and its weight is 0
            continue
        with torch.enable_grad(), training_precision(trainer):
            loss = loss_of_batch(trainer, trainer.model, trainer._prepare_inputs(batch))
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for sum_, gradient in zip(total, gradients, strict=True):
            if gradient is None:  # an expert that was routed none of these tokens
                continue
            # Mean over all labels: sum_b (n_b / n) grad(mean loss of micro-batch b)
            sum_.add_(gradient, alpha=share)
    if over_processes and trainer.args.world_size > 1:
        total = [trainer.accelerator.reduce(gradient) for gradient in total]
    return total, labels


def _label_shares(trainer: Trainer, micro_batches: list[dict], over_processes: bool) -> tuple[list[float], float]:
    """Return `n_b / n`, each micro-batch's weight in the mean loss over all labels of an optimizer step, and `n`.

    Args:
        over_processes: whether `n` counts the labels of all processes.
    """
    shifted = predicts_next_tokens(trainer.model)
    counts = [label_count(batch, shifted) for batch in micro_batches]
    total = float(sum(counts))
    if over_processes and trainer.args.world_size > 1:
        total = trainer.accelerator.reduce(torch.tensor(total, device=trainer.args.device)).item()
    return [count / max(total, 1.0) for count in counts], total


def _loader_batches(trainer: Trainer, steps: int, draw: int) -> Iterator[list[dict]]:
    """Yield the training data loader's batches, grouped by optimizer step; each `draw` gives other batches."""
    micro = trainer.args.gradient_accumulation_steps
    batches = loader_batches(trainer, steps * micro, skip=draw * steps * micro)
    for start in range(0, len(batches), micro):
        yield batches[start : start + micro]


def _batches(trainer: Trainer, steps: int, draw: int) -> Iterator[list[dict]]:
    """Yield the batch of each optimizer step as a list of collated micro-batches, the same on every process."""
    args = trainer.args
    batch_size, micro = trainer.get_total_train_batch_size(args), args.train_batch_size
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="pre-pass")
    for examples in _examples(trainer, steps, batch_size, draw):
        yield [collate(examples[i : i + micro]) for i in range(0, len(examples), micro)]


def _own_batches(trainer: Trainer, count: int) -> Iterator[list[dict]]:
    args = trainer.args
    if draws_own_batches(trainer):
        yield from _loader_batches(trainer, count, draw=0)
        return
    micro = args.train_batch_size
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="pre-pass")
    for examples in _examples(trainer, count, trainer.get_total_train_batch_size(args), draw=0):
        share = -(-len(examples) // args.world_size)
        mine = examples[args.process_index * share :][:share] or examples[:share]  # fewer rows than processes
        yield [collate(mine[i : i + micro]) for i in range(0, len(mine), micro)]


def _examples(trainer: Trainer, steps: int, batch_size: int, draw: int) -> Iterator[list]:
    dataset = trainer.train_dataset
    if hasattr(dataset, "__len__"):
        if not len(dataset):
            raise InputError(_NO_ROWS)
        generator = torch.Generator().manual_seed(trainer.args.seed + draw)
        batch_size = min(batch_size, len(dataset))
        if steps * batch_size > len(dataset):
            logger.info(
                "%d pre-pass batches of %d rows use the %d training rows more than once",
                steps,
                batch_size,
                len(dataset),
            )
        rounds = -(-steps * batch_size // len(dataset))
        order = torch.cat([torch.randperm(len(dataset), generator=generator) for _ in range(rounds)]).tolist()
        order = order[: steps * batch_size]
        if trainer.args.train_sampling_strategy == _BY_LENGTH:
            order = _longest_first(trainer, order)
        for i in range(steps):
            yield [dataset[row] for row in order[i * batch_size : (i + 1) * batch_size]]
        return
    stream = _repeated(dataset)
    for _ in range(steps):
        yield list(itertools.islice(stream, batch_size))


def _repeated(stream: Iterable) -> Iterator:
    """The rows of a stream, read again whenever it ends."""
    while True:
        empty = True
        for row in stream:
            empty = False
            yield row
        if empty:
            raise InputError(_NO_ROWS)


def _longest_first(trainer: Trainer, order: list[int]) -> list[int]:
    """Sort row numbers by decreasing length, so that batches hold rows of similar length, as in training."""
    dataset, column = trainer.train_dataset, trainer.args.length_column_name
    tokens = "input_ids" if trainer.processing_class is None else trainer.processing_class.model_input_names[0]

    def length(row: int) -> int:
        example = dataset[row]
        return example[column] if column in example else len(example[tokens])

    return sorted(order, key=length, reverse=True)
