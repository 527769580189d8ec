"""Scores per alignment, routing, generation and the report people look at."""
