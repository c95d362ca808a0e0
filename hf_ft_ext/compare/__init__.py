"""`python -m hf_ft_ext.compare`: several methods on one task, each run a process of its own, and a report."""
