"""Downloads the data of tasks.yaml from GitHub: GSM8K, and six data sets of language understanding.

    data/gsm8k/{train,test}.jsonl       openai/grade-school-math (MIT)
    data/nlu/<set>/{train,test}.json    AGI-Edgerunners/LLM-Adapters (ODC-By)

The training records of PIQA and SIQA come from the joint training file of LLM-Adapters, which does not name the data
set of a record. PIQA's records ask for a solution; SIQA's have exactly three answers and do not occur in ARC. Files
come from a fixed commit; the number of records, and the digest where it is known, are checked before a file is written.
Existing files are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A branch could change between two downloads; a commit cannot.
GSM8K_COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
ADAPTERS_COMMIT = "816657208af4db747803f87ba40a4c71383fed7a"
GSM8K = f"https://raw.githubusercontent.com/openai/grade-school-math/{GSM8K_COMMIT}/grade_school_math/data"
ADAPTERS = f"https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/{ADAPTERS_COMMIT}"
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
DIGESTS = {  # file → SHA-256; the joint file is fixed by its commit alone
    "gsm8k/train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "gsm8k/test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "nlu/boolq/train.json": "5ccbaceebaddc69765e1c4a363632196b81851d303696672165ab59ec4e48c83",
    "nlu/boolq/test.json": "89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9",
    "nlu/piqa/test.json": "3860d11b9b42e590b6b4bbc1643214d373ed0b0d4ac62fcc7bdceb8e044ad141",
    "nlu/social_i_qa/test.json": "71543f41127451945379d106ffedaef502f1c8770dff6d2f543aca85e3080b1d",
    "nlu/arc_easy/train.json": "6a06cece3dec32f4fb1c1b0fc29dab14be7cf3053b417290dbc6cd845359f5ff",
    "nlu/arc_easy/test.json": "3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc",
    "nlu/arc_challenge/train.json": "a9debff28aafed86a08211dc3584a3b6cb38edca8c56bb34cd5002ed54aeebfb",
    "nlu/arc_challenge/test.json": "4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7",
    "nlu/openbookqa/train.json": "a1e094eeea01f70c0baa880f37497b26700ae99b243927b9c529984de9b1fe90",
    "nlu/openbookqa/test.json": "8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e",
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


def get(
    out: Path, fetch: Callable[[str], bytes], counts: dict[str, int] = COUNTS, digests: dict[str, str] = DIGESTS
) -> None:
    """Downloads and writes the missing files.

    Args:
        fetch: URL → content.
        counts: file → expected number of records.
        digests: file → expected SHA-256; files that it does not name are not compared.

    Raises:
        OSError: a file could not be downloaded or written.
        ValueError: a file has another digest or number of records than expected, or is malformed.
    """
    missing = [name for name in counts if not (out / name).exists()]
    for name in missing:
        if name.startswith("gsm8k"):
            data = require_digest(fetch(f"{GSM8K}/{Path(name).name}"), name, digests)
            write(out, name, data, len(data.splitlines()), counts)
        elif not from_joint(name):
            data = fetch(f"{ADAPTERS}/dataset/{ORIGINS[Path(name).parent.name]}/{Path(name).name}")
            require_digest(data, name, digests)
            write(out, name, data, len(json.loads(data)), counts)
    if any(from_joint(name) for name in missing):
        arc = [json.loads((out / f"nlu/{name}/train.json").read_bytes()) for name in ("arc_easy", "arc_challenge")]
        others = {record["instruction"] for records in arc for record in records}
        parts = split(json.loads(fetch(JOINT)), others)
        for name in filter(from_joint, missing):
            records = parts[Path(name).parent.name]
            write(out, name, json.dumps(records, ensure_ascii=False, indent=1).encode(), len(records), counts)


def require_digest(data: bytes, name: str, digests: dict[str, str]) -> bytes:
    """Returns `data`. Raises ValueError if its SHA-256 is not the one in `digests`."""
    digest = hashlib.sha256(data).hexdigest()
    if digests.get(name, digest) != digest:
        raise ValueError(f"{name}: the download has SHA-256 {digest}, not {digests[name]}; download it again")
    return data


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
