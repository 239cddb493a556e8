"""A manifest of two tasks, without and with statistics and named sets; and functions that change it and its digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from hypothesis import strategies as st

from loraf import manifest as manifests
from loraf.manifest import BaseModel, Manifest, Module, Projection, StoredFile, Task, Templates, positions_per_matrix

RANK = 4
MODULES = {
    "model.layers.0.self_attn.q_proj": Module(10, 8, "a" * 64),
    "model.layers.0.mlp.up_proj": Module(7, 8, "b" * 64),
}


def a_task(name: str, **changes) -> Task:
    values = {
        "name": name,
        "alpha": 16.0,
        "sparsity": 0.75,
        "dtype": "bfloat16",
        "file": StoredFile(f"tasks/{name}.safetensors", 100, hashlib.sha256(name.encode()).hexdigest()),
        "k": {module: positions_per_matrix(0.75, shape.d_out, RANK) for module, shape in MODULES.items()},
    }
    return Task(**(values | changes))


def a_manifest(**changes) -> Manifest:
    tasks = (
        a_task(
            "math",
            templates=Templates("Q: {question}\n»ä«", "{answer}"),
            training={"learning_rate": 5e-4, "epochs": 3, "files": ["a", {"b": None}], "ok": True},
            scores=({"set": "math", "evaluation": "gsm8k", "metric": "exact", "score": 0.5, "count": 200},),
        ),
        a_task("nlu", alpha=128.0, trained_with=("math",)),
    )
    base = BaseModel("org/model", "MistralForCausalLM", "f" * 64, "main", {"hidden_size": 8})
    values = {
        "base_model": base,
        "rank": RANK,
        "projection": Projection("philox4x32-10/normal-65536/1", 0, "c" * 64),
        "modules": MODULES,
        "tasks": tasks,
    }
    return Manifest(**(values | changes))


PATH = Path("ckpt") / manifests.FILE_NAME
WHOLE = a_manifest()
DATA = WHOLE.to_json().encode()
STATISTICS = StoredFile("statistics/math.safetensors", 50, "5" * 64)
EXTENDED = a_manifest(
    tasks=(dataclasses.replace(WHOLE.tasks[0], statistics=STATISTICS), WHOLE.tasks[1]),
    sets={"support": {"math": 1.0, "nlu": 0.5}, "careful": {"math": 0.25}},
)
EXTENDED_DATA = EXTENDED.to_json().encode()


def signed(content: dict) -> bytes:
    """Returns the file with `content` and valid digests, as the author of a wrong manifest would write it."""
    content = {key: value for key, value in content.items() if key != "digest"}
    try:
        modules = {name: [entry["d_out"], entry["d_in"]] for name, entry in content["modules"].items()}
        projection = content["projection"]
        if isinstance(projection["init_std"], int):
            projection = projection | {"init_std": float(projection["init_std"])}
        covered = {
            "rank": content["rank"],
            "projection": projection,
            "modules": modules,
            "tasks": [[t["name"], float(t["alpha"]), t["file"]["sha256"]] for t in content.get("tasks", [])],
        }
        content["adapter_digest"] = sha256_of(covered)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        pass  # too malformed to have a digest
    return json.dumps(content | {"digest": sha256_of(content)}).encode()


def sha256_of(content) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def changed(path: str, value, remove: bool = False, data: bytes = DATA) -> bytes:
    """Returns the signed file with the value at a path such as `a/b/0` replaced or removed."""
    content = json.loads(data)
    *parents, last = path.split("/")
    place = content
    for step in parents:
        place = place[int(step) if isinstance(place, list) else step]
    last = int(last) if isinstance(place, list) else last
    if remove:
        del place[last]
    else:
        place[last] = value
    return signed(content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
