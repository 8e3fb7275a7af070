"""HunyuanVideo text to video (13B): Llama and CLIP text, double and single stream layers, a VAE tiled in time."""

from pipedit.models.hunyuan_video.adapter import HunyuanVideoAdapter

__all__ = ["HunyuanVideoAdapter"]
