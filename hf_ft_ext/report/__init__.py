"""`hf-ft-ext report`: write tables and pictures from run folders."""
