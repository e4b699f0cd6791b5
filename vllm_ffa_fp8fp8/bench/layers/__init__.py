"""Recorded layers of a real model: error, kept fraction and latency of settings beside FA3."""
