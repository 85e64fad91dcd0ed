"""What was run and measured: one JSON record a result, where it came from, and where records lie."""
