"""Pruned decode attention: plan, scan, attend, merge."""
