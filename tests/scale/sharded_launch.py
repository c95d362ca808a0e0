"""Runs the launcher on gloo processes that accelerate takes for accelerators: it would leave FSDP out on CPUs.

Only the name of the device's kind is a pretence; the sharding, the collectives and the saving are the real ones.

    python -m torch.distributed.run --nproc_per_node 2 sharded_launch.py ARGUMENTS OF run_glue.py
"""

import sys

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    import run_glue

    status = run_glue.main([*sys.argv[1:], "--accelerator_config", '{"use_configured_state": true}'])
    # one write: the other process's line must not fall into it
    sys.stdout.write(f"spread by {AcceleratorState._shared_state.get('distributed_type')}\n")
    sys.exit(status)
