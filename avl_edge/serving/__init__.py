"""Who runs next, what is promised, and what a caller sees."""
