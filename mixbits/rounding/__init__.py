"""Weights rounded: to nearest, searched, compensated, learned."""
