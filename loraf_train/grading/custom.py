"""A metric of the user's own: `metric: module:function` (or `module.function`) in tasks.yaml.

    def grade(answer: str, record: Mapping[str, Any]) -> bool | float

`answer` is the generated text without special tokens, and of a conversation without thoughts; `record` is the
evaluation record with all fields, as read. True and False count as 1 and 0, a number must be from 0 to 1; single values
of numpy and torch are accepted. The score of an evaluation set is the mean over its examples, and higher is better.

`module` is a .py file next to the tasks.yaml, or any importable module. Only commands that read a tasks.yaml import it,
never those that read a checkpoint. Stored scores are measured again when the name changes or the module's code does; a
change in another module that it imports goes unnoticed.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

Grade = Callable[[str, Mapping[str, Any]], Any]
SIGNATURE = "def grade(answer: str, record: Mapping) -> bool | float"
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*(\.[^\W\d]\w*)*")
_FROM_0_TO_1 = "return True, False or a number from 0 to 1"


class MetricFault(Exception):
    """A function that cannot be loaded, or does not behave like a metric."""

    def __init__(self, message: str, remedy: str):
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def is_name(text: str) -> bool:
    """Whether a text has the form of a dotted name."""
    return _NAME.fullmatch(text) is not None


def find(name: str, folder: Path) -> Grade:
    """Returns the function of a name.

    Args:
        folder: of the tasks.yaml. A file there takes precedence over any other module of its name.

    Raises:
        MetricFault: there is no such module or function, importing it fails, or it does not take two arguments.
    """
    module, _, attribute = name.partition(":" if ":" in name else ".")
    file = folder / f"{module}.py"
    try:
        if file.is_file():
            target: Any = _run_file(file, folder)
        else:
            module, attribute = name.rpartition(":" if ":" in name else ".")[::2]
            target = pkgutil.resolve_name(name)
    except AttributeError as error:
        if file.is_file():
            raise _import_fault(module, error, file) from None
        raise MetricFault(f"{name} does not exist ({error})", "name a function of the module") from None
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise MetricFault(f"there is no module {module}", f"write {file}, or install it") from None
        raise _import_fault(module, error, file) from None
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise _import_fault(module, error, file) from None
    for part in attribute.split(".") if file.is_file() else ():
        if not hasattr(target, part):
            raise MetricFault(f"there is no {attribute} in {file}", "name a function in it")
        target = getattr(target, part)
    return _checked(name, target)


def code_digest(grade: Grade) -> str:
    """Returns the SHA-256 (hex) of the source of the function's module; empty if there is none to read."""
    try:
        module = inspect.getmodule(inspect.unwrap(grade))
        return hashlib.sha256(inspect.getsource(module or grade).encode()).hexdigest()
    except (OSError, TypeError):
        return ""


def _checked(name: str, target: Any) -> Grade:
    if not callable(target):
        raise MetricFault(f"{name} is not a function but of type {type(target).__name__}", f"write {SIGNATURE}")
    try:
        inspect.signature(target).bind("", {})
    except TypeError as error:
        raise MetricFault(
            f"{name} cannot be called with an answer and a record ({error})", f"write {SIGNATURE}"
        ) from None
    except ValueError:
        pass  # a C function without a signature
    return target  # type: ignore[no-any-return] # the user's code may be untyped


def _run_file(file: Path, folder: Path) -> ModuleType:
    """Returns the module of a file, run once per content, and separate from other modules of its name.

    While it is imported, it can import its neighbours in `folder`.
    """
    name = f"_loraf_metric_{hashlib.sha256(bytes(file.absolute()) + file.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # given for every file whose name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and others expect this of a module that is being imported
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(folder))
    return module


def _import_fault(module: str, error: BaseException, file: Path) -> MetricFault:
    return MetricFault(f"importing {module} fails ({_describe_exception(error, file)})", "fix the module")


def graded(grade: Grade, answer: str, record: Mapping[str, Any]) -> float:
    """Returns the score of one answer.

    Raises:
        MetricFault: the function raises, or does not return a number from 0 to 1.
    """
    try:
        score = grade(answer, record)
        if not isinstance(score, numbers.Real) and hasattr(score, "item"):
            score = score.item()
    except Exception as error:  # the user's code may raise anything
        reason = _describe_exception(error)
        raise MetricFault(f"the metric fails on this record ({reason})", "fix the function, or the record") from None
    if not isinstance(score, numbers.Real) or not math.isfinite(score) or not 0 <= float(score) <= 1:
        raise MetricFault(f"the metric returns {score!r:.60} for this record", _FROM_0_TO_1)
    return float(score)


def _describe_exception(error: BaseException, file: Path | None = None) -> str:
    """Returns type and text of an exception, and the line it came from; of `file` if given, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if file is None or f.filename == str(file)), None)
    where = f", {Path(place.filename).name} line {place.lineno}" if place else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text:.200}{where}"
