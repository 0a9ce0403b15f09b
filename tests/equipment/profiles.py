"""Profiles to read, change and write: the shipped ones, and one such as the profiler writes."""

from __future__ import annotations

from dataclasses import replace

from avl_edge.machine import profile
from avl_edge.machine.profile import ANY, DeviceProfile, Figure, Fit, Record, Sample

SHIPPED = profile.shipped()
ORIN = SHIPPED["agx-orin-64-30w"]
TEXT = profile.dumps(ORIN)


def measured_profile() -> DeviceProfile:
    """A profile such as the profiler writes, with a fit and samples."""
    figure = Figure(1.5, "measured", "fit")
    samples = (
        Sample("decode", "full, 1 image", 3.25, 24, {"decode_us_per_layer": 8.0}),
        Sample("decode", "full, 2 images", 4.5, 24, {"decode_us_per_layer": 8.0}, held_out=True),
    )
    any_model = ORIN.models[ANY]
    record = Record(
        replace(any_model.costs, decode_us_per_layer=figure),
        any_model.peaks,
        None,
        {"decode": Fit(1, 1, 2, 3)},
        samples,
    )
    return replace(ORIN, name="mine", models={ANY: any_model, "demo": record})
