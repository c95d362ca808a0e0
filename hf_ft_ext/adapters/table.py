"""The adapter types of this package, as peft's tables know them."""

import enum


class AdapterType(str, enum.Enum):  # noqa: UP042 (peft's own types are of this kind)
    """What `peft_type` says in an `adapter_config.json` of ours."""

    BOTTLENECK = "BOTTLENECK"
    LAYER_PREFIX = "LAYER_PREFIX"
    LAYER_MIXTURE = "LAYER_MIXTURE"


def enter() -> None:
    """Enter configuration and tuner of each type in peft's tables.

    Raises:
        RuntimeError: this peft has a method of the same name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from hf_ft_ext.adapters.bottleneck.config import BottleneckConfig
    from hf_ft_ext.adapters.bottleneck.model import BottleneckModel
    from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig
    from hf_ft_ext.adapters.layer_prefix.model import LayerPrefixModel
    from hf_ft_ext.adapters.mixture.config import LayerMixtureConfig
    from hf_ft_ext.adapters.mixture.model import LayerMixtureModel

    for kind, config, tuner in (
        (AdapterType.BOTTLENECK, BottleneckConfig, BottleneckModel),
        (AdapterType.LAYER_PREFIX, LayerPrefixConfig, LayerPrefixModel),
        (AdapterType.LAYER_MIXTURE, LayerMixtureConfig, LayerMixtureModel),
    ):
        known = PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, config)
        if known is not config:
            raise RuntimeError(
                f"peft has a method {kind.value} of its own ({known.__module__}); install a peft from before it, or a "
                "newer hf_ft_ext"
            )
        PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner
        PEFT_TYPE_TO_PREFIX_MAPPING[kind] = tuner.prefix
