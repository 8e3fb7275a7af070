"""Attention with keys of neighbouring windows against the formula: one softmax in float64 over all keys, each of them
rotated where it stands. On one rank, and on two that share the heads."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pipedit.core.blocks import Storage
from pipedit.core.errors import InvalidRequestError
from pipedit.core.messages import Aco
from pipedit.core.parallel import ParallelConfig
from pipedit.core.rotation import TemporalRotation
from pipedit.parallel.context_attention import ContextAttention, Keep, Take
from pipedit.parallel.rotation import turn
from pipedit.parallel.runtime import ParallelRuntime
from tests.parallel.cases import GivenCall
from tests.parallel.ranks import Ranks, make_runtime

ROWS, COLUMNS = 2, 3
PER_FRAME = ROWS * COLUMNS
LAYERS = 2
TOLERANCE = 2e-6
Group = Callable[[int], Ranks]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """How a family deals the channels of a head out to frame, row and column."""

    channels: tuple[int, int, int]
    theta: float

    @property
    def rotation(self) -> TemporalRotation:
        return TemporalRotation(channels=self.channels[0], theta=self.theta)


WAN = Heads(channels=(44, 42, 42), theta=10000.0)
HUNYUAN = Heads(channels=(16, 56, 56), theta=256.0)
HEADS = {"wan": WAN, "hunyuan": HUNYUAN}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of every window. `shown`: text tokens that count, by batch row; None: all."""

    heads: Heads = WAN
    count: int = 2
    text: int = 0
    shown: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def batch(self) -> int:
        return 1 if self.shown is None else len(self.shown)

    @property
    def shown_text(self) -> torch.Tensor | None:
        """[B, T]"""
        return None if self.shown is None else torch.arange(self.text) < torch.tensor(self.shown)[:, None]

    def mask(self, latents: int) -> torch.Tensor | None:
        """[B, 1, 1, latents + T]"""
        if self.shown_text is None:
            return None
        return torch.cat([torch.ones(self.batch, latents, dtype=torch.bool), self.shown_text], dim=1)[:, None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """One forward pass. Its queries, keys and values are drawn from the seed, before rotation."""

    sizes: Sizes
    frames: int
    seed: int

    @property
    def tokens(self) -> int:
        return self.frames * PER_FRAME

    def raw(self, layer: int) -> torch.Tensor:
        """[3, B, n, S + T, D] of the type's precision, in float64: latents, then text."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(100 * self.seed + layer)
        shape = (3, sizes.batch, sizes.count, self.tokens + sizes.text, sum(sizes.heads.channels))
        return torch.randn(shape, generator=generator).to(sizes.dtype).double()

    def parts(self, layer: int) -> list[torch.Tensor]:
        """Query, key and value as a model makes them: rotated from frame 0 on, text not at all."""
        query, key, value = self.raw(layer)
        return [x.to(self.sizes.dtype) for x in (self.placed(query, 0), self.placed(key, 0), value)]

    def placed(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        latents = rotated(rows[:, :, : self.tokens], self.sizes.heads, first)
        return torch.cat([latents, rows[:, :, self.tokens :]], dim=2)


def rotated(rows: torch.Tensor, heads: Heads, first: int) -> torch.Tensor:
    """[B, n, S, D] float64 whose first row belongs to frame `first`: each pair of channels is a number in the plane."""
    frames = torch.arange(first, first + rows.shape[2] // PER_FRAME)
    places = torch.cartesian_prod(frames, torch.arange(ROWS), torch.arange(COLUMNS)).double()
    angles = []
    for axis, channels in enumerate(heads.channels):
        speeds = heads.theta ** (-torch.arange(0, channels, 2).double() / channels)
        angles.append(places[:, axis, None] * speeds)
    turns = torch.polar(torch.ones(1).double(), torch.cat(angles, dim=1))
    plane = torch.view_as_complex(rows.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(plane * turns).flatten(-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """Frames `first` to `stop` of a neighbour, the first of which stands at frame `place` of the window."""

    window: Window
    first: int
    stop: int
    place: int

    def key_and_value(self, layer: int, origin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(self.first * PER_FRAME, self.stop * PER_FRAME)
        _, key, value = self.window.raw(layer)[:, :, :, rows]
        return rotated(key, self.window.sizes.heads, origin + self.place), value


def formula(own: Window, layer: int, seen: Sequence[Seen], origin: int = 0) -> torch.Tensor:
    """[B, n, S + T, D] float64. Frames are counted from `origin`: text stands nowhere, so with text only 0 is right."""
    query, key, value = own.raw(layer)
    pairs = [(own.placed(key, origin), value), *(each.key_and_value(layer, origin) for each in seen)]
    return softmax(own, own.placed(query, origin), pairs)


def softmax(own: Window, query: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Over the window's own keys, of which the mask may hide text, and all others."""
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
    scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    hidden = own.sizes.mask(own.tokens)
    if hidden is not None:
        scores[..., : hidden.shape[-1]].masked_fill_(~hidden, -torch.inf)
    attended: torch.Tensor = scores.softmax(-1) @ values
    return attended


def kernel_of(heads: Heads, storage: Storage = Storage.DEVICE) -> ContextAttention:
    return ContextAttention(lambda keys, frames: turn(keys, frames, heads.rotation), storage)


def run(
    kernel: ContextAttention, window: Window, takes: Sequence[Take] = (), keeps: Sequence[Keep] = ()
) -> list[torch.Tensor]:
    """A forward pass: what each layer's attention returns."""
    kernel.begin(tuple(takes), tuple(keeps))
    results = []
    for layer in range(LAYERS):
        query, key, value = window.parts(layer)
        results.append(kernel(query, key, value, window.sizes.mask(window.tokens)))
    kernel.finish()
    return results


def keep(entry: str, first: int, stop: int) -> Keep:
    return Keep(entry=entry, first=first * PER_FRAME, stop=stop * PER_FRAME)


def difference(ours: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(ours, expected, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """Three windows: `own` sees the last two frames of `before`, and one of `after`, which begins with `skipped` frames
    that are not its own."""

    sizes: Sizes
    skipped: int = 0

    @property
    def before(self) -> Window:
        return Window(sizes=self.sizes, frames=4, seed=1)

    @property
    def own(self) -> Window:
        return Window(sizes=self.sizes, frames=3, seed=2)

    @property
    def after(self) -> Window:
        return Window(sizes=self.sizes, frames=3, seed=3)

    @property
    def seen(self) -> tuple[Seen, Seen]:
        tail = Seen(window=self.before, first=2, stop=4, place=-2)
        return tail, Seen(window=self.after, first=self.skipped, stop=self.skipped + 1, place=3)

    @property
    def takes(self) -> tuple[Take, Take]:
        return Take(entry="tail", turned=-4), Take(entry="head", turned=3 - self.skipped)

    @property
    def passes(self) -> list[tuple[Window, tuple[Take, ...], tuple[Keep, ...]]]:
        head = keep("head", self.skipped, self.skipped + 1)
        return [(self.before, (), (keep("tail", 2, 4),)), (self.after, (), (head,)), (self.own, self.takes, ())]

    def expected(self) -> list[list[torch.Tensor]]:
        """Of each pass and layer."""
        return [
            [formula(window, layer, self.seen if takes else ()) for layer in range(LAYERS)]
            for window, takes, _ in self.passes
        ]


TEXTS: dict[str, dict[str, Any]] = {"no text": {}, "text": {"text": 5}, "masked": {"text": 5, "shown": (5, 2)}}


# -- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("heads", HEADS)
def test_keys_of_both_sides_stand_where_they_belong(heads: str, text: str, skipped: int) -> None:
    sizes = Sizes(heads=HEADS[heads], **TEXTS[text])
    story, kernel = Story(sizes=sizes, skipped=skipped), kernel_of(sizes.heads)
    results = [run(kernel, *one) for one in story.passes]
    for ours, expected in zip(results, story.expected(), strict=True):
        assert difference(ours, expected) <= TOLERANCE
    assert not kernel.entries
    if not sizes.text:  # only differences of places count
        far = [formula(story.own, layer, story.seen, origin=100) for layer in range(LAYERS)]
        assert difference(results[-1], far) <= TOLERANCE
    tail, head = story.seen
    late = dataclasses.replace(head, place=head.place + 1)
    early = dataclasses.replace(tail, place=tail.place - 1)
    other = dataclasses.replace(tail, first=tail.first - 1, stop=tail.stop - 1)
    for wrong in ([tail, late], [early, head], [other, head], [head], [tail], [tail, head, head]):
        assert difference(results[-1], [formula(story.own, layer, wrong) for layer in range(LAYERS)]) > 1e-3


def test_a_window_keeps_what_its_own_model_rotated() -> None:
    """Though it takes keys itself: entries of entries are not passed on."""
    story, kernel = Story(sizes=Sizes()), kernel_of(WAN)
    for window, takes, keeps in story.passes:
        run(kernel, window, takes, (*keeps, keep("all", 0, window.frames)) if takes else keeps)
    last = Window(sizes=story.sizes, frames=2, seed=4)
    ours = run(kernel, last, [Take(entry="all", turned=-3)])
    seen = Seen(window=story.own, first=0, stop=3, place=-3)
    assert difference(ours, [formula(last, layer, [seen]) for layer in range(LAYERS)]) <= TOLERANCE


def test_hidden_text_stays_hidden_beside_other_keys() -> None:
    """The comparison above can fail: what the mask hides would show."""
    sizes = Sizes(text=5, shown=(5, 2))
    story, kernel = Story(sizes=sizes), kernel_of(WAN)
    ours = [run(kernel, *one) for one in story.passes][-1]
    bare = dataclasses.replace(story.own, sizes=dataclasses.replace(sizes, shown=(5, 5)))
    wrong = [formula(bare, layer, story.seen) for layer in range(LAYERS)]
    assert difference([x[:1] for x in ours], [x[:1] for x in wrong]) <= TOLERANCE
    assert difference([x[1:] for x in ours], [x[1:] for x in wrong]) > 1e-3


def test_an_entry_is_a_copy() -> None:
    """Keys may lie in a buffer that the next attention uses again, in any order of dimensions."""
    story, kernel = Story(sizes=Sizes()), kernel_of(WAN)
    for window, takes, keeps in story.passes[:-1]:
        kernel.begin(takes, keeps)
        for layer in range(LAYERS):
            buffer = torch.stack(window.parts(layer)).permute(3, 1, 0, 2, 4).contiguous()  # [S, B, 3, n, D]
            kernel(*buffer.permute(2, 1, 3, 0, 4))
            buffer.fill_(torch.nan)
        kernel.finish()
    assert difference(run(kernel, story.own, story.takes), story.expected()[-1]) <= TOLERANCE


def test_half_precision() -> None:
    story, kernel = Story(sizes=Sizes(heads=HUNYUAN, dtype=torch.bfloat16)), kernel_of(HUNYUAN)
    ours = [run(kernel, *one) for one in story.passes][-1]
    assert {x.dtype for x in ours} == {torch.bfloat16}
    assert difference(ours, story.expected()[-1]) <= 2e-2


# -- where entries wait -----------------------------------------------------------------------------------------------


def entry_numbers(sizes: Sizes, frames: int) -> int:
    """Keys and values of an entry, counted in heads of one token."""
    return LAYERS * 2 * sizes.batch * sizes.count * frames * PER_FRAME


@pytest.mark.parametrize("text", TEXTS)
def test_host_memory_gives_the_same_bits(text: str) -> None:
    story = Story(sizes=Sizes(**TEXTS[text]))
    here, there = kernel_of(WAN), kernel_of(WAN, Storage.HOST)
    for one in story.passes:
        assert all(map(torch.equal, run(here, *one), run(there, *one)))


@pytest.mark.parametrize(
    ("storage", "dtype", "width_bytes"),
    [
        (Storage.DEVICE, torch.float32, 4 * 128),
        (Storage.HOST, torch.float32, 4 * 128),
        (Storage.DEVICE, torch.bfloat16, 2 * 128),
        (Storage.INT8, torch.float32, 128 + 4),  # about a quarter: one scale for each token and head
        (Storage.INT8, torch.bfloat16, 128 + 4),
    ],
)
def test_what_waits_takes_as_much_memory_as_it_says(storage: Storage, dtype: torch.dtype, width_bytes: int) -> None:
    sizes = Sizes(dtype=dtype, text=5, shown=(5, 2))
    story, kernel = Story(sizes=sizes), kernel_of(WAN, storage)
    held = []
    for one in story.passes:
        run(kernel, *one)
        held.append(kernel.nbytes)
    assert held == [entry_numbers(sizes, 2) * width_bytes, entry_numbers(sizes, 3) * width_bytes, 0]


def quantized(rows: torch.Tensor) -> torch.Tensor:
    """[..., D] float32 in 127 levels each way, a scale for each row."""
    scale = rows.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(scale > 0, rows / scale, 0.0).round() * scale


@pytest.mark.parametrize("heads", HEADS)
def test_eight_bits_round_to_the_nearest_of_255_levels(heads: str) -> None:
    sizes = Sizes(heads=HEADS[heads])
    story, kernel = Story(sizes=sizes), kernel_of(sizes.heads, Storage.INT8)
    ours, expected = [run(kernel, *one) for one in story.passes][-1], []
    for layer in range(LAYERS):
        query, key, value = story.own.raw(layer)
        pairs = [(story.own.placed(key, 0), value)]
        for seen, take in zip(story.seen, story.takes, strict=True):
            rows = slice(seen.first * PER_FRAME, seen.stop * PER_FRAME)
            _, keys, values = (quantized(x[:, :, rows]) for x in seen.window.parts(layer))
            pairs.append((turn(keys.double(), take.turned, sizes.heads.rotation), values.double()))
        expected.append(softmax(story.own, story.own.placed(query, 0), pairs))
    assert difference(ours, expected) <= TOLERANCE
    assert 1e-4 < difference(ours, story.expected()[-1]) < 2e-2  # lossy, and not very


def test_eight_bits_are_wrong_by_half_a_level_at_most() -> None:
    """A query of zeros weighs all keys alike, so it returns the mean of the values."""
    sizes = Sizes(count=3)
    before, own = (Window(sizes=sizes, frames=frames, seed=frames) for frames in (2, 1))
    kernel = kernel_of(WAN, Storage.INT8)
    run(kernel, before, keeps=[keep("all", 0, 2)])
    kernel.begin((Take(entry="all", turned=-2),), ())
    for layer in range(LAYERS):
        query, key, value = own.parts(layer)
        ours = kernel(torch.zeros_like(query), key, value)[:, :, 0]
        theirs = before.parts(layer)[2]
        exact = torch.cat([value, theirs], dim=2).double().mean(dim=2)
        steps = theirs.double().abs().amax(dim=-1) / 127
        bound = (steps / 2).sum(dim=2) / (own.tokens + before.tokens) + 1e-6
        assert ((ours - exact).abs() <= bound[..., None]).all()
        assert (ours - exact).abs().max() > 1e-5
    kernel.finish()


def test_rows_of_zeros_stay_zeros_in_eight_bits() -> None:
    kernel, rows = kernel_of(WAN, Storage.INT8), torch.zeros(1, 2, PER_FRAME, 128)
    kernel.begin((), (keep("zeros", 0, 1),))
    kernel(rows, rows, rows)
    kernel.finish()
    kernel.begin((Take(entry="zeros", turned=-1),), ())
    assert torch.equal(kernel(rows, rows, rows + 1), torch.full_like(rows, 0.5))
    kernel.finish()


# -- each entry is read once ------------------------------------------------------------------------------------------


def left_by(window: Window, entry: str = "tail") -> ContextAttention:
    kernel = kernel_of(window.sizes.heads)
    run(kernel, window, keeps=[keep(entry, 0, 1)])
    return kernel


OWN = Window(sizes=Sizes(), frames=2, seed=1)
TAKE = Take(entry="tail", turned=-1)


def test_an_entry_cannot_be_read_twice() -> None:
    kernel = left_by(OWN)
    assert kernel.entries == {"tail"}
    run(kernel, OWN, [TAKE])
    assert not kernel.entries
    with pytest.raises(AssertionError, match="nobody has left tail, or it was read before"):
        kernel.begin((TAKE,), ())
    with pytest.raises(AssertionError, match="nobody has left tail"):
        left_by(OWN).begin((TAKE, TAKE), ())


def test_an_entry_cannot_be_left_over_one_that_waits() -> None:
    kernel = left_by(OWN)
    with pytest.raises(AssertionError, match="nobody has read tail"):
        run(kernel, OWN, keeps=[keep("tail", 0, 1)])


def test_an_entry_may_be_left_by_who_reads_its_forerunner() -> None:
    kernel = left_by(OWN)
    run(kernel, OWN, [TAKE], [keep("tail", 1, 2)])
    assert kernel.entries == {"tail"}
    other = dataclasses.replace(OWN, seed=7)
    seen = Seen(window=OWN, first=1, stop=2, place=0)
    assert difference(run(kernel, other, [TAKE]), [formula(other, n, [seen]) for n in range(LAYERS)]) <= TOLERANCE


def test_forward_passes_do_not_overlap_and_have_a_beginning() -> None:
    kernel = kernel_of(WAN)
    with pytest.raises(AssertionError, match="no forward pass has begun"):
        kernel(*OWN.parts(0))
    kernel.begin((), ())
    with pytest.raises(AssertionError, match="has not finished"):
        kernel.begin((), ())


@pytest.mark.parametrize("attentions", [LAYERS - 1, LAYERS + 1])
def test_as_many_attentions_read_an_entry_as_have_left_it(attentions: int) -> None:
    kernel = left_by(OWN)
    kernel.begin((TAKE,), ())
    with pytest.raises(AssertionError, match="attentions"):  # noqa: PT012 - one too many fails, one too few at the end
        for layer in range(attentions):
            kernel(*OWN.parts(layer))
        kernel.finish()


def test_abandoning_drops_everything_in_the_middle_too() -> None:
    kernel = left_by(OWN)
    run(kernel, OWN, keeps=[keep("other", 0, 2)])
    kernel.begin((TAKE,), (keep("new", 0, 1),))
    kernel(*OWN.parts(0))
    kernel.abandon()
    assert not kernel.entries and kernel.nbytes == 0
    assert difference(run(kernel, OWN), [formula(OWN, layer, ()) for layer in range(LAYERS)]) <= TOLERANCE
    assert not kernel.entries


def test_forgetting_drops_what_is_over() -> None:
    kernel = kernel_of(WAN)
    run(kernel, OWN, keeps=[keep("a", 0, 1), keep("b", 0, 2)])
    kernel.forget(lambda entry: entry == "b")
    assert kernel.entries == {"a"}


# -- ranks that share the heads ---------------------------------------------------------------------------------------

Job = tuple[ParallelConfig, Story]
Results = list[list[torch.Tensor]]  # of each pass and layer, [B, n, S + T, D]


def spread(runtime: ParallelRuntime, window: Window, layer: int) -> torch.Tensor:
    """One attention of all ranks; the whole result."""
    rows = [part.transpose(1, 2) for part in window.parts(layer)]
    latents, text = [x[:, : window.tokens] for x in rows], [x[:, window.tokens :] for x in rows]
    call = GivenCall([runtime.shard(x, 1) for x in latents], text, window.sizes.shown_text)
    own, own_text = torch.full_like(runtime.shard(latents[0], 1), torch.nan), torch.full_like(text[0], torch.nan)
    for result in runtime.attend(call):
        own[:, :, result.heads] = result.latents
        if result.text is not None:
            own_text[:, :, result.heads] = result.text
    return torch.cat([runtime.gather(own, 1), own_text], dim=1).transpose(1, 2)


def tell(runtime: ParallelRuntime, story: Story) -> Results:
    kernel, results = kernel_of(story.sizes.heads), []
    runtime.take_keys_from(kernel)
    for window, takes, keeps in story.passes:
        kernel.begin(takes, keeps)
        runtime.begin_forward(window.tokens)
        results.append([spread(runtime, window, layer) for layer in range(LAYERS)])
        kernel.finish()
    assert not kernel.entries
    return results


def tell_together(rank: int, world_size: int, jobs: Sequence[Job]) -> list[Results]:
    results = []
    for config, story in jobs:
        runtime = make_runtime(rank, world_size)
        runtime.use(config)
        results.append(tell(runtime, story))
        runtime.close()
    return results


def alone() -> ParallelRuntime:
    def open_nothing(*_: Any) -> Any:
        raise AssertionError("a rank alone talks to nobody")

    return ParallelRuntime(ranks=(0,), rank=0, device="cpu", open_channel=open_nothing)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("heads", HEADS)
def test_a_rank_alone_takes_keys(heads: str, text: str) -> None:
    story = Story(sizes=Sizes(heads=HEADS[heads], **TEXTS[text]))
    for ours, expected in zip(tell(alone(), story), story.expected(), strict=True):
        assert difference(ours, expected) <= TOLERANCE


def test_two_ranks_take_the_keys_of_their_heads(gloo: Group) -> None:
    """In as many calls as there are chunks; tried out is none. Of three heads, a rank has none in the last chunk."""
    jobs = [
        (ParallelConfig(ulysses_degree=2, pipesp_chunks=chunks), Story(sizes=Sizes(heads=heads, count=count, **text)))
        for chunks, count, heads, text in (
            (1, 4, WAN, {}),
            (1, 4, HUNYUAN, TEXTS["masked"]),
            (2, 4, WAN, {}),
            (2, 4, HUNYUAN, TEXTS["text"]),
            (2, 3, HUNYUAN, TEXTS["masked"]),
            (3, 7, WAN, {}),
            ("auto", 4, HUNYUAN, TEXTS["text"]),
        )
    ]
    for results in gloo(2).run(tell_together, jobs):
        for (config, story), ours in zip(jobs, results, strict=True):
            for one, other, expected in zip(ours, tell(alone(), story), story.expected(), strict=True):
                assert difference(one, [x.double() for x in other]) <= 1e-6, (config, story)
                assert difference(one, expected) <= TOLERANCE, (config, story)


def refusals(rank: int, world_size: int) -> list[str]:
    """What is said to a kernel in ring attention, to ring attention with a kernel, and to helpers."""
    ring, plain = ParallelConfig(ring_degree=world_size), ParallelConfig(ulysses_degree=world_size)
    helped = Aco(helpers=((world_size,),), heads=(1,) * (world_size + 1), text_tokens=(0,))
    said, runtime = [], make_runtime(rank, world_size)
    runtime.use(ring)
    with pytest.raises(InvalidRequestError) as error:
        runtime.take_keys_from(kernel_of(WAN))
    said.append(str(error.value))
    runtime.use(plain)
    runtime.take_keys_from(kernel_of(WAN))
    for config, aco in ((ring, None), (plain, helped)):
        with pytest.raises(InvalidRequestError) as error:
            runtime.use(config, aco=aco)
        said.append(str(error.value))
    assert runtime.config == plain
    runtime.close()
    return said


def test_ring_attention_and_helpers_are_refused_whoever_comes_first(gloo: Group) -> None:
    ring = "ring attention cannot take keys of other blocks; use Ulysses"
    for first, second, third in gloo(2).run(refusals):
        assert first == second == ring
        assert third == "helpers have no keys of other blocks; leave attention co-processing off"
