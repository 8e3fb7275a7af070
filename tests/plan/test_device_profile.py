"""Device profiles: kept whole on disk, refused with a sentence otherwise, and turned into seconds."""

from pathlib import Path

import pytest

from pipedit.core.errors import InvalidRequestError
from pipedit.plan.costs import Operations
from pipedit.plan.device_profile import DeviceProfile, Rate, read_profile, write_profile

PROFILE = DeviceProfile(
    device="abacus",
    memory_bytes=1024,
    rates=(
        Rate(kind="linear", dtype="float32", shape={"tokens": 8}, operations_per_s=10.0),
        Rate(kind="linear", dtype="float32", shape={"tokens": 4}, operations_per_s=30.0),
        Rate(kind="attention", dtype="float32", shape={"tokens": 8}, operations_per_s=5.0),
    ),
    source={"commit": "abc"},
)


def test_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    write_profile(PROFILE, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == PROFILE


def test_seconds_add_up_over_kinds() -> None:
    assert PROFILE.seconds(Operations(linear=40, attention=10)) == pytest.approx(40 / 20 + 10 / 5)
    with pytest.raises(KeyError, match="convolution"):
        PROFILE.seconds(Operations(convolution=1))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "rates": [{"kind": "x"}]}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match="not a device profile"):
        read_profile(file)
