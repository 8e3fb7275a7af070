"""Measuring speed and memory honestly: interleaved runs, ratios with their spread, the bound beside every figure."""
