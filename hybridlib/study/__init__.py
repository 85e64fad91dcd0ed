"""An experiment's settings and steps, each step a record."""
