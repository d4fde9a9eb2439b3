"""Whole-step memory: tracing, planning, activation policies."""
