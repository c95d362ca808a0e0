"""What dynamic support changed in a weight: the entries of its difference from the base that exceed rounding.

A support that moves leaves entries behind, and each of them stays changed. They are told from rounding by size, in the
basis that leaves fewer of them, and stored as one bit per entry of the weight and the changes themselves.
"""

from dataclasses import dataclass

import numpy as np
import torch

from hf_ft_ext.sparse.basis import Basis

# Of the weight's root mean square. Training in fp32 leaves about sqrt(steps) roundings of 2**-25 each in every entry.
_ROUNDING = 2.0**-18


@dataclass
class Difference:
    """Changed entries of `V^T W U`.

    Attributes:
        mask: one bit per entry of the (out, in) matrix, row by row, packed into bytes (uint8).
        values: the changes where the mask is set, in rising order, shape (k,), in the weight's dtype.
    """

    mask: torch.Tensor
    values: torch.Tensor

    @classmethod
    def between(cls, weight: torch.Tensor, base: torch.Tensor, basis: Basis) -> "Difference":
        """Entries of `V^T (weight - base) U` above rounding; weights of shape (out, in), at least float32.

        What is left out is in the mean square at most 2**-18 of `base`'s root mean square per entry.
        """
        rotated = basis.rotate(weight - base)
        kept = rotated.abs() > _ROUNDING * float(base.square().mean().sqrt())
        bits = torch.from_numpy(np.packbits(kept.cpu().numpy()))
        return cls(bits, rotated[kept].cpu())

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + self.values.nbytes

    def add_to(self, weight: torch.Tensor, basis: Basis) -> None:
        """`weight += V S U^T` in place; the weight is of shape (out, in), contiguous, at least float32."""
        bits = np.unpackbits(self.mask.numpy(), count=weight.numel())
        indices = torch.from_numpy(bits).to(weight.device).nonzero().squeeze(1)
        basis.add_rotated_back(weight, indices, self.values.to(weight.device))


def differences(
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]], basis: Basis
) -> tuple[Basis, dict[str, Difference]]:
    """The differences of all layers that share a basis, in that basis or in none, whichever takes fewer bytes.

    After refreshes the changes lie in several bases and are sparse in none; then the plain difference is smaller.

    Args:
        weights: name -> (trained weight, base weight), each (out, in).
    """
    best, least = None, None
    for candidate in [basis] if basis.identity else [basis, Basis(identity=True)]:
        found = {name: Difference.between(*pair, candidate) for name, pair in weights.items()}
        size = sum(difference.nbytes for difference in found.values())
        size += 0 if candidate.identity else candidate.out_factor.nbytes + candidate.in_factor.nbytes
        if least is None or size < least:
            best, least = (candidate, found), size
    return best
