"""Settings survive every container, and their absence is said."""

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.media import VideoMetadata, open_writer, read_metadata
from pipedit.media.metadata import parse_metadata

TARGETS = ("clip.mp4", "clip.gif", "clip.npy", "clip.png", "frames/")
HARD_PROMPTS = {
    "quotes": 'a "red" ball; it\'s = # \\ 100 % {not} <b>html</b>\nsecond line\ttab',
    "scripts": "Ein Käfer läuft · 一只红色的球 · красный мяч · كرة حمراء 🎈👩‍🚀",
    "long": "a red ball moves right, " * 4000,
    "unusual": "nul \0 inside, a lone surrogate \udcff, and \x1b[31m",
}


def metadata(prompt: str) -> VideoMetadata:
    request = VideoRequest(prompt=prompt, negative_prompt="blurry, “ugly”", seed=7, guidance_scale=5.0, num_frames=9)
    return VideoMetadata.of(request, model="org/model", extra={"dtype": "bfloat16", "strategy": None})


def write_clip(path: str, about: VideoMetadata | None) -> None:
    with open_writer(path, width=16, height=16, fps=8, metadata=about) as writer:
        writer.write(np.full((2, 16, 16, 3), 90, np.uint8))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("prompt", HARD_PROMPTS.values(), ids=HARD_PROMPTS.keys())
def test_metadata_comes_back(tmp_path: Path, target: str, prompt: str) -> None:
    about = metadata(prompt)
    write_clip(f"{tmp_path}/{target}", about)
    assert read_metadata(f"{tmp_path}/{target}") == about


@pytest.mark.parametrize("target", TARGETS)
def test_absent_metadata_is_said(tmp_path: Path, target: str) -> None:
    write_clip(f"{tmp_path}/{target}", None)
    with pytest.raises(InvalidRequestError, match="holds no pipedit settings"):
        read_metadata(f"{tmp_path}/{target}")


def test_the_request_comes_back() -> None:
    request = VideoRequest(prompt="a ball", seed=2**63 - 1, fps=7.5, height=64, width=64)
    assert VideoMetadata.of(request, model="tiny").request() == request


def test_settings_of_another_version_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="does not know: colour, mood"):
        VideoMetadata(prompt="a", model="m", settings={"seed": 1, "mood": 2, "colour": 3}).request()


def test_title_tag_shows_the_prompt(tmp_path: Path) -> None:
    write_clip(f"{tmp_path}/clip.mp4", metadata(HARD_PROMPTS["scripts"]))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.metadata["title"] == HARD_PROMPTS["scripts"]


def test_a_single_frame_tells_too(tmp_path: Path) -> None:
    write_clip(f"{tmp_path}/clip.png", metadata("a ball"))
    assert read_metadata(tmp_path / "clip_0001.png").prompt == "a ball"


def test_a_stale_sidecar_does_not_stay(tmp_path: Path) -> None:
    write_clip(f"{tmp_path}/clip.npy", metadata("the old clip"))
    write_clip(f"{tmp_path}/clip.npy", None)
    with pytest.raises(InvalidRequestError, match="holds no pipedit settings"):
        read_metadata(tmp_path / "clip.npy")


@pytest.mark.parametrize("text", ["", "Lavf62.12.102", "[]", '{"prompt": "made by somebody else"}', "null"])
def test_foreign_comments_are_no_settings(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"x\.mp4 holds no pipedit settings"):
        parse_metadata(text, source="x.mp4")


def test_damaged_settings_are_said() -> None:
    text = metadata("a").to_json().replace('"model"', '"modell"')
    with pytest.raises(InvalidRequestError, match=r"damaged: no valid model"):
        parse_metadata(text, source="x.mp4")


@pytest.mark.parametrize("name", ["missing.mp4", "missing.npy", "missing.png", "missing/"])
def test_missing_files_are_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"does not exist|there are no frames"):
        read_metadata(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["broken.mp4", "broken.gif", "broken.png"])
def test_broken_files_are_said(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is no video" * 10)
    with pytest.raises(InvalidRequestError, match="cannot be read as a"):
        read_metadata(tmp_path / name)


@given(st.text(), st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.booleans()))
def test_json_round_trip(prompt: str, extra: dict[str, object]) -> None:
    about = VideoMetadata(prompt=prompt, model="m", extra=extra)
    assert about.to_json().isascii()
    assert parse_metadata(about.to_json(), source="x") == about
    about.title.encode()  # valid Unicode, whatever was typed


def test_settings_that_no_version_has_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not know: prompt"):
        VideoMetadata(prompt="a", model="m", settings={"prompt": "b"}).request()
    write_clip(f"{tmp_path}/clip.npy", metadata("a"))
    for content in (b"\xe4\xff", b"9" * 5000, b"[" * 100_000):
        (tmp_path / "clip.npy.json").write_bytes(content)
        with pytest.raises(InvalidRequestError, match="holds no pipedit settings"):
            read_metadata(tmp_path / "clip.npy")


def test_a_foreign_sidecar_stays(tmp_path: Path) -> None:
    (tmp_path / "clip.npy.json").write_text("dear to me")
    write_clip(f"{tmp_path}/clip.npy", None)
    assert (tmp_path / "clip.npy.json").read_text() == "dear to me"


@pytest.mark.parametrize("name", ["12:30.mp4", "12:30.gif", "a:b/c.mp4"])
def test_a_colon_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    write_clip(name, metadata("a ball"))
    assert read_metadata(name).prompt == "a ball"


def test_foreign_tags_in_other_encodings_are_no_settings(tmp_path: Path) -> None:
    with open_writer(tmp_path / "clip.mp4", width=16, height=16, fps=8, metadata=metadata("caf\u00e9")) as writer:
        writer.write(np.full((2, 16, 16, 3), 90, np.uint8))
    content = (tmp_path / "clip.mp4").read_bytes()
    title, latin = "caf\u00e9".encode(), b"caf\xe9\xe9"
    assert content.count(title) == 1
    (tmp_path / "clip.mp4").write_bytes(content.replace(title, latin))
    assert read_metadata(tmp_path / "clip.mp4").prompt == "caf\u00e9"
