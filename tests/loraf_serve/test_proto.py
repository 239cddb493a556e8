"""The gRPC contract: its fields, buf's lint rules, and compatibility with the last release."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from loraf_serve.v1 import adapter_pb2, info_pb2
from loraf_serve.v1 import generation_pb2 as pb
from tests.tools import needs

ROOT = Path(__file__).parents[2]

FIELDS = {
    pb.GenerateRequest: "adapter adapter_digest task_selection prompt messages prompt_token_ids apply_task_template "
    "sampling request_id priority tools",
    pb.TaskSelection: "all tasks as_trained base named",
    pb.WeightedTask: "name weight",
    pb.Message: "role content tool_calls tool_call_id reasoning_content",
    pb.ToolCall: "id name arguments",
    pb.Tool: "name description parameters",
    pb.StructuredOutput: "json_schema regex choice grammar",
    pb.SamplingParams: "max_tokens min_tokens temperature top_p top_k min_p seed stop stop_token_ids "
    "repetition_penalty presence_penalty frequency_penalty logit_bias logprobs n ignore_eos skip_special_tokens "
    "structured_output prompt_logprobs bad_words",
    pb.GenerateResponse: "request_id choices usage served_by prompt_logprobs",
    pb.Choice: "index text token_ids finish_reason stop_reason logprobs",
    pb.Usage: "prompt_tokens cached_prompt_tokens completion_tokens",
    pb.ServedBy: "adapter digest tasks backend",
    adapter_pb2.Adapter: "name digest base_model rank tasks resident_bytes sets",
    adapter_pb2.LoadAdapterRequest: "name path tasks replace",
    adapter_pb2.LoadAdapterResponse: "adapter",
    adapter_pb2.UnloadAdapterRequest: "name",
    adapter_pb2.UnloadAdapterResponse: "running_requests other_names",
    adapter_pb2.NamedSet: "name tasks origin",
    info_pb2.GetServerInfoResponse: "model backend versions unsupported_fields limits",
    adapter_pb2.Task: "name alpha sparsity parameters trained_with",
}


@pytest.mark.parametrize("message", FIELDS, ids=lambda message: message.DESCRIPTOR.name)
def test_a_message_has_exactly_these_fields(message):
    assert set(message.DESCRIPTOR.fields_by_name) == set(FIELDS[message].split())


@pytest.mark.parametrize(
    ("unary", "stream"),
    [(pb.GenerateRequest, pb.StreamGenerateRequest), (pb.GenerateResponse, pb.StreamGenerateResponse)],
)
def test_streaming_messages_have_the_same_fields_as_unary_ones(unary, stream):
    def layout(message):
        fields = message.DESCRIPTOR.fields
        return [(f.name, f.number, f.type, f.is_repeated, getattr(f.containing_oneof, "name", "")) for f in fields]

    assert layout(unary) == layout(stream)


def test_an_unset_field_differs_from_a_default_value():
    sampling = pb.SamplingParams.DESCRIPTOR.fields
    assert all(field.has_presence for field in sampling if not field.is_repeated)
    assert pb.WeightedTask.DESCRIPTOR.fields_by_name["weight"].has_presence


def buf(*arguments: str) -> None:
    """Runs buf in the repository. It has to find nothing."""
    executable = ROOT / ".tools" / "buf"
    command = str(executable) if executable.exists() else shutil.which("buf")
    if command is None:
        pytest.skip(needs("buf"))
    result = subprocess.run([command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_buf_lint_standard():
    buf("lint")


def test_nothing_breaks_the_released_contract():
    buf("breaking", "--against", "proto-released")


def test_a_broken_contract_is_noticed(tmp_path):
    """The check of the released contract compares with what is there, and does fail."""
    shutil.copytree(ROOT / "proto-released", tmp_path / "released")
    [file] = (tmp_path / "released").rglob("adapter.proto")
    text = file.read_text(encoding="utf-8")
    assert "string name = 1;" in text
    file.write_text(text.replace("string name = 1;", "string name = 99;"), encoding="utf-8")
    with pytest.raises(AssertionError, match='Previously present field "99"'):
        buf("breaking", "--against", str(tmp_path / "released"))
