"""Wan 2.1 T2V, Wan 2.2 T2V A14B (two experts) and Wan 2.2 TI2V 5B in text-to-video mode."""

from pipedit.models.wan.adapter import WanAdapter

__all__ = ["WanAdapter"]
