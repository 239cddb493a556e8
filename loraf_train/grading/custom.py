"""A metric of the user's own: `metric: module:function` (or `module.function`) in tasks.yaml.

    def grade(answer: str, record: Mapping[str, Any]) -> bool | float

`answer` is the generated text without special tokens, `record` the evaluation record as it was read, all its fields.
True and False count 1 and 0, a number must be from 0 to 1; the score of an evaluation set is the mean over all its
examples, higher is better. numpy's and torch's single values are taken too.

`module` is a .py file beside the tasks.yaml, or anything that Python finds. Only commands that read a tasks.yaml import
it; of a checkpoint it is never imported, which keeps no more than its name beside each score. Stored scores are
measured again when the name changes, not when the function does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import numbers
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError

if TYPE_CHECKING:
    from loraf_train.data.examples import EvaluationExample

Grade = Callable[[str, Mapping[str, Any]], Any]
SIGNATURE = "def grade(answer: str, record: Mapping) -> bool | float"
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*(\.[^\W\d]\w*)*")
_FROM_0_TO_1 = "let it return True, False or a number from 0 to 1"


class MetricFault(Exception):
    """A function that cannot be had, or does not do what a metric does."""

    def __init__(self, message: str, remedy: str):
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def is_name(text: str) -> bool:
    """Whether it has the form of a dotted name."""
    return _NAME.fullmatch(text) is not None


def find(name: str, folder: Path) -> Grade:
    """The function of that name.

    Args:
        folder: of the tasks.yaml. A file there comes before anything else that has its name.

    Raises:
        MetricFault: there is no such module or function, importing it fails, or it does not take two arguments.
    """
    module, _, attribute = name.partition(":" if ":" in name else ".")
    file = folder / f"{module}.py"
    try:
        if file.is_file():
            found: Any = _run_file(file, folder)
        else:
            module, attribute = name.rpartition(":" if ":" in name else ".")[::2]
            found = pkgutil.resolve_name(name)
    except AttributeError as error:
        if file.is_file():
            raise _not_imported(module, error, file) from None
        raise MetricFault(f"{name} is not there ({error})", "name a function of the module") from None
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise MetricFault(f"there is no module {module}", f"write {file}, or install it") from None
        raise _not_imported(module, error, file) from None
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise _not_imported(module, error, file) from None
    for part in attribute.split(".") if file.is_file() else ():
        if not hasattr(found, part):
            raise MetricFault(f"there is no {attribute} in {file}", "name a function of it")
        found = getattr(found, part)
    if not callable(found):
        raise MetricFault(f"{name} is no function but {type(found).__name__}", f"write {SIGNATURE}")
    try:
        inspect.signature(found).bind("", {})
    except TypeError as error:
        raise MetricFault(
            f"{name} cannot be called with an answer and a record ({error})", f"write {SIGNATURE}"
        ) from None
    except ValueError:
        pass  # a function in C that does not tell what it takes
    return found


def _run_file(file: Path, folder: Path) -> ModuleType:
    """The module of a file, once for what it holds now, apart from other modules of its name. Modules beside it are
    found while it is imported."""
    name = f"_loraf_metric_{hashlib.sha256(bytes(file.absolute()) + file.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and others expect of a module that is being imported
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(folder))
    return module


def _not_imported(module: str, error: BaseException, file: Path) -> MetricFault:
    return MetricFault(f"importing {module} fails ({_told(error, file)})", "mend it")


def graded(grade: Grade, answer: str, record: Mapping[str, Any]) -> float:
    """One answer's score.

    Raises:
        MetricFault: the function raises, or gives something else than a number from 0 to 1.
    """
    try:
        found = grade(answer, record)
        if not isinstance(found, numbers.Real) and hasattr(found, "item"):
            found = found.item()
    except Exception as error:  # whatever the user's code does
        raise MetricFault(f"the metric fails on it ({_told(error)})", "mend the function, or the record") from None
    if not isinstance(found, numbers.Real) or not math.isfinite(found) or not 0 <= found <= 1:
        raise MetricFault(f"the metric gives {found!r:.60} for it", _FROM_0_TO_1)
    return float(found)


def mean_grade(grade: Grade, answers: Sequence[str], examples: Iterable[EvaluationExample]) -> float:
    """The mean score of an evaluation set.

    Raises:
        ConfigError: the first records on which the function fails, with their numbers.
    """
    from loraf_train.data.records import Faults

    total, by_source = 0.0, {}
    for answer, example in zip(answers, examples, strict=True):
        try:
            total += graded(grade, answer, example.record)
        except MetricFault as fault:
            faults = by_source.setdefault(example.source, Faults(example.source))
            faults.add(f"record {example.number}", fault.message, fault.remedy)
    if by_source:
        raise ConfigError(problem for faults in by_source.values() for problem in faults.problems)
    return total / len(answers)


def _told(error: BaseException, file: Path | None = None) -> str:
    """The exception, and the line of the user's own file where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if file is None or f.filename == str(file)), None)
    where = f", {Path(place.filename).name} line {place.lineno}" if place else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text:.200}{where}"
