"""Sharing a run on the Hub: its files, a model card made from `run.json`, and errors that say what to do."""
