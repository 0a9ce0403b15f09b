"""Installing on a device: scripts, checks and systemd units."""
