"""Measurements: against the stock pipeline, on a GPU by parts, and under hours of requests."""
