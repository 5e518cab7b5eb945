"""Probes of a frozen model: `singer evaluate`."""
