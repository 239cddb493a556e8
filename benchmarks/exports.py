"""Compares both exports with the formula, for a tiny random model of every causal language model of transformers.

    python benchmarks/exports.py                    # about ten minutes on two cores; writes results/exports.json
    python benchmarks/exports.py glm4_moe --out -

Each checkpoint adapts every linear layer that `loraf-train` trains, a tied head included. Its PEFT export is loaded by
PEFT and by transformers' own `load_adapter`, its merged export by transformers. Errors are the largest difference of a
logit from the base with ΔW written out and added, relative to the largest logit, in float32; the effect is the
adapter's own, in the same unit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "exports.json"
LIMIT = 1e-4  # errors below it are rounding


def try_one(model_type: str) -> dict[str, Any]:
    """Returns what both exports of one model type have shown."""
    import torch

    from tests.loraf_train import exported

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = exported.build(model_type, Path(scratch) / "base")
        except Exception as error:  # a config that needs more than sizes
            return {"not tried": short(error)}
        try:
            return exported.compare(base, Path(scratch))
        except Exception as error:  # the whole point is to find out
            return {"failed": short(error)}


def short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="TYPE", help="(default: all)")
    parser.add_argument("--out", default=str(RESULT), metavar="FILE", help="(default: %(default)s; -: nowhere)")
    options = parser.parse_args()
    names = options.model_types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = {}
    with get_context("spawn").Pool(1, maxtasksperchild=40) as pool:  # a new process now and then frees its memory
        for name, result in zip(names, pool.imap(try_one, names), strict=True):
            results[name] = result
            print(name, json.dumps(result), flush=True)
    wrong = [name for name, r in results.items() if "failed" in r or max(r.get("errors", {"": 0.0}).values()) > LIMIT]
    print(f"{len(results)} model types; wrong: {', '.join(wrong) or 'none'}")
    if options.out != "-":
        record = {"limit": LIMIT, "wrong": wrong, "results": results, "machine": machine(), "commit": commit()}
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
