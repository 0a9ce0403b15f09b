"""Networks and their parts, as plain objects over memory-mapped weights."""
