"""What `pipedit doctor --num-workers N` adds: every way in which N workers can share the model's default video."""

import dataclasses
import shlex
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import EMBEDDED, open_model, open_published
from pipedit.plan.degrees import DegreeRow, Wanted, choose, degree_problems, legal_configs

_RULES = (
    "The degrees multiply to the number of workers; heads and tokens need not come out even. Guidance (cfg) comes\n"
    "first, then Ulysses, a ring for the rest. Requests without guidance cannot use cfg 2. What a ring costs was\n"
    "measured elsewhere (TensorRT-LLM on NVL72) and is more on slower links."
)


_TWO_GROUPS = (
    "With several prompts, some workers can decode while the others denoise: add --strategy disaggregated. What pays\n"
    "depends on model and machine: pipedit plan predicts it."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Degrees:
    """The ways to share the model's default request, best first; `chosen` is what runs if no degree is given, None
    where nothing can."""

    model: str
    num_workers: int
    heads: int
    tokens: int
    uses_guidance: bool
    rows: tuple[DegreeRow, ...]
    chosen: ParallelConfig | None
    problems: tuple[str, ...]

    @property
    def command(self) -> str | None:
        """The command line that runs the chosen way, degrees spelled out."""
        if self.chosen is None:
            return None
        model = "" if self.model == EMBEDDED else f" --model {shlex.quote(self.model)}"
        return (
            f'pipedit generate "PROMPT"{model} --num-workers {self.num_workers} --cfg-degree {self.chosen.cfg_degree} '
            f"--ring-degree {self.chosen.ring_degree} --ulysses-degree {self.chosen.ulysses_degree}"
        )

    def as_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("num_workers", "heads", "tokens", "uses_guidance")}
        return {
            **own,
            "combinations": [self._row_as_json(row) for row in self.rows],
            "problems": list(self.problems),
            "command": self.command,
        }

    def _row_as_json(self, row: DegreeRow) -> dict[str, Any]:
        config = row.config
        return {
            "cfg_degree": config.cfg_degree,
            "ring_degree": config.ring_degree,
            "ulysses_degree": config.ulysses_degree,
            "legal": row.is_legal,
            "chosen": config == self.chosen,
            "reason": row.reason,
            "note": row.note,
            "balance": row.balance,
        }


def check_num_workers(num_workers: int | None) -> None:
    """Raises InvalidRequestError for a number that no model can have."""
    if num_workers is not None and (problems := degree_problems(Wanted(), num_workers)):
        raise InvalidRequestError(problems)


def examine_degrees(model: str, num_workers: int) -> Degrees | None:
    """From configs alone; None for a model that cannot be opened."""
    adapter = _adapter(model)
    if adapter is None:
        return None
    request = adapter.complete(VideoRequest(prompt=""))
    heads, guided = adapter.heads, adapter.uses_guidance(request)
    tokens = adapter.token_layout(request).latent_tokens
    problems = degree_problems(Wanted(), num_workers, heads, guided, tokens)
    return Degrees(
        model=model,
        num_workers=num_workers,
        heads=heads,
        tokens=tokens,
        uses_guidance=guided,
        rows=tuple(legal_configs(num_workers, heads, guided, tokens)),
        chosen=None if problems else choose(Wanted(), num_workers, heads, guided, tokens),
        problems=tuple(problems),
    )


def _adapter(model: str) -> ModelAdapter | None:
    """Published models are known without their files."""
    try:
        return open_model(model)
    except (InvalidRequestError, CheckpointError):
        pass
    try:
        return open_published(model)
    except InvalidRequestError:
        return None


def degree_table(degrees: Degrees) -> RenderableType:
    guidance = "with guidance" if degrees.uses_guidance else "without guidance"
    workers = "1 worker" if degrees.num_workers == 1 else f"{degrees.num_workers} workers"
    title = Text(
        f"\n{workers}, {degrees.model}'s default video: {degrees.heads} heads, {degrees.tokens} tokens, {guidance}",
        style="bold",
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("cfg", "ring", "ulysses", "balance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("how it comes out", overflow="fold")
    for row in degrees.rows:
        table.add_row(*_cells(row, is_chosen=row.config == degrees.chosen))
    last = [Text(problem, style="bold red") for problem in degrees.problems]
    if degrees.command is not None:
        last.append(Text.assemble(("take the first: ", "bold cyan"), degrees.command))
    if degrees.num_workers > 1:
        last.append(Text(_TWO_GROUPS, style="dim"))
    return Group(title, table, Text(_RULES, style="dim"), *last)


def _cells(row: DegreeRow, *, is_chosen: bool) -> tuple[Text | str, ...]:
    config = row.config
    degrees = (str(config.cfg_degree), str(config.ring_degree), str(config.ulysses_degree))
    if not row.is_legal:
        return (Text("no", style="red"), *degrees, "", Text(row.reason, style="dim"))
    mark = Text("chosen", style="bold green") if is_chosen else Text("ok", style="green")
    return (mark, *degrees, f"{row.balance * 100:.0f} %", row.note)
