"""Templates and label words: the known ones, how they are written, and rows tokenised by them."""
