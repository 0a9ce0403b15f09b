"""Attention over rows where they lie; the only doors to `plugins/`."""
