"""Modules that run packed weights, and what makes a token's step short."""
