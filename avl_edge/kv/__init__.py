"""Which row is kept, where, in what format, and what that costs."""
