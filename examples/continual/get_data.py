"""Downloads the data of the continual-learning benchmarks and writes it as records.

    data/classification/<task>/{train,test}.json    cmnfriend/O-LoRA on GitHub, CL_Benchmark; fields sentence, label
    data/trace/<task>/{train,test}.json             TRACE's archive on Google Drive; fields prompt, answer

    python examples/continual/get_data.py                     # both
    python examples/continual/get_data.py classification
    python examples/continual/get_data.py trace --archive TRACE-Benchmark.zip    # downloaded in another way

What the conversion does: white space at the ends of a text goes; so does a record whose label is not one of the task's
(131 of MNLI's test records are marked «-»). A prompt of TRACE longer than 4,500 characters loses its beginning: TRACE
cuts there too, after 1,024 tokens.

digests.json holds the SHA-256 of every download. A download that it does not know yet is added, every later one is
compared with it. GitHub's files come from a fixed commit; Google Drive has none, so there only the digest tells.
Existing files are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import json
import os
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMIT = "07117e1fc4a5f5ad9308a815a42cee8f46502dc8"
CLASSIFICATION = f"https://raw.githubusercontent.com/cmnfriend/O-LoRA/{COMMIT}/CL_Benchmark"
TRACE = "https://drive.usercontent.google.com/download?id=1S0SmU0WEw5okW_XvP2Ns0URflNzZq6sV&export=download&confirm=t"
ARCHIVE = "TRACE-Benchmark.zip"  # its name in digests.json
VARIANT = "LLM-CL-Benchmark_5000"  # the folder of the archive with 5,000 training records a task
LONGEST_PROMPT = 4500  # characters

_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_TRUE_FALSE = ("True", "False")
_NLI = ("entailment", "neutral", "contradiction")
_TOPICS = {
    "agnews": ("World", "Sports", "Business", "Science or Technology"),
    "dbpedia": (
        *("Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation"),
        *("Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"),
    ),
    "yahoo": (
        *("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet"),
        *("Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
    ),
}
# Task → (folder below CL_Benchmark, labels).
LABELS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (f"TC/{name}", topics) for name, topics in _TOPICS.items()},
    "amazon": ("SC/amazon", _STARS),
    "yelp": ("SC/yelp", _STARS),
    "imdb": ("SC/IMDB", ("Good", "Bad")),
    "sst-2": ("SC/SST-2", ("Good", "Bad")),
    "mnli": ("NLI/MNLI", _NLI),
    "cb": ("NLI/CB", _NLI),
    "rte": ("NLI/RTE", ("entailment", "contradiction")),
    "boolqa": ("BoolQA/BoolQA", _TRUE_FALSE),
    "multirc": ("MultiRC/MultiRC", _TRUE_FALSE),
    "qqp": ("QQP/QQP", _TRUE_FALSE),
    "wic": ("WiC/WiC", _TRUE_FALSE),
    "copa": ("COPA/COPA", ("A", "B")),
}
TRACE_TASKS = {  # task → its folder in the archive
    name.lower(): name
    for name in ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
}
PARTS = ("train", "test")
Record = dict[str, Any]
Fetch = Callable[[str], bytes]  # URL → content


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", metavar="classification|trace", help="(both)")
    parser.add_argument("--archive", type=Path, help=f"TRACE's {ARCHIVE}, if it is on this machine")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="the folder (default: data)")
    options = parser.parse_args(arguments)
    which = options.which or ["classification", "trace"]
    if set(which) - {"classification", "trace"}:
        parser.error("name classification, trace or both")
    digests = Digests(HERE / "digests.json")
    try:
        if "classification" in which:
            get_classification(options.out / "classification", download, digests)
        if "trace" in which:
            fetch = download if options.archive is None else lambda _: options.archive.read_bytes()
            get_trace(options.out / "trace", fetch, digests)
    except (OSError, ValueError) as error:
        print(f"get_data.py: {error}", file=sys.stderr)
        return 2
    return 0


def download(url: str) -> bytes:
    """Downloads a URL. Raises OSError, whose message contains the URL."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return bytes(response.read())
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}") from None


