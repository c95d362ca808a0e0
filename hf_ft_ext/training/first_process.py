"""Work of the first process whose result, or error, all processes get."""

import itertools
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

from hf_ft_ext.errors import InputError

Result = TypeVar("Result")


def on_first_process(find: Callable[[], Result]) -> Result:
    """Return the result of `find()` of the first process, on every process; all have to call it.

    Raises:
        InputError: raised by `find()` on the first process, and then on all of them.
    """
    state = PartialState()
    if state.num_processes == 1:
        return find()
    outcome: list = [None]
    if state.is_main_process:
        try:
            outcome[0] = find()
        except InputError as error:
            outcome[0] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def broadcast_weights(model: nn.Module, processes: int) -> None:
    """Copy the weights of the first process to all: a new head may be initialized differently on each."""
    if processes > 1:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            broadcast(tensor.data)
