"""What a family reads from a component's config, and what is wrong with a config that lacks it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pipedit.core.errors import CheckpointError
from pipedit.models.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigNeeds:
    """Names of values by their kind; lists hold whole numbers or booleans. Optional ones may be null or missing."""

    integers: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    optional_integers: tuple[str, ...] = ()
    optional_lists: tuple[str, ...] = ()
    optional_numbers: tuple[str, ...] = ()

    def problems(self, config: Mapping[str, Any]) -> list[str]:
        """What is missing or of another kind, a few words each."""
        found = [f"{name} is missing" for name in (*self.integers, *self.lists) if config.get(name) is None]
        kinds: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
            ((*self.integers, *self.optional_integers), _is_count, "a whole number of at least 1"),
            ((*self.lists, *self.optional_lists), _is_list, "a list of whole numbers"),
            (self.optional_numbers, is_number, "a number"),
        )
        for names, fits, kind in kinds:
            values = {name: config[name] for name in names if config.get(name) is not None}
            found += [f"{name}={value!r} should be {kind}" for name, value in values.items() if not fits(value)]
        return found


def config_problems(checkpoint: Checkpoint, needs: Mapping[str, ConfigNeeds]) -> list[str]:
    """One sentence for each component whose config is missing, unreadable, or not what is needed."""
    problems = []
    for component, need in needs.items():
        try:
            found = need.problems(checkpoint.config(component))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if found:
            problems.append(f"the config in {checkpoint.path(component)} is not usable: {', '.join(found)}")
    return problems


def is_number(value: Any) -> bool:
    """A number as JSON knows it; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, int) for item in value)
