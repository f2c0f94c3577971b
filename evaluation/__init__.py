"""Measuring a model: benchmarks, their questions and their scores."""
