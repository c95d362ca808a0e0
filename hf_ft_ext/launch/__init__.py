"""The launcher behind `run_glue.py`: argument parsing, defaults, output folders, search, results."""
