"""What the pages on retention say of constants, sizes and figures is what the code has."""

from __future__ import annotations

import re

import yaml

from loraf_train.retention import protection
from loraf_train.retention.extent import DIRECTIONS, EXAMPLES, ROUNDS, stored_bytes
from loraf_train.settings.parts import RetentionConfig
from tests.docs.pages import ROOT, blocks, read
from tools.docs import figures

PAGE = ROOT / "docs" / "explanation" / "retention.md"
GUIDE = ROOT / "docs" / "how-to" / "keep-earlier-tasks.md"
NUMBERS = {1: "one", 2: "two", 3: "three"}
MISTRAL_7B = {"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 14336, "up": 14336, "down": 4096}  # module → d_out


def text() -> str:
    """The page with line breaks as spaces."""
    return re.sub(r"\s+", " ", read(PAGE))


def test_the_guide_names_the_default_budget():
    settings = [yaml.safe_load(block.text) for block in blocks("yaml") if block.page == GUIDE]
    assert settings[0] == {"retention": {"budget": RetentionConfig().budget}}


def test_the_penalty_has_the_constants_of_the_page():
    assert f"λ is at least {protection.PRICE:g} nats per squared logit once the budget is in force" in text()
    assert f"to at most {protection._STRONGEST:g}." in text()
    assert f"budget²·max(1, {protection._IN_FORCE:g}·T/t)" in text()
    assert f"the last {1 - protection._IN_FORCE:.0%}".replace("%", " %") in text()


def test_what_is_gathered_is_what_the_page_says():
    assert f"its {DIRECTIONS} leading directions" in text()
    assert f"one forward and {NUMBERS[ROUNDS]} backward passes over up to {EXAMPLES} examples" in text()


def test_the_size_of_a_large_models_statistics():
    shapes = {f"{layer}.{name}": (d_out, 64) for layer in range(32) for name, d_out in MISTRAL_7B.items()}
    assert f"| Mistral-7B, rank 64, sparsity 0.9 | {stored_bytes(shapes) / 1e6:.1f} MB |" in read(PAGE)


def test_the_picture_has_the_figures_of_the_table():
    for _, figure, _ in figures.LEFT_OUT:
        assert f"| {figure:.3f} |" in read(PAGE)
