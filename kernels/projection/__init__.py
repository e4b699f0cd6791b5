"""From hidden states or projections to rotated heads and the cache."""
