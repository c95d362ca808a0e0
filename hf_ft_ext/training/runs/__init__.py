"""The plan of a run before training (`plan`), its cost (`resources`), and its record, `run.json` (`record`)."""
