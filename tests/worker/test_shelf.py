"""The hand-over: what is put is what comes out, on this rank or over a socket, or an error that says who and what."""

import datetime
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pipedit.core.errors import WorkerError
from pipedit.worker.greeting import introduce
from pipedit.worker.group import Rendezvous
from pipedit.worker.shelf import CONDITIONING, LATENTS, Neighbours, Shelf, reachable_address
from tests.executor.stand_ins import await_that, open_files

ROOT = Path(__file__).parents[2]
KEY = secrets.token_bytes(32)
SOON_S = 5.0


def numbers(count: int = 1000, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def store() -> HashStore:
    store = HashStore()
    store.set_timeout(datetime.timedelta(seconds=1.0))
    return store


@pytest.fixture
def shelves(store: HashStore) -> Iterator[tuple[Shelf, Shelf]]:
    """Of ranks 0 and 1."""
    before, threads = open_files(), threading.active_count()
    neighbours = Neighbours(store=store, host="127.0.0.1", key=KEY)
    both = Shelf(rank=0, device="cpu", neighbours=neighbours), Shelf(rank=1, device="cpu", neighbours=neighbours)
    yield both
    for shelf in (*both, both[0]):
        shelf.close()
    assert (open_files(), threading.active_count()) == (before, threads)


def test_what_is_put_is_what_another_rank_fetches(shelves: tuple[Shelf, Shelf]) -> None:
    tensors = {
        "prompt": numbers(dtype=torch.bfloat16).view(1, 100, 10),
        "pooled": numbers(7, torch.float16),
        "transposed": numbers().view(10, 100).t(),
        "frames": torch.arange(256, dtype=torch.uint8),
        "none": torch.empty(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    shelves[0].put("a", CONDITIONING, tensors)
    shelves[0].put("a", LATENTS, {LATENTS: numbers(seed=1)})
    shelves[0].put("b", CONDITIONING, {"prompt": numbers(seed=2)})
    for shelf in shelves:
        fetched = shelf.fetch(0, "a", CONDITIONING)
        assert fetched.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert fetched[name].dtype == tensor.dtype
            assert torch.equal(fetched[name], tensor)
        assert torch.equal(shelf.fetch(0, "a", LATENTS)[LATENTS], numbers(seed=1))
        assert not torch.equal(shelf.fetch(0, "b", CONDITIONING)["prompt"], numbers(seed=1))


def test_what_is_put_does_not_change_with_its_source(shelves: tuple[Shelf, Shelf]) -> None:
    mine = numbers()
    shelves[0].put("a", LATENTS, {LATENTS: mine})
    mine.zero_()
    for shelf in shelves:
        assert torch.equal(shelf.fetch(0, "a", LATENTS)[LATENTS], numbers())


def test_what_was_made_in_inference_mode_can_be_used_outside(shelves: tuple[Shelf, Shelf]) -> None:
    with torch.inference_mode():
        shelves[0].put("a", LATENTS, {LATENTS: numbers() * 2})
        fetched = shelves[1].fetch(0, "a", LATENTS)[LATENTS]
    assert torch.equal(fetched.clone().mul_(0.5), numbers())


@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_dropped_is_a_named_error(rank: int, shelves: tuple[Shelf, Shelf]) -> None:
    shelves[0].put("a", LATENTS, {LATENTS: numbers()})
    shelves[0].drop("a")
    shelves[0].drop("a")
    start_s = time.monotonic()
    with pytest.raises(WorkerError, match="fetching latents from worker 0: worker 0 has none for a") as caught:
        shelves[rank].fetch(0, "a", LATENTS)
    assert caught.value.rank == rank
    assert time.monotonic() - start_s < SOON_S
    assert shelves[0].held_bytes == 0


def test_a_rank_that_nobody_knows_or_that_is_gone_is_a_named_error(shelves: tuple[Shelf, Shelf]) -> None:
    with pytest.raises(WorkerError, match="worker 0 failed while it was fetching latents from worker 7"):
        shelves[0].fetch(7, "a", LATENTS, timeout_s=0.2)
    shelves[1].close()
    with pytest.raises(WorkerError, match="fetching latents from worker 1"):
        shelves[0].fetch(1, "a", LATENTS)


@pytest.fixture
def silent_door(store: HashStore) -> Iterator[socket.socket]:
    """Rank 2, which lets callers in and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        store.set("shelf/2", f'["127.0.0.1", {door.getsockname()[1]}]')
        yield door


@pytest.mark.usefixtures("silent_door")
def test_a_rank_that_says_nothing_is_not_waited_for(shelves: tuple[Shelf, Shelf]) -> None:
    start_s = time.monotonic()
    with pytest.raises(WorkerError, match="fetching latents from worker 2"):
        shelves[0].fetch(2, "a", LATENTS, timeout_s=0.3)
    assert time.monotonic() - start_s < SOON_S


def test_a_rank_that_falls_silent_is_not_waited_for(shelves: tuple[Shelf, Shelf], silent_door: socket.socket) -> None:
    from pipedit.worker.greeting import admit

    def answer_half() -> socket.socket:
        end, _ = silent_door.accept()
        admit(end, KEY, SOON_S)
        end.sendall(b"\x01\x00\x00")
        return end

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(answer_half)
        with pytest.raises(WorkerError, match=r"they did not come within 0.3 s"):
            shelves[0].fetch(2, "a", LATENTS, timeout_s=0.3)
        other.result().close()


def test_only_who_knows_the_key_is_served(shelves: tuple[Shelf, Shelf], store: HashStore) -> None:
    shelves[0].put("a", LATENTS, {LATENTS: numbers()})
    stranger = Shelf(rank=3, device="cpu", neighbours=Neighbours(store=store, host="127.0.0.1", key=b"x" * 32))
    try:
        with pytest.raises(WorkerError, match="worker 3 failed while it was fetching latents from worker 0"):
            stranger.fetch(0, "a", LATENTS)
    finally:
        stranger.close()
    assert torch.equal(shelves[1].fetch(0, "a", LATENTS)[LATENTS], numbers()), "it goes on serving others"


@pytest.mark.parametrize(
    "question", [b"\xff\xff\xff\xff", b"\0\0\0\x02{]", b"\0\0\0\x02[]", b"\0\0\0\x013", b"\0\0\0\x07[[],[]]", b""]
)
def test_nonsense_does_not_end_the_service(question: bytes, shelves: tuple[Shelf, Shelf], store: HashStore) -> None:
    port = int(store.get("shelf/0").decode().rstrip("]").split(",")[1])
    with socket.create_connection(("127.0.0.1", port)) as end:
        introduce(end, KEY, SOON_S)
        end.sendall(question)
    shelves[0].put("a", LATENTS, {LATENTS: numbers()})
    assert torch.equal(shelves[1].fetch(0, "a", LATENTS)[LATENTS], numbers())


def test_closing_does_not_wait_for_a_caller(store: HashStore) -> None:
    shelf = Shelf(rank=0, device="cpu", neighbours=Neighbours(store=store, host="127.0.0.1", key=KEY))
    port = int(store.get("shelf/0").decode().rstrip("]").split(",")[1])
    with socket.create_connection(("127.0.0.1", port)):
        time.sleep(0.1)  # for the thread to take the call
        start_s = time.monotonic()
        shelf.close()
        assert time.monotonic() - start_s < 2.0
    assert not any(thread.name.startswith("shelf") for thread in threading.enumerate())


def test_many_ranks_fetch_at_once(shelves: tuple[Shelf, Shelf], store: HashStore) -> None:
    shelves[0].put("a", LATENTS, {LATENTS: numbers(100_000)})
    neighbours = Neighbours(store=store, host="127.0.0.1", key=KEY)
    others = [Shelf(rank=rank, device="cpu", neighbours=neighbours) for rank in range(2, 10)]
    with ThreadPoolExecutor(len(others)) as threads:
        fetched = list(threads.map(lambda shelf: shelf.fetch(0, "a", LATENTS)[LATENTS], others))
    for shelf in others:
        shelf.close()
    assert all(torch.equal(tensor, numbers(100_000)) for tensor in fetched)


def test_a_thousand_hand_overs_leave_memory_and_files_as_they_were(shelves: tuple[Shelf, Shelf]) -> None:
    process = psutil.Process()

    def hand_over(times: int) -> None:
        for number in range(times):
            shelves[0].put(f"r{number}", LATENTS, {LATENTS: torch.ones(50_000)})
            if number % 2:
                shelves[1].fetch(0, f"r{number}", LATENTS)
            shelves[0].drop(f"r{number}")

    files = open_files()
    hand_over(100)
    memory = process.memory_info().rss
    hand_over(1000)
    assert shelves[0].held_bytes == 0
    assert await_that(lambda: open_files() == files, SOON_S), "the other end may still be closing the last one"
    assert process.memory_info().rss - memory < 8 * 2**20


def test_held_bytes_are_those_of_the_tensors() -> None:
    shelf = Shelf(rank=0, device="cpu")
    shelf.put("a", LATENTS, {LATENTS: torch.ones(1000)[:10]})
    assert shelf.held_bytes == 40, "not of what they are views of"
    shelf.put("a", LATENTS, {LATENTS: torch.ones(20)})
    assert shelf.held_bytes == 80
    shelf.close()


# -- between processes ----------------------------------------------------------------------------------------------

PEER = """
import datetime
import sys
from pipedit.worker.shelf import LATENTS, Neighbours, Shelf
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=datetime.timedelta(seconds=20))
neighbours = Neighbours(store=store, host="127.0.0.1", key=bytes.fromhex(sys.argv[2]))
shelf = Shelf(rank=1, device="cpu", neighbours=neighbours)
latents = shelf.fetch(0, "a", LATENTS, timeout_s=20.0)[LATENTS]
shelf.put("a", "doubled", {LATENTS: latents * 2})
print("put", flush=True)
sys.stdin.readline()
shelf.close()
"""


def test_two_processes_hand_over_both_ways_and_a_dead_one_is_named() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    shelf = Shelf(rank=0, device="cpu", neighbours=Neighbours(store=store, host="127.0.0.1", key=KEY))
    shelf.put("a", LATENTS, {LATENTS: numbers(300_000)})
    peer = subprocess.Popen(
        [sys.executable, "-c", PEER, str(store.port), KEY.hex()],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with peer:
        assert peer.stdout is not None
        assert peer.stdout.readline() == "put\n"
        assert torch.equal(shelf.fetch(1, "a", "doubled")[LATENTS], 2 * numbers(300_000))
        peer.kill()
        peer.wait(SOON_S)
        start_s = time.monotonic()
        with pytest.raises(WorkerError, match="fetching doubled from worker 1"):
            shelf.fetch(1, "a", "doubled")
        assert time.monotonic() - start_s < SOON_S
    shelf.close()


# -- addresses ------------------------------------------------------------------------------------------------------


def test_the_address_is_the_known_one_or_the_one_on_the_way_to_the_store() -> None:
    known = Rendezvous(host="127.0.0.1", port=1, world_size=2, own_address="192.0.2.7", timeout_s=1.0)
    assert reachable_address(known) == "192.0.2.7"
    unknown = Rendezvous(host="127.0.0.1", port=1, world_size=2, own_address=None, timeout_s=1.0)
    assert reachable_address(unknown) == "127.0.0.1"
