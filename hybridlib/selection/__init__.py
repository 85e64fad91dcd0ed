"""Which layers to keep: scores, rules that turn them into sets, searches over sets."""
