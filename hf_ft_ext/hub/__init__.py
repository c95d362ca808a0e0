"""Push a run to the Hub: its files, and a model card written from `run.json`."""
