"""Every limit on what a client may send. Fixed values; docs/reference/limits.md and `GetServerInfo` show them.

Limits that the operator sets (`--max-queue`, …) and those of the model stand in `loraf_serve.service.info`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A number that is the most (or the least, if its name begins with `min_`) that is admitted.

    Attributes:
        unit: what `value` counts; "" for a plain number.
    """

    name: str
    value: float
    unit: str
    description: str


_limits: list[Limit] = []


def _limit(name: str, value: int, unit: str, description: str) -> int:
    _limits.append(Limit(name, value, unit, description))
    return value


# The request
MAX_REQUEST_ID = _limit("max_request_id", 128, "characters", "request_id")
MAX_PRIORITY = _limit("max_priority", 1000, "", "priority, and its negative value")
MAX_SELECTED_TASKS = _limit("max_selected_tasks", 1024, "tasks", "task_selection.tasks, or tasks of LoadAdapter")
MAX_PATH = _limit("max_path", 4096, "characters", "path of LoadAdapter")

# The prompt
MAX_MESSAGES = _limit("max_messages", 2048, "messages", "messages of a chat")
MAX_MESSAGES_CHARACTERS = _limit(
    "max_messages_characters", 1 << 20, "characters", "all messages of a chat together: texts, roles, calls of tools"
)
MAX_ROLE = _limit("max_role", 64, "characters", "role of a message")
MAX_TOOLS = _limit("max_tools", 128, "tools", "tools of a request")
MAX_TOOLS_CHARACTERS = _limit(
    "max_tools_characters", 1 << 18, "characters", "all tools of a request together: names, descriptions, parameters"
)
MAX_TOOL_NAME = _limit("max_tool_name", 64, "characters", "name of a tool")
MAX_TOOL_CALLS = _limit("max_tool_calls", 1024, "calls", "calls of tools in all messages of a chat")
MAX_JSON_DEPTH = _limit(
    "max_json_depth", 64, "levels", "objects and lists within each other in a JSON schema or in arguments of a tool"
)

MAX_PROMPTS = _limit(
    "max_prompts", 128, "prompts", "prompts of one HTTP request, each of which counts as a request in flight"
)

# Sampling
MAX_N = _limit("max_n", 16, "answers", "sampling.n")
MAX_LOGPROBS = _limit("max_logprobs", 20, "tokens", "sampling.logprobs and sampling.prompt_logprobs")
MAX_PROMPT_LOGPROBS_ENTRIES = _limit(
    "max_prompt_logprobs_entries",
    1 << 16,
    "log-probabilities",
    "(sampling.prompt_logprobs + 1) times the tokens of the prompt",
)
MAX_STOPS = _limit("max_stops", 16, "texts", "sampling.stop")
MAX_STOP_LENGTH = _limit("max_stop_length", 256, "characters", "one text of sampling.stop")
MAX_STOP_TOKEN_IDS = _limit("max_stop_token_ids", 128, "ids", "sampling.stop_token_ids")
MAX_LOGIT_BIASES = _limit("max_logit_biases", 1024, "entries", "sampling.logit_bias")
MAX_BAD_WORDS = _limit("max_bad_words", 64, "texts", "sampling.bad_words")
MAX_BAD_WORD_LENGTH = _limit("max_bad_word_length", 256, "characters", "one text of sampling.bad_words")
MAX_BAD_WORDS_TOKENS = _limit(  # vLLM's own, beyond which its worker would fail
    "max_bad_words_tokens", 1024, "tokens", "all texts of sampling.bad_words, each with and without a space before it"
)

# The form of the answer
MAX_SCHEMA = _limit("max_json_schema", 1 << 16, "characters", "sampling.structured_output.json_schema")
MAX_REGEX = _limit("max_regex", 1 << 12, "characters", "sampling.structured_output.regex")
MAX_GRAMMAR = _limit("max_grammar", 1 << 16, "characters", "sampling.structured_output.grammar")
MAX_CHOICES = _limit("max_choices", 256, "texts", "sampling.structured_output.choice")
MAX_CHOICES_CHARACTERS = _limit(
    "max_choices_characters", 1 << 14, "characters", "all texts of sampling.structured_output.choice together"
)

LIMITS: tuple[Limit, ...] = tuple(_limits)
