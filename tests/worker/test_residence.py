"""Offloading: weights come for their stage and leave it, and the video does not notice."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipedit.core.placement import Placement
from pipedit.worker.residence import Residence
from tests.worker.crew import Crew, Frames, crew, loaded_bytes

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
Folder = Callable[[str], Path]


class Tied(nn.Module):
    """Weights that share memory in every way, buffers of both kinds, and a part that was not loaded."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight  # one parameter
        self.transposed = nn.Parameter(self.first.weight.data.t())  # another one in the same memory
        self.row = nn.Parameter(self.first.weight.data[2])
        self.low = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.absent = nn.Parameter(torch.empty(3, device="meta"))
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("not_kept", torch.randn(3), persistent=False)
        self.register_buffer("empty", torch.empty(0))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, not_kept = self.get_buffer("kept"), self.get_buffer("not_kept")
        result: torch.Tensor = self.second(self.first(x)) @ self.transposed + self.row + (kept * not_kept).sum()
        return result * self.low.float().sum()


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in named.items() if not tensor.is_meta}


def places_of(module: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors_of(module).items()}


@pytest.mark.parametrize("device", DEVICES)
def test_weights_come_and_leave_as_they_were(device: str) -> None:
    module, residence = Tied(), Residence(device)
    values = {name: tensor.clone() for name, tensor in tensors_of(module).items()}
    strides = {name: tensor.stride() for name, tensor in tensors_of(module).items()}
    objects = {name: id(tensor) for name, tensor in tensors_of(module).items()}
    x = torch.randn(2, 4)
    expected = module(x)
    residence.settle(module)
    home = places_of(module)
    assert residence.bring([module]) == loaded_bytes([module]) == 4 * (16 + 4 + 4 + 3 + 3) + 2 * 5
    assert {tensor.device.type for tensor in tensors_of(module).values()} == {device}
    assert all(torch.equal(tensor.cpu(), values[name]) for name, tensor in tensors_of(module).items())
    assert {name: tensor.stride() for name, tensor in tensors_of(module).items()} == strides
    assert {name: id(tensor) for name, tensor in tensors_of(module).items()} == objects
    assert not {place for name, place in places_of(module).items() if name != "empty"} & set(home.values())
    assert torch.allclose(module(x.to(device)).cpu(), expected)
    assert residence.bring([module]) == 0, "it is there already"
    residence.clear()
    residence.clear()
    assert places_of(module) == home, "no second copy in host memory"
    assert all(torch.equal(tensor, values[name]) for name, tensor in tensors_of(module).items())


@pytest.mark.parametrize("device", DEVICES)
def test_tied_weights_stay_tied(device: str) -> None:
    module, residence = Tied(), Residence(device)
    residence.settle(module)
    for go in (lambda: residence.bring([module]), residence.clear, lambda: residence.bring([module])):
        go()
        assert module.second.weight is module.first.weight
        assert module.transposed.data_ptr() == module.first.weight.data_ptr()
        assert module.row.data_ptr() == module.first.weight.data_ptr() + 2 * 4 * 4
        assert torch.equal(module.transposed, module.first.weight.t())


def test_only_those_that_were_brought_are_there() -> None:
    first, second, residence = Tied(0), Tied(1), Residence("cpu")
    for module in (first, second):
        residence.settle(module)
    homes = places_of(first), places_of(second)
    residence.bring([first])
    assert residence.bring([second]) == loaded_bytes([second])
    assert places_of(first) == homes[0]
    assert places_of(second) != homes[1]
    residence.bring([first, second])
    assert places_of(first) != homes[0]


def test_a_module_for_which_memory_does_not_suffice_is_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, residence = Tied(0), Tied(1), Residence("cpu")
    for module in (first, second):
        residence.settle(module)
    home = places_of(second)
    residence.bring([first])
    left = iter([True, True])

    def copy(data: torch.Tensor, _device: torch.device) -> torch.Tensor:
        if not next(left, False):
            raise torch.OutOfMemoryError("no more")
        return data.clone()

    with monkeypatch.context() as patch:
        patch.setattr("pipedit.worker.residence._copy", copy)
        with pytest.raises(torch.OutOfMemoryError):
            residence.bring([second])
    assert places_of(second) == home
    assert residence.bring([second]) == loaded_bytes([second])