class Digests:
    """The SHA-256 of every download, in a JSON file: the first download of a file adds its own."""

    def __init__(self, file: Path):
        self._file = file
        self._known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}

    def check(self, name: str, data: bytes) -> bytes:
        """Returns `data`. Raises ValueError if an earlier download of `name` had other bytes."""
        digest = hashlib.sha256(data).hexdigest()
        if self._known.setdefault(name, digest) != digest:
            raise ValueError(
                f"{name}: the download has SHA-256 {digest}, not {self._known[name]}; download it again, "
                f"or look what has changed and take its entry out of {self._file}"
            )
        return data

    def save(self) -> None:
        """Writes the file. Call it when what was downloaded has proved readable."""
        replace(self._file, (json.dumps(self._known, indent=1, sort_keys=True) + "\n").encode())


# --- text classification ----------------------------------------------------------------------------------------------


def get_classification(out: Path, fetch: Fetch, digests: Digests) -> None:
    """Downloads, converts and writes the missing files.

    Raises:
        OSError: a file could not be downloaded or written.
        ValueError: a file has another digest than before, or is malformed.
    """
    for task, (folder, labels) in LABELS.items():
        for part in PARTS:
            file = out / task / f"{part}.json"
            if not file.exists():
                name = f"{folder}/{part}.json"
                data = digests.check(name, fetch(f"{CLASSIFICATION}/{name}"))
                write(file, list(labelled(read(data, name, ("sentence", "label")), labels)))
                digests.save()


def labelled(records: list[Record], labels: tuple[str, ...]) -> Iterator[Record]:
    """Yields the records that have one of the labels, without white space at the ends."""
    for record in records:
        if record["label"].strip() in labels:
            yield {"sentence": record["sentence"].strip(), "label": record["label"].strip()}


# --- TRACE ------------------------------------------------------------------------------------------------------------


def get_trace(out: Path, fetch: Fetch, digests: Digests) -> None:
    """Downloads the archive, converts and writes the missing files. Raises what `get_classification` does."""
    missing = [(task, part) for task in TRACE_TASKS for part in PARTS if not (out / task / f"{part}.json").exists()]
    if not missing:
        return
    data = fetch(TRACE)
    if not zipfile.is_zipfile(io.BytesIO(data)):  # Google Drive answers with a page when it wants to ask something
        raise ValueError(f"{TRACE} is no zip archive; download it with a browser and name it with --archive")
    digests.check(ARCHIVE, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for task, part in missing:
            name = f"{VARIANT}/{TRACE_TASKS[task]}/{part}.json"
            members = [member for member in archive.namelist() if f"/{member}".endswith(f"/{name}")]
            if len(members) != 1:
                raise ValueError(f"{ARCHIVE} has {len(members) or 'no'} files {name}; one was expected")
            records = read(archive.read(members[0]), name, ("prompt", "answer"))
            write(out / task / f"{part}.json", [shortened(record) for record in records])
    digests.save()


def shortened(record: Record) -> Record:
    return {"prompt": record["prompt"][-LONGEST_PROMPT:], "answer": record["answer"]}


# --- files ------------------------------------------------------------------------------------------------------------


def read(data: bytes, name: str, fields: tuple[str, ...]) -> list[Record]:
    """Returns the records of a JSON list. Raises ValueError if one has not all `fields`, each a text."""
    try:
        records = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{name} is not a list of records")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in fields):
            raise ValueError(f"{name}: record {number} does not have the texts {' and '.join(fields)}")
    return records


def write(file: Path, records: list[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, json.dumps(records, ensure_ascii=False, indent=0).encode())
    print(f"{file}: {len(records)} records")


def replace(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, file)


if __name__ == "__main__":
    sys.exit(main())
