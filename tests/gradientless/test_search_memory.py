"""The training plan of a search: bytes of optimizer state against what the optimizer holds after training."""

import pytest
import torch
from heads import make
from tiny import tiny_model
from torch.utils._pytree import tree_leaves

SEARCHES = [
    *({"search_method": method, "search_update": update}
      for method in ("activity", "node", "spsa") for update in ("sgd", "sign", "momentum", "adam")),
    {"search_method": "spsa", "search_update": "momentum", "search_moments": "buffer", "search_carry": True},
    {"search_method": "spsa", "search_update": "momentum", "search_direction": "lozo"},
    {"search_method": "spsa", "search_update": "momentum", "search_direction": "subzero", "search_rank": 3},
    {"search_method": "spsa", "search_update": "momentum", "search_direction": "lozo", "search_moments": "buffer"},
    {"search_method": "gld"},
    {"search_method": "adam"},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: "-".join(map(str, search.values())))
def test_the_plan_counts_the_bytes_that_the_optimizer_keeps(tmp_path, search, dtype):
    trainer = make(tmp_path, tiny_model(num_hidden_layers=1).to(dtype), max_steps=2, **search)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if search["search_method"] == "adam":
        tensors = [value for state in optimizer.adam.state.values() for value in state.values() if value.ndim]
    else:
        state = optimizer.state_dict()["search"]
        tensors = tree_leaves([state.get("buffers", ()), state.get("carried", ())])
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sum(weight.state_bytes for weight in trainer.trained_weights()) == found
