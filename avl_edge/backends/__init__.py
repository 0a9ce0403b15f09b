"""Where numbers are computed."""
