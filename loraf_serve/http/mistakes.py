"""Everything that is wrong with a request, whoever finds it, as one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from loraf.errors import LorafError, Problem, UnknownTask
from loraf_serve.errors import InvalidRequest
from loraf_serve.http.errors import OnlyVllm
from loraf_serve.http.fields import MOST_PROBLEMS

_KINDS = (OnlyVllm, InvalidRequest, UnknownTask)  # if the body can be read, the first that there is gives the status
# Field → those whose wrong value makes its range unknown.
_DEPENDS = {"min_tokens": ("max_tokens", "max_completion_tokens")}


class Mistakes:
    """Collects errors of one request.

    Args:
        of_body: what reading the body has found. What is found later about one of these fields, or about a part of one,
            is left out: the field could not be read.
        shown: an error → what the client may know of it, with the fields of the body.

    Attributes:
        told: the error that `require_none` has raised; its fields are those of the body.
    """

    told: LorafError | None = None

    def __init__(self, of_body: Iterable[Problem], shown: Callable[[LorafError], LorafError]):
        self._problems = list(of_body)
        self._unread = tuple(problem.field for problem in self._problems)
        self._is_malformed = bool(self._problems)
        self._kinds: set[type[LorafError]] = set()
        self._shown = shown

    @property
    def are_enough(self) -> bool:
        """Whether there are so many that no more need be found."""
        return len(self._problems) >= MOST_PROBLEMS

    @contextmanager
    def gathered(self, is_unread: bool = False) -> Iterator[None]:
        """Takes the error that the context raises, unless it is more than a mistake in the request.

        Args:
            is_unread: its fields could not be read.
        """
        try:
            yield
        except _KINDS as error:
            self.add(error)
            if is_unread:
                self._unread += tuple(problem.field for problem in self._shown(error).problems)

    def add(self, error: LorafError) -> None:
        """Adds the problems of an error, with fields of a gRPC request."""
        for problem in self._shown(error).problems:
            if problem not in self._problems and not self.is_unread(problem.field):
                self._problems.append(problem)
                self._kinds.add(type(error))

    def require_none(self) -> None:
        """Raises InvalidRequest, OnlyVllm or UnknownTask, with all problems."""
        if self._problems:
            kind = InvalidRequest if self._is_malformed else next(kind for kind in _KINDS if kind in self._kinds)
            self.told = kind(self._problems[:MOST_PROBLEMS])
            raise self.told

    def is_unread(self, field: str) -> bool:
        """Whether a field could not be read, or a part of it."""
        return any(
            _is_within(field, unread) or _is_within(unread, field) or unread in _DEPENDS.get(field, ())
            for unread in self._unread
        )


def _is_within(field: str, other: str) -> bool:
    """Whether a field is another one or a part of it."""
    return bool(other) and (field == other or field.startswith((f"{other}.", f"{other}[")))
