"""Tables of cases: what is predicted, that the published variants are what the scheduler would do, and bad tables."""

import csv
import io
from pathlib import Path

import pytest

from pipedit.core.errors import InvalidRequestError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.engine.cases import cases_as_csv, predict_cases, read_cases
from pipedit.models.by_name import find_model
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.durations import FixedDurations
from pipedit.plan.hardware import make_cluster
from pipedit.plan.jobs import Work
from pipedit.plan.outcome import summarize
from pipedit.plan.paper_variants import ACO, DEDIVAE, PIPESP, SYSTEMS, predicted_s, step_s
from pipedit.plan.pools import Pool, Service
from pipedit.plan.predict import Predictor
from pipedit.plan.scheduler import Policy
from pipedit.plan.simulator import Arrival, simulate

HEADING = "model,gpu,width,height,frames,steps,prompts,variant\n"


def table(folder: Path, text: str, heading: str = HEADING) -> Path:
    path = folder / "cases.csv"
    path.write_text(heading + text, encoding="utf-8")
    return path


def predicted(folder: Path, text: str, heading: str = HEADING) -> list[float]:
    return list(predict_cases(read_cases(table(folder, text, heading)).cases))


def test_a_column_is_added(tmp_path: Path) -> None:
    heading = HEADING.replace("variant", "variant,seen,predicted_s")
    text = 'HunyuanVideo,A6000,480,352,65,10,10,baseline,"a, b",7\n,,,,,,,,,\n'
    text += "opensoraplan,l40,480,352,65,10,10,pipedit,,\n"
    cases = read_cases(table(tmp_path, text, heading))
    predictions = list(predict_cases(cases.cases))
    rows = list(csv.reader(io.StringIO(cases_as_csv(cases, predictions))))
    assert rows[0] == [*HEADING.strip().split(","), "seen", "predicted_s"]
    assert rows[1] == ["HunyuanVideo", "A6000", "480", "352", "65", "10", "10", "baseline", "a, b", rows[1][-1]]
    assert rows[2][-2] == ""
    assert [float(row[-1]) for row in rows[1:]] == pytest.approx(predictions, abs=0.05)


def test_time_grows_with_the_work(tmp_path: Path) -> None:
    plain, more_steps, more_prompts, larger = predicted(
        tmp_path,
        "HunyuanVideo,A6000,480,352,65,10,10,pipedit\n"
        "HunyuanVideo,A6000,480,352,65,20,10,pipedit\n"
        "HunyuanVideo,A6000,480,352,65,10,20,pipedit\n"
        "HunyuanVideo,A6000,640,352,65,10,10,pipedit\n",
    )
    assert plain < larger < more_steps
    assert more_prompts == pytest.approx(2 * plain, rel=0.1)


def test_ours_is_at_least_as_good_as_what_it_could_have_taken(tmp_path: Path) -> None:
    for model in SYSTEMS:
        ours, pipedit = predicted(
            tmp_path, f"{model},A6000,640,352,65,10,10,ours\n{model},A6000,640,352,65,10,10,pipedit\n"
        )
        assert ours <= pipedit


def test_other_machines_and_models(tmp_path: Path) -> None:
    eight, sixteen = predicted(
        tmp_path,
        "wan2.1-t2v-1.3b,H100,832,480,81,10,10,ours,8\nwan2.1-t2v-1.3b,H100,832,480,81,10,10,ours,16\n",
        HEADING.replace("variant", "variant,gpus"),
    )
    assert sixteen < eight


@pytest.mark.parametrize("variant", [DEDIVAE, PIPESP, ACO])
@pytest.mark.parametrize("model", SYSTEMS)
def test_published_variants_are_what_the_scheduler_does(model: str, variant: str) -> None:
    """Where the published system is a placement and a policy, virtual time gives what plan.paper_variants says."""
    system, cluster, prompts = SYSTEMS[model], make_cluster("a6000", num_devices=8), 10
    if variant == ACO and system.aco_waits_for_decode:
        pytest.skip("this scheduler never lets denoisers wait for a decoder")
    found = find_model(model)
    request = VideoRequest(prompt="", width=640, height=352, num_frames=97, num_inference_steps=20)
    cost = found.planned(found.complete(request)).cost
    predictor = Predictor(cluster=cluster, implementation=system.implementation)
    durations = FixedDurations(
        encode_s=predictor.encode_s(cost) + system.implementation.request_s,
        step_s=step_s(system, cost, cluster, DEDIVAE if variant == DEDIVAE else PIPESP),
        helped_step_s=step_s(system, cost, cluster, ACO),
        chunk_s=predictor.decode_s(cost) / cost.num_chunks,
    )
    encoder = Role.DECODER if system.encodes_on_decoders else Role.DENOISER
    work = Work(
        num_steps=cost.num_steps, num_chunks=cost.num_chunks, parallel=ParallelConfig(ulysses_degree=7), heads=24
    )
    pool = Pool(
        placement=Placement.disaggregated(denoise=7, decode=1, encoder=encoder),
        services={"a": Service(work=work, durations=durations)},
        policy=Policy(aco=AcoMode.ON if variant == ACO else AcoMode.OFF),
    )
    simulated = summarize(simulate([pool], [Arrival(at_s=0, kind="a")] * prompts)).makespan_s
    closed = predicted_s(system, cost, cluster, variant, steps=cost.num_steps, prompts=prompts)
    assert simulated == pytest.approx(closed, rel=0.02)


def test_every_problem_of_a_table_comes_with_its_line(tmp_path: Path) -> None:
    text = """HunyuanVideo,A6001,480,352,66,10,10,baseline
HunyuanVideoo,A6000,480,352,65,10,0,base
HunyuanVideo,A6000,481,352,66,10,10,baseline
,A6000,480,,65,ten,10,ours
wan2.1-t2v-1.3b,A6000,480,352,65,10,10,dedivae
"""
    with pytest.raises(InvalidRequestError) as caught:
        read_cases(table(tmp_path, text))
    found = list(caught.value.problems)
    starts = [
        "cases.csv:2: device 'A6001' is not known",
        "cases.csv:3: prompts must be at least 1",
        "cases.csv:3: unknown variant 'base'; did you mean baseline?",
        "cases.csv:3: model 'HunyuanVideoo' is neither",
        "cases.csv:4: num_frames=66 is not 4n+1",
        "cases.csv:4: width=481 is not a multiple of 16",
        "cases.csv:5: there is no model",
        "cases.csv:5: there is no height",
        "cases.csv:5: steps must be a whole number",
        "cases.csv:6: variant dedivae is published for OpenSoraPlan and HunyuanVideo only",
    ]
    assert len(found) == len(starts), found
    for problem, start in zip(found, starts, strict=True):
        assert problem.startswith(start)


def test_a_case_that_fits_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"cases.csv:2: nothing fits: .* GiB"):
        predicted(tmp_path, "hunyuanvideo,A6000,4096,4096,513,10,10,ours\n")
