"""The parts of a transformers model, found by what its modules do with a few rows and not by model names."""
