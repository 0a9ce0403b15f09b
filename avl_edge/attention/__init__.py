"""Attention over rows where they lie; the only code that loads `plugins/`."""
