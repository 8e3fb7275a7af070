"""Engines of several workers: which settings are refused and when, how each request is shared, whether it fits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipedit import Engine, InsufficientMemoryError, InvalidRequestError, VideoRequest
from pipedit.core import messages
from pipedit.core.parallel import ParallelConfig
from pipedit.core.units import GIB
from pipedit.engine.fitting import check_memory
from pipedit.engine.intake import check_input
from pipedit.engine.settings import EngineSettings, setting_notes, setting_problems
from pipedit.executor.simulated import SimulatedExecutor
from pipedit.models.registry import open_model

# 4 heads; 3 x 2 x 3 = 18 tokens
SMALL: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 3}
MakeEngine = Callable[..., tuple[Engine, SimulatedExecutor]]


@pytest.fixture
def make_engine(tiny_folder: Callable[[str], Path]) -> MakeEngine:
    def make(kind: str = "wan", **settings: Any) -> tuple[Engine, SimulatedExecutor]:
        executor = SimulatedExecutor(step_s=1.0)  # so long that each step is a command
        return Engine(tiny_folder(kind), device="cpu", executor=executor, **settings), executor

    return make


def sharing_of(engine: Engine, **settings: Any) -> ParallelConfig:
    (request,) = engine.prepare([VideoRequest(prompt="x", **{**SMALL, **settings})])
    return engine.sharing(request)


def test_each_request_gets_the_split_that_it_can_use(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_workers=4)
    assert sharing_of(engine) == ParallelConfig(cfg_degree=2, ulysses_degree=2)
    assert sharing_of(engine, guidance_scale=1.0) == ParallelConfig(ulysses_degree=4)
    videos = [*engine.generate("x", **SMALL), *engine.generate("x", guidance_scale=1.0, **SMALL)]
    assert [video.metadata.extra["num_workers"] for video in videos] == [4, 4]
    assert [video.metadata.extra["parallel"]["cfg_degree"] for video in videos] == [2, 1]
    sent = [command.parallel for command in executor.sent if isinstance(command, messages.Denoise)]
    assert sent == [ParallelConfig(cfg_degree=2, ulysses_degree=2)] * 3 + [ParallelConfig(ulysses_degree=4)] * 3
    assert {command.ranks for command in executor.sent if isinstance(command, messages.Denoise)} == {(0, 1, 2, 3)}


def test_true_guidance_counts_and_embedded_guidance_does_not(make_engine: MakeEngine) -> None:
    engine, _ = make_engine("hunyuan", num_workers=2)
    assert sharing_of(engine, guidance_scale=6.0).cfg_degree == 1
    assert sharing_of(engine, true_cfg_scale=4.0, negative_prompt="").cfg_degree == 2


def test_given_degrees_hold_and_requests_that_cannot_use_them_are_refused(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_workers=4, cfg_degree=2, ring_degree=2, pipesp_chunks=2)
    assert sharing_of(engine) == ParallelConfig(cfg_degree=2, ring_degree=2, pipesp_chunks=2)
    with pytest.raises(InvalidRequestError, match="cfg_degree 2 needs guidance"):
        sharing_of(engine, guidance_scale=1.0)
    requests = [VideoRequest(prompt=p, guidance_scale=s, **SMALL) for p, s in (("a", 5.0), ("b", 1.0))]
    with pytest.raises(InvalidRequestError, match=r"^prompt 2: cfg_degree=2 and ring_degree=2 cannot run on 4 workers"):
        engine.prepare(requests)


def test_a_request_with_other_problems_hears_of_this_one_too(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_workers=2, cfg_degree=2)
    with pytest.raises(InvalidRequestError) as caught:
        sharing_of(engine, num_frames=10, guidance_scale=1.0, height="tall")
    assert [problem.split("=")[0] for problem in caught.value.problems] == ["height", "num_frames", "cfg_degree"]


def test_more_workers_than_tokens_are_refused(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_workers=19)
    with pytest.raises(InvalidRequestError, match="19 is too many: the request has 18 tokens"):
        sharing_of(engine)
    assert sharing_of(engine, num_frames=13).world_size == 19


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_workers": 0}, "num_workers=0 must be at least 1"),
        ({"num_workers": 2.0}, "num_workers=2.0 should be a whole number"),
        ({"num_workers": 10**9}, "use at most 1024"),
        ({"num_workers": 4, "ulysses_degree": 3}, "3 does not divide 4"),
        ({"num_workers": 8, "ulysses_degree": 8}, "4 heads cannot go round 8 Ulysses ranks"),
        ({"num_workers": 2, "cfg_degree": 3}, "use 1 or 2"),
        ({"ulysses_degree": 2}, "ulysses_degree=2 cannot run on 1 worker"),
        ({"pipesp_chunks": "some"}, "pipesp_chunks='some'"),
        ({"num_workers": 2, "device": "cuda:0"}, "cuda is not available"),
    ],
)
def test_settings_that_can_never_work_are_refused_when_the_engine_is_made(
    tiny_folder: Callable[[str], Path], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Engine(tiny_folder("wan"), **{"device": "cpu", **settings})
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_an_unknown_model_hides_no_wrong_degree() -> None:
    settings = EngineSettings(model="no-such-model", num_workers=4, ulysses_degree=3, device="tpu")
    problems = check_input(settings, [VideoRequest(prompt="x")]).problems
    for part in ("tpu", "3 does not divide 4", "no-such-model"):
        assert sum(part in problem for problem in problems) == 1


def test_wrong_degrees_are_told_once_for_all_prompts(tiny_folder: Callable[[str], Path]) -> None:
    settings = EngineSettings(model=str(tiny_folder("wan")), num_workers=4, ulysses_degree=3, device="cpu")
    checked = check_input(settings, [VideoRequest(prompt="x", **SMALL), VideoRequest(prompt="y", **SMALL)])
    assert len(checked.problems) == 1


# -- devices and memory -------------------------------------------------------------------------------------------


def test_every_worker_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert setting_problems(EngineSettings(num_workers=2, device="cuda")) == []
    assert setting_problems(EngineSettings(num_workers=2)) == []
    assert setting_problems(EngineSettings(num_workers=3, device="cpu")) == []
    for device in ("auto", "cuda"):
        assert setting_problems(EngineSettings(num_workers=3, device=device)) == [
            "num_workers=3 needs a GPU for each, and there are 2 CUDA devices; use at most 2, or device cpu"
        ]
    (problem,) = setting_problems(EngineSettings(num_workers=2, device="cuda:1"))
    assert problem.endswith("use device cuda")


def test_only_the_workers_on_this_machine_need_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    launcher = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**launcher, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert setting_problems(EngineSettings(num_workers=4, device="cuda")) == []
    assert setting_problems(EngineSettings(num_workers=8, device="cuda")) != []  # those are not the launcher's


def test_more_workers_than_cores_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedit.engine.settings.usable_cores", lambda: 2)
    assert setting_notes(EngineSettings(num_workers=2, device="cpu")) == []
    (note,) = setting_notes(EngineSettings(num_workers=3, device="cpu"))
    assert note.startswith("3 workers share 2 cores")
    assert setting_notes(EngineSettings(num_workers=3, device="cuda")) == []


def test_workers_on_one_processor_share_its_memory_and_gpus_do_not(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_model(str(tiny_folder("wan")))
    request, precision = adapter.complete(VideoRequest(prompt="x", **SMALL)), adapter.default_precision("cpu")
    free_bytes = {"cpu": GIB, "cuda:0": GIB, "cuda:1": GIB}
    monkeypatch.setattr("pipedit.engine.fitting.available_bytes", free_bytes.__getitem__)
    check_memory([request], adapter, ("cpu",), precision)
    check_memory([request], adapter, ("cuda:0", "cuda:1"), precision)
    with pytest.raises(InsufficientMemoryError, match=r"on 2 workers need about 1\.0 GiB .* would fit: 1 worker inst"):
        check_memory([request], adapter, ("cpu", "cpu"), precision)
    free_bytes["cuda:1"] = GIB // 4
    with pytest.raises(InsufficientMemoryError, match=r"256\.0 MiB are free"):
        check_memory([request], adapter, ("cuda:0", "cuda:1"), precision)


def test_what_workers_in_other_processes_hold_counts_once(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After loading, less is free; the check goes by what was free before, weights and libraries included."""
    free = [2 * GIB]
    monkeypatch.setattr("pipedit.engine.fitting.available_bytes", lambda _device: free[0])
    engine, _ = make_engine(num_workers=2)
    engine.start()
    free[0] = 0
    assert sharing_of(engine).world_size == 2
    alone, _ = make_engine()
    alone.start()
    with pytest.raises(InsufficientMemoryError):
        sharing_of(alone)
