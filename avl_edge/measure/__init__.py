"""How good the answers are, and how fast, on this machine."""
