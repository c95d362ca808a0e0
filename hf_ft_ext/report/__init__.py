"""`python -m hf_ft_ext.report`: tables and pictures out of run folders."""
