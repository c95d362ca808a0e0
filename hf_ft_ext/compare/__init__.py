"""`hf-ft-ext compare`: run several methods on one task, each run in a separate process, and write a report."""
