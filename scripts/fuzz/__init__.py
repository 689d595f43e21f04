"""Fuzz targets: each module has `check(data)`, which raises when an invariant does not hold for these bytes."""
