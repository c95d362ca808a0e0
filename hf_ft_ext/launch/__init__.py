"""What `run_glue.py` needs around the library: defaults, output folders, search, results."""
