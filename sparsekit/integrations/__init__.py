"""Thin adapters to other people's training loops; each needs its package, and none is imported by sparsekit itself."""
