"""Fits the machine constants of PipeDiT's two machines to its tables and says how well they predict.

    python benchmarks/paper_fit/fit.py            # residuals of the constants that ship with the package
    python benchmarks/paper_fit/fit.py --fit      # fit anew and print the constants
    python benchmarks/paper_fit/fit.py --leave-out  # fit without a shape, a GPU, a model, ..., and predict it

Every constant has a prior: its logarithm is pulled towards a plausible value, so that constants that the tables do not
tell apart stay where physics wants them.
"""

import argparse
import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from pipedit.models.paper_costs import paper_cost
from pipedit.plan.hardware import Cluster, make_cluster
from pipedit.plan.paper_variants import BASELINE, PIPEDIT, SYSTEMS, PublishedSystem, predicted_s, step_s

HERE = Path(__file__).parent
Constants = Mapping[str, float]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
# Tensor cores, dense, bfloat16 with float32 sums: data sheets.
PEAKS = {"A6000": 154.8e12, "L40": 181.05e12}
TOLERANCE = 0.03  # relative; larger residuals count less than by their square
PROMPTS, NUM_DEVICES = 10, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prior:
    """`spread` of the logarithm: 0.7 means that a factor of two is one standard deviation."""

    value: float
    spread: float
    what: str


PRIORS = {
    "linear_share": Prior(value=0.7, spread=0.15, what="linear layers, share of the peak, both GPUs"),
    "attention_a6000": Prior(value=0.6, spread=0.3, what="attention without mask on A6000, share of the peak"),
    "attention_l40": Prior(value=0.6, spread=0.5, what="attention without mask on L40, share of the peak"),
    "masked_attention": Prior(value=0.5, spread=0.4, what="speed of attention with a mask over that without"),
    "convolution_share": Prior(value=0.25, spread=0.5, what="3D convolutions, share of the peak, both GPUs"),
    "link_a6000": Prior(value=7e9, spread=0.7, what="bytes/s of a device in an all-to-all of 8, A6000 machine"),
    "link_l40": Prior(value=5e9, spread=0.7, what="bytes/s of a device in an all-to-all of 8, L40 machine"),
    "latency_s": Prior(value=1e-4, spread=0.7, what="seconds of an exchange without any bytes"),
    "neighbour": Prior(value=1.7, spread=0.5, what="rate of a ring over that of an all-to-all"),
    "host": Prior(value=12e9, spread=1.0, what="bytes/s from host memory to all 8 devices together"),
    "layer_s": Prior(value=2e-3, spread=0.7, what="seconds of a layer without any tokens"),
    "request_s": Prior(value=0.5, spread=1.0, what="seconds of a prompt beside encoding, denoising, decoding"),
    "passes": Prior(value=80, spread=0.4, what="element-wise passes over the hidden state of a layer"),
    "ring_loss": Prior(value=0.08, spread=0.5, what="attention's loss for every further rank of a ring"),
    "hidden_cost": Prior(value=0.2, spread=1.0, what="share of hidden exchange time that slows computing down"),
    "chunk_s": Prior(value=3e-4, spread=1.0, what="seconds of a head chunk beside computing and sending"),
    "helper_s": Prior(value=2e-3, spread=1.0, what="seconds that an attention waits for helpers"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One published figure: seconds of 10 prompts, or of one step where `steps` is 0."""

    table: str
    model: str
    gpu: str
    width: int
    height: int
    frames: int
    steps: int
    variant: str
    published_s: float

    @property
    def shape(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


WEIGHTS = {"6": 1.0, "7": 1.5, "figure 5": 0.5, "2": 0.5}


def read_cases() -> list[Case]:
    columns = {BASELINE: "baseline_s", PIPEDIT: "pipedit_s"}
    cases = [
        _case("6", {**row, "variant": variant, "published_s": row[column]})
        for row in _rows("table6.csv")
        for variant, column in columns.items()
    ]
    others = {"7": "table7.csv", "figure 5": "figure5.csv", "2": "table2.csv"}
    return cases + [_case(table, row) for table, file in others.items() for row in _rows(file)]


def _case(table: str, row: Mapping[str, str]) -> Case:
    return Case(
        table=table,
        model=row["model"],
        gpu=row["gpu"],
        width=int(row["width"]),
        height=int(row["height"]),
        frames=int(row["frames"]),
        steps=int(row.get("steps") or 0),
        variant=row["variant"],
        published_s=float(row.get("published_s") or row["published_step_s"]),
    )


def _rows(file: str) -> list[dict[str, str]]:
    with (HERE / file).open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


# -- constants <-> objects ----------------------------------------------------------------------------------------


def cluster_of(gpu: str, constants: Constants) -> Cluster:
    """The shipped one with these constants."""
    shipped, low = make_cluster(gpu.lower(), num_devices=NUM_DEVICES), gpu.lower()
    device = dataclasses.replace(
        shipped.device,
        linear_per_s=constants["linear_share"] * PEAKS[gpu],
        attention_per_s=constants[f"attention_{low}"] * PEAKS[gpu],
        convolution_per_s=constants["convolution_share"] * PEAKS[gpu],
        masked_attention=constants["masked_attention"],
        layer_overhead_s=constants["layer_s"],
    )
    rate = constants[f"link_{low}"]
    link = dataclasses.replace(
        shipped.link,
        bytes_per_s=rate,
        neighbour_bytes_per_s=rate * constants["neighbour"],
        latency_s=constants["latency_s"],
    )
    return dataclasses.replace(shipped, device=device, link=link, node_host_bytes_per_s=constants["host"])


def system_of(model: str, constants: Constants) -> PublishedSystem:
    names = ("passes", "request_s", "hidden_cost", "chunk_s", "helper_s", "ring_loss")
    system = SYSTEMS[model]
    implementation = dataclasses.replace(system.implementation, **{name: constants[name] for name in names})
    return dataclasses.replace(system, implementation=implementation)


def shipped_constants() -> dict[str, float]:
    clusters = {gpu: make_cluster(gpu.lower(), num_devices=NUM_DEVICES) for gpu in PEAKS}
    a6000, l40 = clusters["A6000"], clusters["L40"]
    implementation = SYSTEMS["OpenSoraPlan"].implementation
    names = ("passes", "request_s", "hidden_cost", "chunk_s", "helper_s", "ring_loss")
    assert a6000.node_host_bytes_per_s is not None
    return {
        "linear_share": a6000.device.linear_per_s / PEAKS["A6000"],
        "attention_a6000": a6000.device.attention_per_s / PEAKS["A6000"],
        "attention_l40": l40.device.attention_per_s / PEAKS["L40"],
        "masked_attention": a6000.device.masked_attention,
        "convolution_share": a6000.device.convolution_per_s / PEAKS["A6000"],
        "link_a6000": a6000.link.bytes_per_s,
        "link_l40": l40.link.bytes_per_s,
        "latency_s": a6000.link.latency_s,
        "neighbour": a6000.link.ring_bytes_per_s / a6000.link.bytes_per_s,
        "host": a6000.node_host_bytes_per_s,
        "layer_s": a6000.device.layer_overhead_s,
        **{name: getattr(implementation, name) for name in names},
    }


def predict(cases: Iterable[Case], constants: Constants) -> list[float]:
    clusters = {gpu: cluster_of(gpu, constants) for gpu in PEAKS}
    systems = {model: system_of(model, constants) for model in SYSTEMS}
    return [_predict(case, systems[case.model], clusters[case.gpu]) for case in cases]


def _predict(case: Case, system: PublishedSystem, cluster: Cluster) -> float:
    cost = paper_cost(case.model, case.width, case.height, case.frames)
    if case.steps == 0:
        return step_s(system, cost, cluster, case.variant)
    return predicted_s(system, cost, cluster, case.variant, steps=case.steps, prompts=PROMPTS)


# -- least squares ------------------------------------------------------------------------------------------------


def fit(cases: list[Case], start: Constants | None = None) -> dict[str, float]:
    """Constants, from nothing but their priors and these cases. `start` saves time and changes nothing else."""

    def residuals(x: Vector) -> Vector:
        predicted = predict(cases, _constants(x))
        misses = [
            WEIGHTS[case.table] * math.log(seconds / case.published_s) / TOLERANCE
            for case, seconds in zip(cases, predicted, strict=True)
        ]
        softened = [math.copysign(math.sqrt(2 * (math.sqrt(1 + miss * miss) - 1)), miss) for miss in misses]
        pulls = [value / prior.spread for value, prior in zip(x, PRIORS.values(), strict=True)]
        return np.array([*softened, *pulls])

    begin = [math.log(start[name] / prior.value) if start else 0.0 for name, prior in PRIORS.items()]
    return _constants(_least_squares(residuals, np.array(begin)))


def _constants(x: Vector) -> dict[str, float]:
    return {name: prior.value * math.exp(value) for (name, prior), value in zip(PRIORS.items(), x, strict=True)}


def _least_squares(residuals: Callable[[Vector], Vector], x: Vector, rounds: int = 100) -> Vector:
    """Levenberg-Marquardt with a numeric Jacobian."""
    left, damping = residuals(x), 1e-2
    for _ in range(rounds):
        jacobian = np.stack([(residuals(x + d) - residuals(x - d)) / 2e-4 for d in 1e-4 * np.eye(len(x))], axis=1)
        normal, gradient, before = jacobian.T @ jacobian, jacobian.T @ left, left @ left
        while True:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            tried = x + np.clip(step, -0.5, 0.5)
            found = residuals(tried)
            if found @ found < before or damping > 1e9:
                break
            damping *= 4
        x, left, damping = tried, found, max(damping / 4, 1e-9)
        if before - left @ left < 1e-5 * before:
            break
    return x


# -- reports ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errors:
    """Of a group of cases, in percent."""

    count: int
    mean_absolute: float
    bias: float
    worst: float

    @classmethod
    def of(cls, misses: list[float]) -> "Errors":
        return cls(
            count=len(misses),
            mean_absolute=statistics.mean(abs(miss) for miss in misses),
            bias=statistics.mean(misses),
            worst=max(misses, key=abs),
        )

    def cells(self) -> str:
        return f"{self.count} | {self.mean_absolute:.1f} | {self.bias:+.1f} | {self.worst:+.1f}"


def misses(cases: list[Case], constants: Constants) -> list[float]:
    predicted = predict(cases, constants)
    return [100 * (seconds / case.published_s - 1) for case, seconds in zip(cases, predicted, strict=True)]


def grouped(cases: list[Case], percents: list[float], key: Callable[[Case], tuple[str, ...]]) -> str:
    groups: dict[tuple[str, ...], list[float]] = {}
    for case, percent in zip(cases, percents, strict=True):
        groups.setdefault(key(case), []).append(percent)
    return "\n".join(f"| {' | '.join(name)} | {Errors.of(values).cells()} |" for name, values in sorted(groups.items()))


def report(cases: list[Case], constants: Constants) -> str:
    percents = misses(cases, constants)
    lines = ["| table | model | GPU | variant | cases | mean absolute % | bias % | worst % |", "|" + "---|" * 8]
    lines.append(grouped(cases, percents, lambda case: (case.table, case.model, case.gpu, case.variant)))
    lines += ["", "| table | model | GPU | variant | shape | error % by steps |", "|" + "---|" * 6]
    rows: dict[tuple[str, ...], list[str]] = {}
    for case, percent in zip(cases, percents, strict=True):
        name = (case.table, case.model, case.gpu, case.variant, case.shape)
        rows.setdefault(name, []).append(f"{case.steps}: {percent:+.1f}")
    lines += [f"| {' | '.join(name)} | {', '.join(values)} |" for name, values in rows.items()]
    return "\n".join(lines)


def leave_out(cases: list[Case]) -> str:
    """Fits without some cases, and the errors of just those."""
    tests: dict[str, Callable[[Case], bool]] = {
        "HunyuanVideo": lambda case: case.model == "HunyuanVideo",
        "OpenSoraPlan on A6000": lambda case: case.model == "OpenSoraPlan" and case.gpu == "A6000",
        "L40 at 1024x576": lambda case: case.gpu == "L40" and case.width == 1024,
        "L40 at 480x352 and 640x352": lambda case: case.gpu == "L40" and case.width < 800,
        "L40": lambda case: case.gpu == "L40",
        "tables 7, 2 and figure 5": lambda case: case.table != "6",
    }
    for shape in dict.fromkeys(case.shape for case in cases):
        tests[f"shape {shape}"] = lambda case, shape=shape: case.shape == shape  # type: ignore[misc]
    for steps in (10, 20, 30, 40, 50):
        tests[f"{steps} steps"] = lambda case, steps=steps: case.steps == steps  # type: ignore[misc]
    lines = ["| left out | table 6 cases | mean absolute % | bias % | worst % |", "|" + "---|" * 5]
    for name, is_left_out in tests.items():
        rest = [case for case in cases if not is_left_out(case)]
        own = [case for case in cases if is_left_out(case) and (case.table == "6" or name.startswith("tables"))]
        if own:
            lines.append(f"| {name} | {Errors.of(misses(own, fit(rest, shipped_constants()))).cells()} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit anew instead of taking the shipped constants")
    parser.add_argument("--leave-out", action="store_true", help="fit without some cases and predict those")
    arguments = parser.parse_args()
    cases = read_cases()
    if arguments.leave_out:
        print(leave_out(cases))
        return
    constants = fit(cases) if arguments.fit else shipped_constants()
    for name, value in constants.items():
        print(f"{name:20s} {value:<12.4g} {PRIORS[name].what}")
    print(report(cases, constants))


if __name__ == "__main__":
    main()
