"""What would keep the HTTP door from opening, beside its options and its address."""

from __future__ import annotations

from loraf.errors import Problem, one_line
from loraf_serve.http import page
from loraf_serve.service.server_options import ServerOptions

_WITHOUT = "serve without it, or with --backend merged"


def problems(options: ServerOptions, backend: str) -> list[Problem]:
    """What is wrong with this installation.

    Args:
        backend: the name of the one that would serve; "" if that is not known.
    """
    found = page.problems()
    if backend not in ("", "merged"):
        found += _vllm_problems(options.tool_call_parser)
    return found


def _vllm_problems(tool_parser: str) -> list[Problem]:
    """What vLLM's app needs of the installed vLLM."""
    from loraf_serve.vllm.http import facts

    found = facts.problems()
    try:
        from loraf_serve.vllm.http.app import tool_parsers

        known = tool_parsers()
    except Exception as error:  # vLLM's modules run on import, and may fail in any way
        message = f"vLLM's app cannot be imported ({one_line(error)})"
        return [*found, Problem(message, "--http-port", remedy=_WITHOUT)]
    if tool_parser and tool_parser not in known:
        message = f"vLLM has no parser {tool_parser!r}"
        found.append(Problem(message, "--tool-call-parser", remedy=f"choose from: {', '.join(known)}"))
    return found
