"""Checkpoints as they are published: their files, layouts and weights."""
