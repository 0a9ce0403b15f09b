"""The tables of ``docs/``, made from the measurements: ``python -m tools.docs``."""
