"""Requests over time: the Engine drives the request scheduler and an executor, and hands out progress and frames."""
