"""The parts of a transformers model, found by what its modules do with a few rows and not by model names."""

import peft  # noqa: F401 (first: peft's first import enters our tuners, which import the modules of this folder)
