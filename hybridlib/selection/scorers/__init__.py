"""Functions that score layers, one family a file."""
