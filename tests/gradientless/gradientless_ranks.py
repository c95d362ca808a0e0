"""Run by `test_gradientless_trainer.py` on two processes, which have to end where one did (`one_process`)."""

import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from heads import make
from tiny import one_layer_model

SETTINGS = {
    "gld": {"search_options": "2x1", "weight_decay": 0.01},
    "trees": {"search_options": "2x2", "learning_rate": 0.1, "max_steps": 4},  # moves are evaluated, one candidate
    "spsa": {"search_method": "spsa", "search_directions": 3, "learning_rate": 0.01},
    "lozo-m": {
        "search_method": "spsa",
        "search_direction": "lozo",
        "search_update": "momentum",
        "search_target": "all",
        "learning_rate": 0.01,
        "search_eps": 0.01,
    },
    "fzoo": {"search_method": "spsa", "search_estimate": "one-sided", "search_directions": 3, "learning_rate": 0.01},
    "activity": {
        "search_method": "activity",
        "search_target": r"dense|classifier",
        "search_directions": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
    },
    "encoder": {"search_target": r"layer\.0\.output\.dense|classifier", "learning_rate": 0.1},
}


def trained(folder: Path, name: str, mode: str, world: int, resume: str | None = None, **options):
    """A trainer after three steps, unless given otherwise, of eight rows over all processes."""
    settings = {"candidate_parallel": mode, "per_device_train_batch_size": 8 // world, **SETTINGS[name]}
    trainer = make(folder, one_layer_model().double(), **{"max_steps": 3, **settings, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def check_resumed(folder: Path, name: str, mode: str) -> None:
    """A run that was cut after two steps ends bit for bit where the unbroken one does."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    unbroken = trained(folder, name, mode, 2, **saving).model.state_dict()
    resumed = trained(folder, name, mode, 2, resume=str(folder / "checkpoint-2"), **saving).model.state_dict()
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items()), f"{mode} {name} resumed"


def check_other_starts(folder: Path, name: str) -> None:
    """Processes whose heads were drawn from different seeds start, and end, with the weights of the first one."""
    rank = PartialState().process_index
    trainer = make(folder, one_layer_model(seed=rank).double(), max_steps=2, **SETTINGS[name])
    trainer.train()
    for key, value in trainer.model.state_dict().items():
        first = broadcast(value.clone(), from_process=0)
        assert torch.equal(first, value), f"{name}, {key}: processes differ"


def one_process(folder: Path) -> None:
    """Leave the weights of a single process for each search."""
    for name in SETTINGS:
        torch.save(trained(folder, name, "data", 1).model.state_dict(), folder / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    assert os.environ["WORLD_SIZE"] == "2"
    for name in SETTINGS:
        for mode in ("data", "candidates"):
            trainer = trained(folder, name, mode, 2)
            shares = trainer.optimizer.optimizer.exchange.mine(8)
            assert len(shares) == (8 if mode == "data" else 4)
            state = trainer.model.state_dict()
            for key, value in torch.load(folder / f"{name}.pt", weights_only=True).items():
                torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-8, msg=f"{mode} {name}: {key}")
    for name, mode in (("gld", "candidates"), ("spsa", "candidates"), ("activity", "data")):
        check_resumed(folder / name, name, mode)
    for name in ("gld", "spsa", "lozo-m", "activity"):
        check_other_starts(folder, name)
    PartialState().wait_for_everyone()
    time.sleep(0.5)  # gloo's threads abort a process that exits while they hold tensors
    PartialState().destroy_process_group()
