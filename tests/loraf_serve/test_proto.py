"""The public protocol against the page that promises it, and against buf's rules."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb

ROOT = Path(__file__).parents[2]

PROMISED = {
    pb.GenerateRequest: "adapter adapter_digest task_selection prompt messages prompt_token_ids apply_task_template "
    "sampling request_id",
    pb.TaskSelection: "all tasks as_trained base",
    pb.WeightedTask: "name weight",
    pb.Message: "role content",
    pb.SamplingParams: "max_tokens min_tokens temperature top_p top_k min_p seed stop stop_token_ids "
    "repetition_penalty presence_penalty frequency_penalty logit_bias logprobs n ignore_eos skip_special_tokens",
    pb.GenerateResponse: "request_id choices usage served_by",
    pb.Choice: "index text token_ids finish_reason stop_reason logprobs",
    pb.Usage: "prompt_tokens cached_prompt_tokens completion_tokens",
    pb.ServedBy: "adapter digest tasks backend",
    adapter_pb2.Adapter: "name digest base_model rank tasks resident_bytes",
    adapter_pb2.LoadAdapterRequest: "name path tasks replace",
    adapter_pb2.LoadAdapterResponse: "adapter",
    adapter_pb2.UnloadAdapterRequest: "name",
    adapter_pb2.UnloadAdapterResponse: "running_requests other_names",
    adapter_pb2.Task: "name alpha sparsity parameters trained_with",
}


@pytest.mark.parametrize("message", PROMISED, ids=lambda message: message.DESCRIPTOR.name)
def test_a_message_has_the_promised_fields(message):
    assert set(message.DESCRIPTOR.fields_by_name) == set(PROMISED[message].split())


@pytest.mark.parametrize(
    ("single", "stream"),
    [(pb.GenerateRequest, pb.StreamGenerateRequest), (pb.GenerateResponse, pb.StreamGenerateResponse)],
)
def test_a_stream_has_the_same_fields_as_a_single_answer(single, stream):
    def described(message):
        fields = message.DESCRIPTOR.fields
        return [(f.name, f.number, f.type, f.is_repeated, getattr(f.containing_oneof, "name", "")) for f in fields]

    assert described(single) == described(stream)


def test_what_is_not_set_can_be_told_from_a_default():
    sampling = pb.SamplingParams.DESCRIPTOR.fields
    assert all(field.has_presence for field in sampling if not field.is_repeated)
    assert pb.WeightedTask.DESCRIPTOR.fields_by_name["weight"].has_presence


def test_buf_lint_standard():
    buf = shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not on the PATH (npm package @bufbuild/buf): proto/ is not linted")
    result = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
