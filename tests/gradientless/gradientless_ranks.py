"""Run by `test_gradientless_trainer.py`, first alone, then on two processes, which have to end where one did."""

import os
import sys
from pathlib import Path

import torch
from heads import make
from tiny import tiny_model

SETTINGS = {
    "gld": {"search_options": "2x1", "weight_decay": 0.01},
    "none": {"search_options": "none"},
    "spsa": {"search_method": "spsa", "search_directions": 3, "learning_rate": 0.01},
    "encoder": {"search_target": r"layer\.1\.output\.dense|classifier", "learning_rate": 0.1},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    for name, settings in SETTINGS.items():
        world = int(os.environ.get("WORLD_SIZE", 1))
        trainer = make(
            folder,
            tiny_model().double(),
            max_steps=6,
            candidate_parallel=mode,
            per_device_train_batch_size=8 // world,
            **settings,
        )
        trainer.train()
        if mode == "candidates" and world == 2:
            crossed = trainer.optimizer.optimizer.exchange
            assert (crossed.rank, crossed.world) == (trainer.args.process_index, 2)
        state = {key: value.detach() for key, value in trainer.model.state_dict().items()}
        file = folder / f"{name}.pt"
        if world == 1:
            torch.save(state, file)
            continue
        for key, value in torch.load(file, weights_only=True).items():
            torch.testing.assert_close(
                state[key], value, rtol=1e-6, atol=1e-8, msg=lambda m, k=key, n=name: f"{n} {k} {m}"
            )
