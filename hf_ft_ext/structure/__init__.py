"""Find the parts of a transformers model by tracing a forward pass, not by model or module names."""

import peft  # noqa: F401 (first: peft's first import enters our tuners, which import the modules of this folder)
