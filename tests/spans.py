"""Compares SparseGrad adapters by what they do: columns that span the same may be other columns."""

import torch


def principal_angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest angle between two spans of orthonormal columns, in radians."""
    residual = b - a @ (a.T @ b)
    return torch.linalg.matrix_norm(residual.double(), 2).clamp(max=1).asin().item()


def with_changes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state with the change `V D U^T` of each weight in place of a SparseGrad adapter's values `D`."""
    changed = dict(state)
    for key, values in state.items():
        if ".sparse_grad_values" in key:
            columns = key.replace(".sparse_grad_values", ".sparse_grad_columns")
            out_columns, in_columns = (state[f"{columns}.{side}_columns"].float() for side in ("out", "in"))
            changed[key] = out_columns @ values @ in_columns.T
    return changed
