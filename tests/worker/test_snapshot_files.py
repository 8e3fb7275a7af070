"""Trees of tensors to files and back, bit by bit and in the same order in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipedit.core.errors import SnapshotError
from pipedit.worker.snapshot_files import on_device, read_tree, write_tree

PICTURE = torch.arange(2 * 3 * 4 * 5 * 6, dtype=torch.float32).view(2, 3, 4, 5, 6)
TENSORS = {
    "plain": PICTURE,
    "channels last": PICTURE.to(memory_format=torch.channels_last_3d),
    "turned": PICTURE.permute(4, 2, 0, 1, 3),
    "with gaps": PICTURE[:, :, 1::2],
    "a part of more": PICTURE[1:],
    "expanded": torch.ones(1).expand(3, 4),
    "one number": torch.tensor(7),
    "nothing": torch.empty(2, 0, 3),
    "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
    **{str(kind): torch.randn(3, 4).to(kind) for kind in (torch.bfloat16, torch.float16, torch.float64)},
    **{str(kind): torch.arange(12).to(kind) for kind in (torch.int8, torch.uint8, torch.int64, torch.bool)},
}


def there_and_back(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    num_bytes = write_tree(path, tree, {})
    assert num_bytes == path.stat().st_size
    assert list(path.parent.iterdir()) == [path]
    return read_tree(path, {})


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    again = there_and_back({"x": tensor}, tmp_path / "a")["x"]
    assert again.dtype == tensor.dtype and again.shape == tensor.shape
    bits = [x.contiguous().flatten().view(torch.uint8) for x in (again, tensor)] if tensor.numel() else []
    assert not bits or torch.equal(*bits)
    if name in ("channels last", "turned"):
        assert again.stride() == tensor.stride()


def test_trees_of_any_form(tmp_path: Path) -> None:
    one, two = torch.ones(3), torch.zeros(2, 2)
    tree = {"a": [1, 2.5, "Rep", None, True, [one, {"b": two, "c": one}]], "": {}, "d": [[], one[:2]]}
    again = there_and_back(tree, tmp_path / "a")
    assert again["a"][:5] == [1, 2.5, "Rep", None, True]
    assert torch.equal(again["a"][5][0], one) and torch.equal(again["a"][5][1]["b"], two)
    assert again["a"][5][1]["c"] is not None and torch.equal(again["d"][1], one[:2])
    assert again[""] == {} and again["d"][0] == []


def test_a_tensor_that_comes_twice_is_kept_once(tmp_path: Path) -> None:
    large = torch.randn(1000)
    once = write_tree(tmp_path / "a", {"x": large}, {})
    assert write_tree(tmp_path / "b", {"x": large, "y": [large] * 5}, {}) < once + 1000
    assert write_tree(tmp_path / "c", {"x": large, "y": large.clone()}, {}) > once + 3000
    again = read_tree(tmp_path / "b", {})
    assert torch.equal(again["y"][4], large)


def test_what_was_read_does_not_lie_in_the_file(tmp_path: Path) -> None:
    again = there_and_back({"x": PICTURE}, tmp_path / "a")["x"]
    with (tmp_path / "a").open("r+b") as file:
        file.write(b"\0" * 10_000)
    assert torch.equal(again, PICTURE)
    assert again.data_ptr() % 64 == 0


def test_labels_are_compared(tmp_path: Path) -> None:
    label = {"rank": 1, "sizes": (1, 2), "more": {"a": None, "b": 0.1}}
    write_tree(tmp_path / "a", {}, label)
    assert read_tree(tmp_path / "a", label) == read_tree(tmp_path / "a", {"rank": 1}) == {}
    for name, value in (("rank", 2), ("sizes", (1,)), ("more", {"a": None}), ("other", None)):
        if name in label:
            with pytest.raises(SnapshotError, match=f"was saved by another run: its {name} differ"):
                read_tree(tmp_path / "a", {**label, name: value})
    with pytest.raises(SnapshotError, match="its rank and sizes differ"):
        read_tree(tmp_path / "a", {"rank": 0, "sizes": ()})


def test_a_file_that_was_there_is_replaced_whole(tmp_path: Path) -> None:
    write_tree(tmp_path / "a", {"x": 1}, {})
    write_tree(tmp_path / "a", {"x": 2}, {})
    assert read_tree(tmp_path / "a", {}) == {"x": 2}


def test_trees_are_moved_without_copies_where_they_are() -> None:
    tree = {"x": [PICTURE, {"y": 3}], "z": "Rep"}
    moved = on_device(tree, "cpu")
    assert moved == {"x": [PICTURE, {"y": 3}], "z": "Rep"} and moved["x"][0] is PICTURE
    assert on_device(tree, "meta")["x"][0].is_meta
