"""Hops between stages: what is sent arrives in order, beside each other, and a failure is noticed on the other end."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pipedit.parallel.groups import channel_opener
from pipedit.parallel.stage_links import Parcel, StageLinks

TIMEOUT_S = 20.0
SMALL = Parcel(shapes=((2, 3), (1, 4)), dtype=torch.float32)
Stage = Callable[[StageLinks, int], object]


@pytest.fixture
def in_stages() -> Iterator[Callable[[int, Stage], list[object]]]:
    """Runs a function on so many stages, a thread each; their ranks are not 0, 1, 2, ..."""
    with ThreadPoolExecutor(max_workers=4) as threads:

        def run(depth: int, stage: Stage) -> list[object]:
            store, ranks = HashStore(), [2 * number + 1 for number in range(depth)]

            def one(number: int) -> object:
                opener = channel_opener(store, rank=ranks[number], device="cpu")
                links = StageLinks.open(ranks, ranks[number], device="cpu", open_channel=opener, epoch=0)
                try:
                    return stage(links, number)
                finally:
                    links.abandon()

            return [future.result(TIMEOUT_S) for future in [threads.submit(one, number) for number in range(depth)]]

        yield run


def message(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2, 3), float(number)), torch.full((1, 4), number + 0.5)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_messages_go_round_in_order_while_others_are_on_their_way(
    depth: int, in_stages: Callable[[int, Stage], list[object]]
) -> None:
    count, done = 7, threading.Barrier(depth, timeout=TIMEOUT_S)

    def stage(links: StageLinks, _number: int) -> list[float]:
        seen = []
        if links.before is not None:
            links.before.expect(SMALL)
        for index in range(count):
            if links.before is None:
                given = message(index)
            else:
                if index + 1 < count:
                    links.before.expect(SMALL)  # one ahead
                given = links.before.take()  # type: ignore[assignment]
            if links.results_in is not None:
                links.results_in.expect(SMALL)
            out = links.after or links.results_out
            assert out is not None
            out.send([tensor + 10.0 for tensor in given])
        if links.results_in is not None:
            assert links.results_in.waiting == count
            for index in range(count):
                first, second = links.results_in.take()
                expected = message(index)
                assert torch.equal(first, expected[0] + 10.0 * depth)
                assert torch.equal(second, expected[1] + 10.0 * depth)
                seen.append(float(first[0, 0]))
        for end in (links.after, links.results_out):
            if end is not None:
                end.flush()
        done.wait()
        return seen

    assert in_stages(depth, stage)[0] == [index + 10.0 * depth for index in range(count)]


def test_a_stage_alone_has_no_ends(in_stages: Callable[[int, Stage], list[object]]) -> None:
    (links,) = in_stages(1, lambda links, _: links)
    assert links == StageLinks()


def test_a_stage_that_gives_up_is_noticed_by_its_neighbours(in_stages: Callable[[int, Stage], list[object]]) -> None:
    def stage(links: StageLinks, number: int) -> str:
        if number == 1:
            return "gone"  # its channels are abandoned
        end = links.after if number == 0 else links.before
        assert end is not None
        try:
            for index in range(100):  # a sender notices as soon as nothing is taken any more
                if number == 0:
                    links.after.send(message(index))  # type: ignore[union-attr]
                else:
                    links.before.expect(SMALL)  # type: ignore[union-attr]
                    links.before.take()  # type: ignore[union-attr]
        except RuntimeError:
            return "noticed"
        return "nothing was noticed"

    assert in_stages(3, stage) == ["noticed", "gone", "noticed"]


LARGE = Parcel(shapes=((16 * 2**20,),), dtype=torch.float32)  # 64 MiB: more than sockets hold


def test_who_sends_notices_that_the_receiver_gave_up_in_the_middle(
    in_stages: Callable[[int, Stage], list[object]],
) -> None:
    """gloo alone would let it wait until the group's time is over, ten minutes."""
    tensors, begin = [torch.zeros(shape) for shape in LARGE.shapes], threading.Barrier(2, timeout=TIMEOUT_S)

    def send(links: StageLinks) -> None:
        assert links.after is not None
        for _ in range(8):
            links.after.send(tensors)

    def stage(links: StageLinks, number: int) -> bool:
        begin.wait()
        if number == 1:
            time.sleep(0.01)
            assert links.before is not None
            links.before.expect(LARGE)
            return True  # its channels are abandoned
        with pytest.raises(RuntimeError):
            send(links)
        return True

    for _ in range(2):
        assert in_stages(2, stage) == [True, True]


def test_what_is_under_way_arrives_though_its_sender_gives_up(in_stages: Callable[[int, Stage], list[object]]) -> None:
    """gloo alone would let the receiver wait for the rest of it."""

    def stage(links: StageLinks, number: int) -> bool:
        if number == 0:
            assert links.after is not None
            links.after.send([torch.ones(shape) for shape in LARGE.shapes])
            return True  # its channels are abandoned
        assert links.before is not None
        links.before.expect(LARGE)
        (tensor,) = links.before.take()
        assert float(tensor.min()) == 1.0
        return True

    for _ in range(5):
        assert in_stages(2, stage) == [True, True]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_who_sends_keeps_no_more_than_was_expected(ahead: int, in_stages: Callable[[int, Stage], list[object]]) -> None:
    def stage(links: StageLinks, number: int) -> int:
        if number == 0:
            assert links.after is not None
            most = 0
            for index in range(12):
                links.after.send(message(index))
                most = max(most, len(links.after._leaving))
            links.after.flush()
            return most
        assert links.before is not None
        for index in range(12):
            while links.before.waiting < min(ahead, 12 - index):
                links.before.expect(SMALL)
            assert float(links.before.take()[0][0, 0]) == index
        return 0

    most, _ = in_stages(2, stage)
    assert isinstance(most, int) and 1 <= most <= ahead
