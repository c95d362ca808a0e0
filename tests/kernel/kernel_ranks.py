"""Run by `test_kernel_trainer.py` on two processes; the result must equal that of one process."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from kernel_runs import SETTINGS, run

from hf_ft_ext.errors import InputError

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    assert os.environ["WORLD_SIZE"] == "2"
    for name in SETTINGS:
        _, found = run(folder / f"two-{name}", name)
        np.testing.assert_allclose(found, np.load(folder / f"{name}.npy"), rtol=1e-7, atol=1e-9, err_msg=name)
    SETTINGS["svc"]["kernel_dir"] = str(folder / f"own-{os.environ['RANK']}")  # no folder in common
    _, found = run(folder / "apart", "svc")
    np.testing.assert_allclose(found, np.load(folder / "svc.npy"), rtol=1e-7, atol=1e-9)
    try:  # the first process's refusal is everybody's
        (folder / "file").touch(exist_ok=True)
        SETTINGS["sgd"]["kernel_dir"] = str(folder / "file")
        run(folder / "refused", "sgd")
    except (InputError, OSError) as error:
        assert "kernel_dir" in str(error), error
    else:
        raise AssertionError("a file was taken for a folder")
    PartialState().wait_for_everyone()
    time.sleep(0.5)  # gloo's threads abort a process that exits while they hold tensors
    PartialState().destroy_process_group()
