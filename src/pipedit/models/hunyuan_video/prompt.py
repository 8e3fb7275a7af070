"""The fixed text that HunyuanVideo's language model reads around a prompt, and what is dropped of it afterwards."""

from pipedit.models.adapter import PromptFrame

# What the model was trained with; the first 95 tokens (start token and system text) are cropped from the embedding.
PROMPT_FRAME = PromptFrame(
    before=(
        "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
        "1. The main content and theme of the video."
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
        "4. background environment, light, style and atmosphere."
        "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
    ),
    after="<|eot_id|>",
    cropped_tokens=95,
)
SKIPPED_LAYERS = 2  # the embedding is taken before the language model's last two layers and its final norm
CLIP_TOKENS = 77
