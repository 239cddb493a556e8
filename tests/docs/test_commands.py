"""Every command of the pages is one that the programs take: names, options and their values."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Sequence

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks, inline_code, name
from tools.docs.commands import CHECK, MODULES, parser_of, subparsers

OTHER_PROGRAMS = {
    *(
        "buf",
        "curl",
        "deploy/try_install.sh",
        "docker",
        "helm",
        "hf",
        "jupyter",
        "kubectl",
        "lm-eval",
        "pip",
        "source",
        "vllm",
    ),
}
# vLLM's own, which loraf-serve and vllm serve pass through, and accelerate's.
OTHER_OPTIONS = {
    *("--dtype", "--enable-lora", "--enforce-eager", "--lora-modules", "--max-cpu-loras", "--max-lora-rank"),
    *("--max-loras", "--max-model-len", "--model", "--tensor-parallel-size", "--worker-extension-cls"),
    *("--fully-sharded-loras", "--lora-dtype", "--max-num-seqs"),
    *("--max-num-batched-tokens", "--scheduling-policy"),
    *("--cpu", "--config_file", "--mpirun_hostfile", "--multi_gpu", "--num_machines", "--num_processes"),
    *("--use_deepspeed", "--torch-backend", "--kills", "--out", "--gpu-memory-utilization"),
    *("--gpus", "--health-cmd", "--time"),  # docker's
    *("--inplace",),  # jupyter's
}
PLACEHOLDER = "…"


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block; comments, `&` and variables before a command are left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "&"]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


def mistakes(words: Sequence[str]) -> str:
    """What is wrong with a command; empty if nothing is."""
    program, *arguments = words
    if program in ("accelerate", "torchrun"):
        if "loraf_train.cli" not in arguments:
            return "does not start loraf_train.cli"
        module = arguments.index("loraf_train.cli")
        launcher = [word for word in arguments[:module] if word.startswith("--")]
        unknown = set(launcher) - _launcher_options() if program == "accelerate" else set()
        return (
            f"accelerate launch has no {sorted(unknown)}"
            if unknown
            else mistakes(["loraf-train", *arguments[module + 1 :]])
        )
    if program == "make":
        return _make_mistakes(arguments)
    if program == "python":
        return _python_mistakes(arguments)
    if [program, *arguments[:1]] == CHECK.split():
        return _parse(CHECK, arguments[1:])
    if program in MODULES:
        return _parse(program, arguments)
    return "" if program in OTHER_PROGRAMS else f"{program} is not a known program"


def _parse(program: str, arguments: Sequence[str]) -> str:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            _, others = parser_of(program).parse_known_args(list(arguments))
    except SystemExit as end:
        return errors.getvalue() if end.code else ""
    options = {word.partition("=")[0] for word in others if word.startswith("-")}
    if program in ("loraf-serve", CHECK):
        options -= OTHER_OPTIONS
        others = []
    return f"{program} has no {sorted(options) or others}" if options or others else ""


def _launcher_options() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return set(launch_command_parser()._option_string_actions)


def _make_mistakes(arguments: Sequence[str]) -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    for word in arguments:
        variable, equals, _ = word.partition("=")
        if (variable if equals else word) not in (variables if equals else targets):
            return f"the Makefile has no {word}"
    return ""


def _python_mistakes(arguments: Sequence[str]) -> str:
    if arguments[0] == "-m":
        file = ROOT / f"{arguments[1].replace('.', '/')}.py"
        return (
            ""
            if file.is_file() or arguments[1].split(".")[0] not in ("tests", "loraf_serve", "loraf_train")
            else str(file)
        )
    return "" if (ROOT / arguments[0]).is_file() else f"there is no {arguments[0]}"


def options_of(program: str, subcommand: str | None = None) -> set[str]:
    """Options of a command; of all its subcommands where none is named."""
    parser = parser_of(program)
    below = subparsers(parser)
    parsers = [below[subcommand]] if subcommand else [parser, *below.values()]
    return {option for p in parsers for option in p._option_string_actions}


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_are_accepted_by_their_programs(block):
    found = [(" ".join(words), mistakes(words)) for words in commands(block)]
    assert found, "an empty block"
    assert [(command, mistake) for command, mistake in found if mistake] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_the_text_exist(page):
    known = {option for program in MODULES for option in options_of(program)} | OTHER_OPTIONS
    wrong = []
    for code in inline_code(page):
        program, *words = code.split() or [""]
        options = [word.partition("=")[0] for word in code.split() if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)]
        if program in MODULES:
            subcommand = words[0] if words and subparsers(parser_of(program)) else None
            if subcommand and (subcommand.startswith("-") or subcommand == PLACEHOLDER):
                subcommand = None
            if subcommand and subcommand not in subparsers(parser_of(program)):
                wrong.append(f"`{code}`: no command {subcommand}")
                continue
            allowed = options_of(CHECK if code.startswith(CHECK) else program, subcommand)
            allowed |= OTHER_OPTIONS if program == "loraf-serve" else set()
        else:
            allowed = known
        wrong += [f"`{code}`: no option {option}" for option in options if option not in allowed]
        if program == "make" and (mistake := _make_mistakes(words)):
            wrong.append(f"`{code}`: {mistake}")
    assert wrong == []


@pytest.mark.parametrize(
    "command",
    [
        "loraf-train run tasks.yaml --eval-limt 3",
        "loraf-train train tasks.yaml",
        "loraf-serve --adapter ./ckpt",
        "loraf-serve --model tiny --backends merged",
        "loraf-serve --model tiny --json",
        "loraf-serve check --model tiny --jsn",
        "loraf-client generate hello --max-token 3",
        "make tests",
        "make setup EXTRA=cuda",
        "python examples/nothing.py",
        "accelerate launch --multi-gpus -m loraf_train.cli run tasks.yaml",
        "accelerate launch -m loraf_train.cli runs tasks.yaml",
        "lorafserve --model tiny",
    ],
)
def test_a_wrong_command_would_be_found(command):
    assert mistakes(shlex.split(command))


def test_parsers_are_those_of_the_installed_commands():
    for program in MODULES:
        assert isinstance(parser_of(program), argparse.ArgumentParser)
        assert parser_of(program).prog == program
