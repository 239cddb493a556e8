"""Every load of a model or tokenizer says that no code of the model's own runs and that no pickle is read."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.source_tree import PACKAGES, path_of, sources, syntax_tree

OFF = {"trust_remote_code": False}
NO_PICKLES = {"use_safetensors": True}
WITHOUT_CODE = ("PeftConfig", "GenerationConfig")  # plain values, which never name code


def loose_loads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what is missing) of every call of `from_pretrained` or `from_config` that leaves a choice open.

    The arguments have to stand in the call itself, as constants. Configs and tokenizers have no weights.
    """
    configs = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and _is_config(node)]
    of_configs = {id(call) for node in configs for call in ast.walk(node)}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        if ast.unparse(call.func.value) == "super()" and id(call) in of_configs:
            continue
        method, owner = call.func.attr, ast.unparse(call.func.value)
        if method not in ("from_pretrained", "from_config") or owner.endswith(WITHOUT_CODE):
            continue
        given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        has_weights = method == "from_pretrained" and not owner.endswith(("Config", "Tokenizer"))
        for name, value in (OFF | (NO_PICKLES if has_weights else {})).items():
            if given.get(name) is not value:
                yield call.lineno, f"{owner}.{method} without {name}={value}"


def _is_config(node: ast.ClassDef) -> bool:
    return bool(node.bases) and all(ast.unparse(base).endswith(WITHOUT_CODE) for base in node.bases)


@pytest.mark.parametrize("file", sources(*PACKAGES, "tools", "benchmarks"), ids=path_of)
def test_no_load_runs_code_or_reads_a_pickle(file):
    assert [f"{path_of(file)}:{line}: {what}" for line, what in loose_loads(syntax_tree(file))] == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("AutoModelForCausalLM.from_pretrained(x)", 2),
        ("AutoModelForCausalLM.from_pretrained(x, **options)", 2),
        ("AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False)", 1),
        ("type(model).from_pretrained(None, use_safetensors=True, trust_remote_code=flag)", 1),
        ("AutoTokenizer.from_pretrained(x)", 1),
        ("transformers.AutoConfig.from_pretrained(x, trust_remote_code=True)", 1),
        ("AutoModelForCausalLM.from_config(config)", 1),
        ("AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False, use_safetensors=True)", 0),
        ("AutoConfig.from_pretrained(x, trust_remote_code=False)", 0),
        ("class A(PeftConfig):\n    f = super().from_pretrained(x)", 0),
        ("class A(PeftModel):\n    f = super().from_pretrained(x)", 2),
    ],
)
def test_the_search_finds_what_it_is_for(code, count):
    assert len(list(loose_loads(ast.parse(code)))) == count
