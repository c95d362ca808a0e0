"""PEFT tuners that peft lacks: bottleneck adapters, per-layer prefixes, a mixture of kinds, structured SparseGrad."""

import enum


class AdapterType(str, enum.Enum):  # noqa: UP042 (peft's own types are of this kind)
    """The `peft_type` of each adapter of this package, as written in `adapter_config.json`."""

    BOTTLENECK = "BOTTLENECK"
    LAYER_PREFIX = "LAYER_PREFIX"
    LAYER_MIXTURE = "LAYER_MIXTURE"
    SPARSE_GRAD = "SPARSE_GRAD"
