"""PEFT tuners that peft lacks: bottleneck adapters, prefixes of chosen layers, several kinds in one model."""
