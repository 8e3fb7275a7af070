"""Machines as data: what a device, a link and a cluster of them do per second. Read by name or from a JSON file.

Knows no model. Every number carries where it comes from; the files of known hardware are in `hardware_data/`.
"""

import dataclasses
import difflib
import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipedit.core.errors import InvalidRequestError
from pipedit.core.staging import write_text_whole
from pipedit.plan.device_profile import DeviceProfile

_FORMAT = 1
_DEVICE, _LINK, _CLUSTER = "device", "link", "cluster"
# Of what a profile does not measure: copies between host and device go over a link of this rate, as PCIe 4.0 has it,
# and element-wise work moves this many bytes for each linear operation, as on an A6000.
_HOST_BYTES_PER_S = 20e9
_BYTES_PER_OPERATION = 0.005
_LAYER_OVERHEAD_S = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or one CPU. Rates are what software reaches, not peaks; operations are floating point, a
    multiply and an add are two.

    `masked_attention`: the speed of attention with an additive mask as a share of `attention_per_s`.
    `memory_bytes_per_s`: of its own memory, which bounds element-wise work. `host_bytes_per_s`: copies from and to the
    host's memory, each way. `layer_overhead_s`: what a transformer layer takes however few tokens it has: launches and
    Python. `source`: field -> where its value comes from.
    """

    name: str
    title: str
    memory_bytes: int
    linear_per_s: float
    attention_per_s: float
    convolution_per_s: float
    memory_bytes_per_s: float
    host_bytes_per_s: float
    layer_overhead_s: float
    masked_attention: float = 1.0
    price_per_hour: float | None = None
    source: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What joins devices. `bytes_per_s`: what one device sends while all of them exchange with each other, each way.
    `neighbour_bytes_per_s`: where every device sends to the next one only, as in a ring. `latency_s`: of one exchange,
    however small."""

    name: str
    title: str
    bytes_per_s: float
    latency_s: float
    neighbour_bytes_per_s: float | None = None
    source: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def ring_bytes_per_s(self) -> float:
        return self.neighbour_bytes_per_s or self.bytes_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal devices in equal machines. `link` joins those of one machine, `node_link` the machines (each device has one
    of its own). `node_host_bytes_per_s`: copies from and to host memory of all devices of a machine together."""

    device: Device
    num_devices: int
    link: Link
    devices_per_node: int = 8
    node_link: Link | None = None
    node_host_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        counts = {"num_devices": self.num_devices, "devices_per_node": self.devices_per_node}
        problems = [f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1]
        if not problems and self.num_devices > self.devices_per_node and self.node_link is None:
            problems.append(
                f"{self.num_devices} devices are more than one machine's {self.devices_per_node}, and no node_link "
                "says what joins the machines"
            )
        if problems:
            raise InvalidRequestError(problems)

    def exchange_s(self, num_bytes: float, ranks: int) -> float:
        """One all-to-all among `ranks` neighbouring devices, of which the busiest sends or receives so many bytes."""
        if ranks <= 1 or not num_bytes:
            return 0.0
        far = max(ranks - self.devices_per_node, 0) / (ranks - 1) if ranks > self.devices_per_node else 0.0
        near_s = num_bytes * (1 - far) / self.link.bytes_per_s
        if not far or self.node_link is None:
            return self.link.latency_s + near_s
        far_s = num_bytes * far / self.node_link.bytes_per_s
        return max(self.link.latency_s, self.node_link.latency_s) + max(near_s, far_s)

    def pass_on_s(self, num_bytes: float, ranks: int) -> float:
        """Every one of `ranks` neighbouring devices sends so many bytes to the next one."""
        if ranks <= 1 or not num_bytes:
            return 0.0
        crosses = ranks > self.devices_per_node and self.node_link is not None
        slowest = self.node_link if crosses and self.node_link is not None else self.link
        return slowest.latency_s + num_bytes / min(slowest.ring_bytes_per_s, self.link.ring_bytes_per_s)

    def host_copy_s(self, num_bytes: float, ranks: int) -> float:
        """`ranks` devices of one machine copy so many bytes each from or to host memory, at the same time."""
        each = self.device.host_bytes_per_s
        if self.node_host_bytes_per_s is not None:
            each = min(each, self.node_host_bytes_per_s / min(max(ranks, 1), self.devices_per_node))
        return num_bytes / each


# -- by name or from a file ---------------------------------------------------------------------------------------


def known_devices() -> list[str]:
    return sorted(_known(_DEVICE))


def known_links() -> list[str]:
    return sorted(_known(_LINK))


def find_device(name: str) -> Device:
    """A known device by its short name, or one from a file. Raises InvalidRequestError for neither."""
    return _make(Device, _content(_DEVICE, name), name)


def find_link(name: str) -> Link:
    """A known link by its short name, or one from a file. Raises InvalidRequestError for neither."""
    return _make(Link, _content(_LINK, name), name)


def make_cluster(
    device: str | Device,
    link: str | Link | None = None,
    *,
    num_devices: int = 1,
    devices_per_node: int = 8,
    node_link: str | Link | None = None,
) -> Cluster:
    """A cluster of known or self-made parts. `device`: an object, a name, or a file, also one of `write_cluster`, whose
    devices and link are taken then. Without a link, the one that the device usually comes with; the machines' own is
    InfiniBand unless given."""
    found, usual, host = (device, None, None) if isinstance(device, Device) else _with_link(device)
    link = link or usual
    if link is None:
        raise InvalidRequestError([f"what joins {found.name} devices is not known; give a link: {_listed(_LINK)}"])
    if node_link is None and num_devices > devices_per_node:
        node_link = "infiniband"
    return Cluster(
        device=found,
        num_devices=num_devices,
        link=find_link(link) if isinstance(link, str) else link,
        devices_per_node=devices_per_node,
        node_link=find_link(node_link) if isinstance(node_link, str) else node_link,
        node_host_bytes_per_s=host,
    )


def _with_link(name: str) -> tuple[Device, Link | str | None, float | None]:
    """A device, what usually joins it to others, and the rate of host memory in its machines."""
    if name.lower() not in _known(_DEVICE) and _is_cluster_file(Path(name)):
        measured = read_cluster(Path(name))
        return measured.device, measured.link, measured.node_host_bytes_per_s
    content = _content(_DEVICE, name)
    return _make(Device, content, name), content.get("link"), content.get("node_host_bytes_per_s")


def _is_cluster_file(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever reads it as a device will say what is wrong
    return isinstance(content, dict) and is_measured(content)


def is_measured(content: Mapping[str, Any]) -> bool:
    """Whether this is the content of a file that `write_cluster` made."""
    return content.get("kind") == _CLUSTER and "format" in content


def read_cluster(path: Path) -> Cluster:
    """A cluster from the file that `write_cluster` made; its parts may be names. Raises InvalidRequestError."""
    content = _read(path, _CLUSTER)
    try:
        device, link, node_link = content.pop("device"), content.pop("link"), content.pop("node_link", None)
        return Cluster(
            device=find_device(device) if isinstance(device, str) else _make(Device, device, str(path)),
            link=_link(link, path),
            node_link=None if node_link is None else _link(node_link, path),
            **content,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise InvalidRequestError([f"{path} is not a cluster file: {_why(error)}"]) from error


def _link(given: str | dict[str, Any], path: Path) -> Link:
    return find_link(given) if isinstance(given, str) else _make(Link, given, str(path))


def write_cluster(cluster: Cluster, path: Path) -> None:
    _write(_CLUSTER, dataclasses.asdict(cluster), path)


def write_device(device: Device, path: Path) -> None:
    _write(_DEVICE, dataclasses.asdict(device), path)


def _write(kind: str, content: dict[str, Any], path: Path) -> None:
    write_text_whole(path, json.dumps({"format": _FORMAT, "kind": kind, **content}, indent=1) + "\n")


def device_of(profile: DeviceProfile, name: str = "measured") -> Device:
    """The device that was measured by `pipedit bench device`. What that does not measure is assumed, and says so."""
    linear = _rate(profile, "linear")
    attention = _rate(profile, "attention", linear)
    convolution = _rate(profile, "convolution", linear)
    measured, assumed = "measured by pipedit bench device", "assumed: pipedit bench device does not measure it"
    return Device(
        name=name,
        title=profile.device,
        memory_bytes=profile.memory_bytes,
        linear_per_s=linear,
        attention_per_s=attention,
        convolution_per_s=convolution,
        memory_bytes_per_s=linear * _BYTES_PER_OPERATION,
        host_bytes_per_s=_HOST_BYTES_PER_S,
        layer_overhead_s=_LAYER_OVERHEAD_S,
        source={
            **dict.fromkeys(("memory_bytes", "linear_per_s", "attention_per_s", "convolution_per_s"), measured),
            **dict.fromkeys(("memory_bytes_per_s", "host_bytes_per_s", "layer_overhead_s"), assumed),
        },
    )


def _rate(profile: DeviceProfile, kind: str, otherwise: float | None = None) -> float:
    try:
        return profile.operations_per_s(kind)
    except KeyError as error:
        if otherwise is None:
            raise InvalidRequestError([f"{error.args[0]}; pipedit bench device measures one"]) from error
        return otherwise


_Part = TypeVar("_Part", Device, Link)


def _make(kind: type[_Part], content: Mapping[str, Any], name: str) -> _Part:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    beside = {"format", "kind", "link", "node_host_bytes_per_s"}
    problems = [
        f"{name}: {key} is not known{_nearest(key, sorted(fields))}"
        for key in content
        if key not in fields and key not in beside
    ]
    problems += [
        f"{name}: {key}={content[key]!r} should be a number above 0"
        for key in content
        if key in fields
        and key.endswith(("_bytes", "_per_s", "_s"))
        and not _is_fitting(content[key], fields[key].default)
    ]
    if problems:
        raise InvalidRequestError(problems)
    try:
        return kind(**{key: value for key, value in content.items() if key in fields})
    except TypeError as error:
        raise InvalidRequestError([f"{name} is not a {kind.__name__.lower()} file: {_why(error)}"]) from error


def _is_fitting(value: Any, default: Any) -> bool:
    """Whether a value can be that of a number, which is None only where that is the default."""
    if value is None:
        return default is None
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _content(kind: str, name: str) -> dict[str, Any]:
    known = _known(kind)
    if name.lower() in known:
        return dict(known[name.lower()])
    if name.endswith(".json") or "/" in name:
        return _read(Path(name), kind)
    raise InvalidRequestError(
        [f"{kind} {name!r} is not known; use {_listed(kind)}, or a file{_nearest(name.lower(), list(known))}"]
    )


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError([f"{path} is not a {kind} file: {_why(error)}"]) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("kind") != kind:
        raise InvalidRequestError([f'{path} is not a {kind} file: it lacks "format": {_FORMAT} and "kind": "{kind}"'])
    return {key: value for key, value in content.items() if key not in ("format", "kind")}


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    return str(error)


@functools.cache
def _known(kind: str) -> dict[str, dict[str, Any]]:
    """Short name -> the file's content."""
    folder = importlib.resources.files("pipedit.plan") / "hardware_data"
    files = (file for file in folder.iterdir() if file.name.endswith(".json"))
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {content["name"]: content for content in contents if content["kind"] == kind}


def _listed(kind: str) -> str:
    return ", ".join(sorted(_known(kind)))


def _nearest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""
