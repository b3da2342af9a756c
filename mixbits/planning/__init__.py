"""Bits allocated: the knapsack, plans, curves."""
