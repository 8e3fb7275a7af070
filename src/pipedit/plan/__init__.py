"""Deciding without doing: costs, memory, request scheduler, timeline. Pure Python, no torch, no clock, no threads."""
