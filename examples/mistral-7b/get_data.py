"""Downloads the data of tasks.yaml from GitHub: GSM8K, and six data sets of language understanding.

    data/gsm8k/{train,test}.jsonl       openai/grade-school-math (MIT)
    data/nlu/<set>/{train,test}.json    AGI-Edgerunners/LLM-Adapters (ODC-By)

The training records of PIQA and SIQA come from the joint training file of LLM-Adapters, which does not name the data
set of a record. PIQA's records ask for a solution; SIQA's have exactly three answers and do not occur in ARC. The
number of records is checked before a file is written. Existing files are kept.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"
JOINT = f"{ADAPTERS}/ft-training_set/commonsense_170k.json"
ORIGINS = {  # data set → its folder in LLM-Adapters
    "boolq": "boolq",
    "piqa": "piqa",
    "social_i_qa": "social_i_qa",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}
FROM_JOINT = ("piqa", "social_i_qa")
COUNTS = {
    "gsm8k/train.jsonl": 7473,
    "gsm8k/test.jsonl": 1319,
    "nlu/boolq/train.json": 9427,
    "nlu/boolq/test.json": 3270,
    "nlu/piqa/train.json": 16113,
    "nlu/piqa/test.json": 1838,
    "nlu/social_i_qa/train.json": 33410,
    "nlu/social_i_qa/test.json": 1954,
    "nlu/arc_easy/train.json": 2251,
    "nlu/arc_easy/test.json": 2376,
    "nlu/arc_challenge/train.json": 1119,
    "nlu/arc_challenge/test.json": 1172,
    "nlu/openbookqa/train.json": 4957,
    "nlu/openbookqa/test.json": 500,
}
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="the folder (default: data)")
    out = parser.parse_args(arguments).out
    try:
        get(out, download)
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
        raise OSError(
            f"{url}: {error}; download the files in another way into the folders listed at the top of this script"
        ) from None


def get(out: Path, fetch: Callable[[str], bytes], counts: dict[str, int] = COUNTS) -> None:
    """Downloads and writes the missing files.

    Args:
        fetch: URL → content.
        counts: file → expected number of records.

    Raises:
        OSError: a file could not be downloaded or written.
        ValueError: a file has an unexpected number of records, or is malformed.
    """
    missing = [name for name in counts if not (out / name).exists()]
    for name in missing:
        if name.startswith("gsm8k"):
            data = fetch(f"{GSM8K}/{Path(name).name}")
            write(out, name, data, len(data.splitlines()), counts)
        elif not from_joint(name):
            data = fetch(f"{ADAPTERS}/dataset/{ORIGINS[Path(name).parent.name]}/{Path(name).name}")
            write(out, name, data, len(json.loads(data)), counts)
    if any(from_joint(name) for name in missing):
        arc = [json.loads((out / f"nlu/{name}/train.json").read_bytes()) for name in ("arc_easy", "arc_challenge")]
        others = {record["instruction"] for records in arc for record in records}
        parts = split(json.loads(fetch(JOINT)), others)
        for name in filter(from_joint, missing):
            records = parts[Path(name).parent.name]
            write(out, name, json.dumps(records, ensure_ascii=False, indent=1).encode(), len(records), counts)


def from_joint(name: str) -> bool:
    return Path(name).name == "train.json" and Path(name).parent.name in FROM_JOINT


def split(joint: list[Record], others: set[str]) -> dict[str, list[Record]]:
    """Returns the records of PIQA and SIQA in the joint file, in its order.

    Args:
        others: instructions of ARC's training records.
    """
    records: dict[str, list[Record]] = {name: [] for name in FROM_JOINT}
    for record in joint:
        instruction = record["instruction"].rstrip()
        if instruction.endswith("Answer format: solution1/solution2"):
            records["piqa"].append(record)
        elif instruction.endswith("Answer format: answer1/answer2/answer3") and record["instruction"] not in others:
            records["social_i_qa"].append(record)
    return records


def write(out: Path, name: str, data: bytes, count: int, counts: dict[str, int]) -> None:
    if count != counts[name]:
        raise ValueError(f"{name} would have {count} records, not {counts[name]}: its source has changed")
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
    print(f"{path}: {count} records")


if __name__ == "__main__":
    sys.exit(main())