def test_weights_that_are_elsewhere_already_are_refused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.raises(AssertionError, match="loaded into host memory"):
        Residence("cuda").settle(nn.Linear(2, 2).cuda())


# -- in a worker ----------------------------------------------------------------------------------------------------


def near(first: Frames, second: Frames) -> bool:
    """Up to the rounding of a level: products on the CPU round by where the weights lie in memory, and copies lie
    elsewhere."""
    return first.shape == second.shape and int(np.abs(first.astype(int) - second).max()) <= 1


def homes(worker_crew: Crew) -> list[dict[str, int]]:
    stages = worker_crew.workers[0]._stages
    return [places_of(module) for stage in (stages.text, stages.denoise, stages.decode) for module in stage.modules]


@pytest.mark.parametrize("kind", ["wan", "wan22", "wan_ti2v", "hunyuan"])
def test_a_worker_that_offloads_makes_the_same_video(kind: str, tiny_folder: Folder) -> None:
    with crew(tiny_folder(kind), kind) as alone:
        expected = alone.video("a", alone.request())
        assert not alone.spans("onload")
    with crew(tiny_folder(kind), kind, offload=True) as alone:
        before = homes(alone)
        request = alone.request()
        assert near(alone.video("a", request), expected)
        assert not near(alone.video("b", dataclasses.replace(request, seed=9)), expected)
        assert homes(alone) == before, "everybody is at home again"
        stages = alone.workers[0]._stages
        roles = {"encoder": stages.text.modules, "decoder": stages.decode.modules}
        onloads = [span for span in alone.spans("onload") if span.request_id == "a"]
        for role, modules in roles.items():
            assert [span.payload_bytes for span in onloads if span.role == role] == [loaded_bytes(modules)]
        denoising = [span.payload_bytes for span in onloads if span.role == "denoiser"]
        assert denoising == [loaded_bytes([expert]) for expert in stages.denoise.modules]
        assert len(denoising) == (2 if kind == "wan22" else 1), "experts come when they are used"


def test_a_stage_stays_from_its_first_step_to_its_last(tiny_folder: Folder) -> None:
    with crew(tiny_folder("wan"), "wan", offload=True) as alone:
        request = alone.request()
        before = homes(alone)
        (transformer,) = alone.workers[0]._stages.denoise.modules

        def is_at_home() -> bool:
            return places_of(transformer) in before

        alone.encode("a", request)
        states = []
        for step in range(3):
            alone.run(alone.step("a", request, step))
            states.append(is_at_home())
        assert states == [False, False, True]
        alone.run(alone.chunk("a", request, 0))
        assert homes(alone) != before
        alone.release("a")  # in the midst of its decode, as after a cancel
        assert homes(alone) == before
        assert alone.is_empty


def test_requests_in_turns_bring_what_they_need(tiny_folder: Folder) -> None:
    with crew(tiny_folder("wan"), "wan") as alone:
        expected = [alone.video(name, alone.request(seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    with crew(tiny_folder("wan"), "wan", offload=True) as alone:
        requests = [alone.request(seed=1), alone.request(seed=2)]
        alone.encode("a", requests[0])
        alone.run(alone.step("a", requests[0], 0))
        alone.encode("b", requests[1])
        alone.denoise("b", requests[1])
        alone.run(alone.step("a", requests[0], 1, num_steps=2))
        assert near(alone.decode("b", requests[1]), expected[1])
        assert near(alone.decode("a", requests[0]), expected[0])
        assert sum(span.role == "denoiser" for span in alone.spans("onload")) == 3


def test_several_workers_offload_too(tiny_folder: Folder) -> None:
    with crew(tiny_folder("wan"), "wan", Placement.colocated(2)) as two:
        expected = two.video("a", two.request())
    with crew(tiny_folder("wan"), "wan", Placement.colocated(2), offload=True) as two:
        assert near(two.video("a", two.request()), expected)
