"""The changes that dynamic support made in a weight: entries of its difference from the base above rounding errors.

An entry that leaves the support stays changed. Changed entries are told from rounding errors by their magnitude, in
the basis that gives the smaller file. They are stored as one bit per entry of the weight, and the changes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from hf_ft_ext.sparse.basis import Basis

# Threshold relative to the weight's root mean square. Training in float32 accumulates rounding errors of about
# sqrt(steps) 2**-25 in every entry.
_ROUNDING = 2.0**-18


@dataclass
class Difference:
    """Changed entries of `V^T W U`.

    Attributes:
        mask: one bit per entry of the (out, in) matrix, row by row, packed into bytes (uint8).
        values: the changes where the mask is set, in row-major order, shape (k,), in the weight's dtype.
    """

    mask: torch.Tensor
    values: torch.Tensor

    @classmethod
    def between(cls, weight: torch.Tensor, base: torch.Tensor, basis: Basis) -> "Difference":
        """Return the entries of `V^T (weight - base) U` above rounding; weights of shape (out, in), at least float32.

        Each omitted entry is at most 2**-18 of the root mean square of `base`.
        """
        rotated = basis.rotate(weight - base)  # V^T (W - W0) U
        kept = rotated.abs() > _ROUNDING * float(base.square().mean().sqrt())
        bits = torch.from_numpy(np.packbits(kept.cpu().numpy()))
        return cls(bits, rotated[kept].cpu())

    @property
    def nbytes(self) -> int:
        """Bytes of mask and values in a file."""
        return self.mask.nbytes + self.values.nbytes

    def add_to(self, weight: torch.Tensor, basis: Basis) -> None:
        """`weight += V S U^T` in place; the weight has shape (out, in), is contiguous and at least float32."""
        bits = np.unpackbits(self.mask.numpy(), count=weight.numel())
        indices = torch.from_numpy(bits).to(weight.device).nonzero().squeeze(1)
        basis.add_rotated_back(weight, indices, self.values.to(weight.device))


def differences(
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]], basis: Basis
) -> tuple[Basis, dict[str, Difference]]:
    """Return the differences of all layers that share a basis, rotated or plain, whichever takes fewer bytes.

    After refreshes the changes lie in several bases and are sparse in none of them; the plain difference is smaller
    then.

    Args:
        weights: name -> (trained weight, base weight), each (out, in).
    """
    sized = []
    for candidate in [basis] if basis.identity else [basis, Basis(identity=True)]:
        found = {name: Difference.between(*pair, candidate) for name, pair in weights.items()}
        size = sum(difference.nbytes for difference in found.values())
        if not candidate.identity:
            size += sum(factor.nbytes for factor in candidate.factors)
        sized.append((size, candidate, found))
    _, best, found = min(sized, key=lambda entry: entry[0])
    return best, found
