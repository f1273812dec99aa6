"""Detectors of other libraries: one file each, which registers it. All are imported with the registry's first use."""
