"""Engines: one interface, and what stands behind it."""
