"""How candidates are restored, trained and measured: in turn, stacked, or by an executor."""
