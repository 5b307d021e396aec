"""Measurement that can be believed: scenarios, workers, statistics, verdicts, reports."""
