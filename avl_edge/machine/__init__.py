"""What machine this is, what it can do, and whether its memory is short."""
