"""Cleaning of prompts as Wan was trained on them."""

import html

import ftfy
import regex


def clean(prompt: str) -> str:
    """Mended Unicode, HTML entities resolved, single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return regex.sub(r"\s+", " ", text).strip()
