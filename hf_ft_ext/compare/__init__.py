"""`hf-ft-ext compare`: several methods on one task, each run a process of its own, and a report."""
