#!/usr/bin/env python
"""Fine-tune a sequence classifier with one of the methods of hf_ft_ext; `--help` lists them."""

from hf_ft_ext.launch.run import command, main

__all__ = ["main"]

if __name__ == "__main__":
    command()
