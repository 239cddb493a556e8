"""Gives a million changed checkpoints to the loader that the server uses.

    python benchmarks/mutated_checkpoints.py               writes results/mutated-checkpoints.json, now and then too
    python benchmarks/mutated_checkpoints.py --replay HEX  tells what one mutant is, and what happens to it

A mutant is made from 160 bytes (tests/loraf/mutants.py). For some of them, atheris searches those bytes, guided by the
lines of loraf that they reach; the others are drawn at random. What must happen stands in
tests/loraf_serve/adapters/judged_loads.py: an error that names a file of the checkpoint, or a load whose ΔW is that
of a slow reader which shares nothing with loraf.

The loads run in a worker process, on one thread, and a watchdog watches it. A worker that dies or takes longer than
HANG seconds is a finding, and another one goes on after that mutant. Exit status 1: there were findings.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import platform
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "mutated-checkpoints.json"
INPUT = 160  # bytes of a mutant
HANG = 30.0  # seconds; more than the bound of a load, since other processes may hold the processor
REPORT = 30.0  # seconds between two writings of the result
LISTED = 20  # findings that are kept of each kind of worker
PLACE = struct.Struct("<QdI")  # mutants begun, when the last was, bytes of it; then those bytes
SHARED = 4096
INSTRUMENTED = ["loraf", "loraf_serve.adapters"]


class Progress:
    """What a worker is doing, in memory that survives it."""

    def __init__(self, file: Path):
        if not file.exists():
            file.write_bytes(bytes(SHARED))
        with open(file, "r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), SHARED)

    def begin(self, number: int, data: bytes) -> None:
        PLACE.pack_into(self._memory, 0, number, time.monotonic(), len(data))
        self._memory[PLACE.size : PLACE.size + len(data)] = data

    def read(self) -> tuple[int, float, bytes]:
        number, began, size = PLACE.unpack_from(self._memory)
        return number, began, self._memory[PLACE.size : PLACE.size + size]


class Tally:
    """What has happened, in a file that is written now and then."""

    def __init__(self, file: Path):
        self._file = file
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def count(self, of: str, key: str) -> None:
        part = self.content.setdefault(of, {})
        part[key] = part.get(key, 0) + 1

    def largest(self, of: str, value: float) -> None:
        self.content[of] = max(self.content.get(of, 0), value)

    def finding(self, fault: str, kinds: list[str], data: bytes) -> None:
        self.content["faults"] = self.content.get("faults", 0) + 1
        findings = self.content.setdefault("findings", [])
        if len(findings) < LISTED and fault[:60] not in {finding["fault"][:60] for finding in findings}:
            findings.append({"fault": fault, "kinds": kinds, "input": data.hex()})

    def write(self) -> None:
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content))
        temporary.replace(self._file)


# --- the worker -----------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Judges mutants number `first` and following, `cases` in all or until `seconds` are over."""
    folder = options.folder
    if options.worker == "guided":
        import atheris

        with atheris.instrument_imports(include=INSTRUMENTED):
            from tests.loraf_serve.adapters import judged_loads
    else:
        from tests.loraf_serve.adapters import judged_loads
    import torch

    from loraf import system

    torch.set_num_threads(1)
    system.processors = lambda: 1  # no threads: they cost more than such a small load
    world = judged_loads.World(Path(tempfile.mkdtemp(dir=folder)) / "world")
    tally, progress = Tally(folder / "tally.json"), Progress(folder / "progress")
    for number in range(200):  # imports and caches count neither as time nor as memory
        world.judge(random.Random(f"warm {number}").randbytes(INPUT))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (taken + judged_loads.ADDRESSES, resource.RLIM_INFINITY))
    first_memory, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + options.seconds
    number, last = options.first, options.first + options.cases

    def one(data: bytes) -> None:
        nonlocal number
        progress.begin(number, data)
        made, verdict = world.judge(data)
        number += 1
        tally.count("outcomes", verdict.outcome)
        tally.content["cases"] = number
        for kind in made.kinds:
            tally.count(f"loaded of {kind}" if verdict.outcome == "loaded" else f"refused of {kind}", "all")
        for check in verdict.checks:
            tally.count("checks", check)
        if verdict.slow_reads:
            for check in verdict.checks:
                tally.count("refused, though within the described format", check)
        if verdict.fault:
            tally.finding(verdict.fault, made.kinds, data)
        tally.largest("slowest load, seconds of processor time", round(verdict.seconds, 3))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first_memory
        tally.largest("memory beyond the start, MB", round(grown / 1024, 1))
        if number == last or number % 1000 == 0 or time.monotonic() > end:
            tally.write()

    if options.worker == "random":
        while number < last and time.monotonic() < end:
            one(random.Random(f"{options.seed}/{number}").randbytes(INPUT))
        tally.write()
        return
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        for i in range(50):
            (corpus / str(i)).write_bytes(random.Random(f"corpus {options.seed}/{i}").randbytes(INPUT))

    def guided(data: bytes) -> None:
        if number < last and time.monotonic() < end:
            one(data)
        else:
            tally.write()
            (folder / "ended").touch()
            os._exit(0)

    limits = ["-runs=-1", f"-max_len={INPUT}", "-timeout=3600", "-rss_limit_mb=0", "-verbosity=0"]
    limits.append(f"-artifact_prefix={folder}/")
    seed = int.from_bytes(random.Random(f"{options.seed}/{number}").randbytes(3), "little") + 1
    atheris.Setup([sys.argv[0], *limits, f"-seed={seed}", str(corpus)], guided)
    atheris.Fuzz()


