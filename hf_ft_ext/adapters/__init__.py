"""PEFT tuners that peft lacks: bottleneck adapters, prefixes of chosen layers, several kinds in one model."""

import enum


class AdapterType(str, enum.Enum):  # noqa: UP042 (peft's own types are of this kind)
    """The `peft_type` of each adapter of this package, as `adapter_config.json` holds it."""

    BOTTLENECK = "BOTTLENECK"
    LAYER_PREFIX = "LAYER_PREFIX"
    LAYER_MIXTURE = "LAYER_MIXTURE"
    SPARSE_GRAD = "SPARSE_GRAD"
