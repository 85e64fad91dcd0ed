"""Other implementations of the operators, to measure beside ours."""
