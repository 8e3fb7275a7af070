"""The Open-Sora-Plan v1.3 family. So far only what it costs: sizes and operations, without the model itself."""
