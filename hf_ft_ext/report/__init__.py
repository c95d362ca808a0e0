"""`hf-ft-ext report`: tables and pictures out of run folders."""