# --- the watchdog ---------------------------------------------------------------------------------------------------


def watch(
    kind: str, cases: int, seconds: float, seed: int, folder: Path, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs workers of one kind until the mutants or the time are used up. Returns their tally.

    Args:
        report: called with the tally every REPORT seconds.
    """
    folder.mkdir()
    progress, began, deaths = Progress(folder / "progress"), time.monotonic(), []
    first, reported = 0, began

    def tally_now() -> dict[str, Any]:
        tally = Tally(folder / "tally.json").content
        tally["findings"] = [*tally.get("findings", []), *deaths]
        tally["faults"] = tally.get("faults", 0) + len(deaths)
        tally["seconds"] = round(time.monotonic() - began, 1)
        for counts in ("outcomes", "checks", "refused, though within the described format"):
            tally[counts] = sort_counts(tally.get(counts, {}))
        return by_kind(tally)

    while first < cases and (left := seconds - (time.monotonic() - began)) > 0:
        arguments = ["--worker", kind, "--first", str(first), "--cases", str(cases - first), "--seed", str(seed)]
        command = [sys.executable, __file__, *arguments, "--seconds", str(left), "--folder", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(folder / "log", "ab") as log:
            worker = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        fault = ""
        while worker.poll() is None:
            time.sleep(0.5)
            if time.monotonic() - reported > REPORT:
                reported = time.monotonic()
                report(tally_now())
            number, last, data = progress.read()
            if last and time.monotonic() - last > HANG and worker.poll() is None and not fault:
                fault = f"took more than {HANG:.0f} s"
                worker.kill()
        number, _, data = progress.read()
        if worker.returncode == 0:
            break
        if not fault:
            died = worker.returncode < 0
            fault = f"killed the process ({signal.Signals(-worker.returncode).name})" if died else "ended the process"
        deaths.append({"fault": fault, "kinds": [], "input": data.hex(), "log": log_end(folder / "log")})
        if len(deaths) >= LISTED:
            break
        first = number + 1
    return tally_now()


def log_end(file: Path) -> str:
    return file.read_text(errors="replace")[-2000:]


def by_kind(tally: dict[str, Any]) -> dict[str, Any]:
    """Moves the counts of each kind of change into one table."""
    kinds: dict[str, dict[str, int]] = {}
    for key in [key for key in tally if key.startswith(("loaded of ", "refused of "))]:
        outcome, _, kind = key.partition(" of ")
        kinds.setdefault(kind, {})[outcome] = tally.pop(key)["all"]
    return tally | {"kinds of change": dict(sorted(kinds.items()))}


def sort_counts(counts: dict[str, int], most: int = 100) -> dict[str, int]:
    return dict(Counter(counts).most_common(most))


def campaign(options: argparse.Namespace) -> dict[str, Any]:
    guided = find_spec("atheris") is not None
    if not guided:
        print("atheris is not installed: all mutants are drawn at random")
    results: dict[str, Any] = {}
    memory, end = "/dev/shm" if os.path.isdir("/dev/shm") else None, time.monotonic() + options.seconds

    def keep(kind: str, tally: dict[str, Any]) -> None:
        results[kind] = tally
        if options.out != "-":
            text = json.dumps(record(options, results), indent=1, ensure_ascii=False)
            Path(options.out).write_text(text + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(dir=memory) as name:
        left = options.cases
        for kind in ("guided", "random") if guided else ("random",):
            cases = int(left * options.guided) if kind == "guided" else left
            seconds = options.seconds * options.guided if kind == "guided" else end - time.monotonic()
            if cases:
                report = functools.partial(keep, kind)
                tally = watch(kind, cases, seconds, options.seed, Path(name) / kind, report)
                keep(kind, tally)
                left -= tally.get("cases", 0)
                print(
                    f"{kind}: {tally.get('cases', 0):,} mutants in {tally['seconds']:.0f} s, {tally['faults']} faults"
                )
    return record(options, results)


def record(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "question": "What does a changed checkpoint do to the loader that the server uses?",
        "cases": sum(result.get("cases", 0) for result in results.values()),
        "faults": sum(result["faults"] for result in results.values()),
        "seed": options.seed,
        "bytes of a mutant": INPUT,
        **results,
        "python": platform.python_version(),
        "machine": machine(),
        "commit": commit(),
    }


def replay(data: bytes) -> bool:
    """Prints what one mutant is and what happens to it. Returns whether that is right."""
    from tests.loraf_serve.adapters.judged_loads import World

    with tempfile.TemporaryDirectory() as name:
        made, verdict = World(Path(name) / "world").judge(data)
    changed = ", ".join(sorted(map(str, made.changed))) or "no file"
    print(f"{made.base.folder.name}: {', '.join(made.kinds)}; changed: {changed}")
    print(verdict)
    return verdict.fault is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, help="mutants (default: %(default)s)")
    parser.add_argument(
        "--guided",
        type=float,
        default=0.25,
        help="largest share of mutants and time for atheris (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=7200, help="stop after about so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(RESULT), metavar="FILE", help="(default: %(default)s; -: nowhere)")
    parser.add_argument("--replay", metavar="HEX", help="the input of a finding")
    parser.add_argument("--worker", choices=["random", "guided"], help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if options.replay is not None:
        sys.exit(not replay(bytes.fromhex(options.replay)))
    result = campaign(options)
    for kind in ("guided", "random"):
        for finding in result.get(kind, {}).get("findings", []):
            print(f"{kind}: {finding['fault']}\n  {', '.join(finding['kinds'])}: --replay {finding['input']}")
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
