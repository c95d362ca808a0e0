import peft  # noqa: F401 (first: peft's first import enters our tuners, which imports the modules of this folder)
