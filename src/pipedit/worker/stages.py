"""The stages of a worker's roles: loaded, and their weights where they are needed. Knows no commands."""

from collections.abc import Callable, Iterator

from pipedit.core.placement import Role
from pipedit.models.adapter import BlockStage, DecodeStage, DenoiseStage, ModelAdapter, TextStage
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.worker.residence import Residence
from pipedit.worker.settings import WorkerSettings

HOST = "cpu"


class Stages:
    """Only those of `roles` are there. With offloading, `residence` brings weights to the device and home again; else
    it is None, and all of them stay on the device. `layers`: the denoiser is a stage of a layer pipeline, with these
    layers only."""

    def __init__(
        self, adapter: ModelAdapter, settings: WorkerSettings, roles: tuple[Role, ...], *, layers: range | None = None
    ) -> None:
        self._adapter, self._settings, self._roles, self._layers = adapter, settings, roles, layers
        self.residence = Residence(settings.device) if settings.offload else None
        self._text: TextStage | None = None
        self._denoise: DenoiseStage | None = None
        self._block: BlockStage | None = None
        self._decode: DecodeStage | None = None

    def load(self, parallel: ParallelRuntime | None) -> Iterator[Role]:
        """Loads one after the other and tells after each which role it is for. Denoising is shared by `parallel`."""
        load: dict[Role, Callable[[], None]] = {
            Role.ENCODER: self._load_text,
            Role.DENOISER: lambda: self._load_denoise(parallel),
            Role.DECODER: self._load_decode,
        }
        for role in Role:
            if role in self._roles:
                load[role]()
                yield role

    @property
    def text(self) -> TextStage:
        assert self._text is not None, f"a worker that is {self._roles} cannot encode"
        return self._text

    @property
    def denoise(self) -> DenoiseStage:
        assert self._denoise is not None, f"a worker that is {self._roles} cannot denoise"
        return self._denoise

    @property
    def block(self) -> BlockStage:
        assert self._block is not None, f"a worker that is {self._roles} has no layers"
        return self._block

    @property
    def decode(self) -> DecodeStage:
        assert self._decode is not None, f"a worker that is {self._roles} cannot decode"
        return self._decode

    @property
    def _home(self) -> str:
        """Where weights are loaded."""
        return self._settings.device if self.residence is None else HOST

    def _load_text(self) -> None:
        self._text = self._adapter.load_text_stage(self._home, self._settings.precision)
        self._settle(self._text)

    def _load_denoise(self, parallel: ParallelRuntime | None) -> None:
        if self._layers is not None:
            self._block = self._adapter.load_block_stage(self._home, self._settings.precision, self._layers)
            return
        stage = self._denoise = self._adapter.load_denoise_stage(self._home, self._settings.precision)
        stage.device = self._settings.device
        self._settle(stage)
        if parallel is not None:
            stage.attach(parallel)
        if self._settings.compile_layers:
            stage.compile_layers()

    def _load_decode(self) -> None:
        tiling = self._settings.vae_tiling
        stage = self._decode = self._adapter.load_decode_stage(self._home, self._settings.precision, tiling=tiling)
        stage.device = self._settings.device
        self._settle(stage)

    def _settle(self, stage: TextStage | DenoiseStage | DecodeStage) -> None:
        if self.residence is not None:
            for module in stage.modules:
                self.residence.settle(module)
