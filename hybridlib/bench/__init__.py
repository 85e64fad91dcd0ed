"""How fast and how exact: each function measures one thing and writes a record."""
