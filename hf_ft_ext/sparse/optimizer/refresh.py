"""Running Gram sums of the training gradients, and the bases computed from them."""

import math

import torch
from accelerate.utils import broadcast

from hf_ft_ext.sparse.basis import Basis, GramSums, by_columns


class RunningSums:
    """Gram sums over the gradients since the last refresh, by kind of layer.

    The optimizer passes gradients in the current basis, `V^T G U`, and the sums are kept in that basis. Only
    `gradients` of the `every` steps between two refreshes, evenly spaced, are added, because a Gram matrix costs as
    much as a rotation.

    Args:
        every: optimizer steps between two refreshes; 0 = never.
        gradients: the most steps between two refreshes whose gradients are added.
    """

    def __init__(self, every: int, gradients: int):
        self.every, self.stride = every, max(1, math.ceil(every / gradients))
        self.steps = 0
        self.sums: dict[str, GramSums] = {}

    def __bool__(self) -> bool:
        return self.every > 0

    def begin_step(self) -> None:
        """Count a step, before its gradients are added."""
        self.steps += 1

    def observe(self, kind: str, rotated: torch.Tensor) -> None:
        """Add one layer's gradient of this step, shape (out, in), in the current basis."""
        if not self or self.steps % self.stride:
            return
        if kind not in self.sums:
            n_out, n_in = rotated.shape
            self.sums[kind] = GramSums(n_out, n_in, rotated.dtype, rotated.device)
        self.sums[kind].add(rotated)

    @property
    def due(self) -> bool:
        """Whether a refresh follows this step."""
        return bool(self) and self.steps >= self.every

    def update_basis(self, kind: str, basis: Basis) -> tuple[torch.Tensor, torch.Tensor]:
        """Set `basis` to the factors of the Gram sums of its kind.

        Returns:
            `(V'^T V, U^T U')`, which map a matrix `M` in the old basis into the new one: `left M right`.
        """
        # All processes have the same sums; the broadcast makes the bases bitwise equal.
        out_rotation, in_rotation = (broadcast(side.T).T for side in self.sums[kind].factors())
        old_out, old_in = basis.factors
        # The sums are in the old basis, so their eigenvectors O and I give the new factors V' = V O and U' = U I.
        basis.out_factor = by_columns(old_out @ out_rotation)
        # The published orientation uses the transposed factor, whose directions are its rows: U' = (U I)^T.
        new_in = by_columns((old_in @ in_rotation).T if basis.in_transposed else old_in @ in_rotation)
        basis.in_factor = new_in
        return out_rotation.T, old_in.T @ new_in  # V'^T V = O^T, and U^T U'

    def restart(self) -> None:
        """Reset the sums, after a refresh."""
        self.steps, self.sums = 0, {}

    def state_dict(self) -> dict:
        """Return the steps since the last refresh, and the sums by kind of layer."""
        return {"steps": self.steps, "sums": {kind: vars(gram).copy() for kind, gram in self.sums.items()}}

    def load_state_dict(self, state: dict, weights: dict[str, torch.Tensor]) -> None:
        """Load sums, in the dtype and on the device of a weight of each kind, `weights`."""
        self.steps, self.sums = state["steps"], {}
        for kind, sides in state["sums"].items():
            if kind not in weights:
                continue
            device, dtype = weights[kind].device, weights[kind].dtype
            out, inp = sides["out"].to(device, dtype), sides["inp"].to(device, dtype)
            self.sums[kind] = GramSums(len(out), len(inp), dtype, device)
            self.sums[kind].out, self.sums[kind].inp = out, inp
