"""Templates and label words: defaults for known tasks, parsing, and tokenisation of rows."""
