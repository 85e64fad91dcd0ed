"""Teachers, linear mixers, hybrids of both, and a pass through a model."""
