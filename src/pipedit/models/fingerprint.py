"""Whether a model's files are still the same: a short text that is another one where they differ. Torch-free."""

import hashlib
from pathlib import Path

from pipedit.models.checkpoint import MODEL_INDEX, Checkpoint

_ENDS = 2**20  # bytes at either end of weights that are looked at: whole models take minutes to read
_WHOLE = (".json", ".txt", ".model")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of configs and tokenizers every byte, of weights the size and both ends, the first of which tells all their
    names and shapes."""
    digest = hashlib.sha256()
    for file in _files(checkpoint):
        content = file.read_bytes() if file.suffix in _WHOLE else _ends(file)
        name = file.relative_to(checkpoint.folder).as_posix()
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:32]


def _files(checkpoint: Checkpoint) -> list[Path]:
    folders = [checkpoint.path(name) for name in sorted(checkpoint.index) if checkpoint.has(name)]
    inside = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    return [checkpoint.folder / MODEL_INDEX, *(f for f in inside if f.suffix in (*_WHOLE, ".safetensors"))]


def _ends(file: Path) -> bytes:
    with file.open("rb") as stream:
        first = stream.read(_ENDS)
        stream.seek(max(file.stat().st_size - _ENDS, 0))
        return first + stream.read(_ENDS)
