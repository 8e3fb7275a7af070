"""Data types by their torch names, as far as planning needs them."""

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(_ELEMENT_BYTES)


def element_bytes(dtype: str) -> int:
    """Bytes of one number of the data type."""
    return _ELEMENT_BYTES[dtype]
