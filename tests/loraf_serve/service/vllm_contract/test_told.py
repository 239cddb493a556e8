"""What ended an answer, and the candidates at a position, in vLLM's messages."""

from __future__ import annotations

import pytest

from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import GenerationRequest, Sampling
from loraf_serve.service.vllm_contract.told import Joined, Told
from loraf_serve.v1 import generation_pb2 as pb
from loraf_serve.vllm_proto import inference_pb2 as vllm_pb

END = 2
REQUEST = GenerationRequest("id", (5, 6), Sampling(stop=("42", "!"), stop_token_ids=(42,)), None, TaskSet())


def told(options: vllm_pb.ResponseOptions | None = None) -> Told:
    return Told(options or vllm_pb.ResponseOptions(), REQUEST, frozenset({END}))


def piece(*choices: pb.Choice, **fields) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(choices=choices, **fields)


@pytest.mark.parametrize(
    ("token_ids", "reason", "field", "value"),
    [
        ([9, END], "", "eos_token_id", END),
        ([9, 42], "42", "stop_token_id", 42),
        ([9, 10], "42", "stop_string", "42"),  # the text 42, made of other tokens
        ([9, 10], "!", "stop_string", "!"),
        ([9, 10], "", None, None),  # a form that is complete
        ([], "", None, None),
    ],
)
def test_what_stopped_an_answer(token_ids, reason, field, value):
    choice = pb.Choice(token_ids=token_ids, finish_reason=pb.FINISH_REASON_STOP, stop_reason=reason)
    *_, last = told().responses(piece(choice))
    info = last.outputs.finish_info
    assert (info.finish_reason, info.num_output_tokens) == (vllm_pb.FinishInfo.STOP, len(token_ids))
    assert info.WhichOneof("stop_reason") == field
    assert field is None or getattr(info, field) == value


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (pb.FINISH_REASON_LENGTH, vllm_pb.FinishInfo.LENGTH),
        (pb.FINISH_REASON_ABORTED, vllm_pb.FinishInfo.ABORTED),
    ],
)
def test_other_reasons_have_nothing_that_stopped_them(ours, theirs):
    *_, last = told().responses(piece(pb.Choice(token_ids=[END], finish_reason=ours)))
    assert last.outputs.finish_info == vllm_pb.FinishInfo(num_output_tokens=1, finish_reason=theirs)


def test_candidates_are_the_tokens_other_than_the_one_that_stands_there():
    def token(i: int) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=i, logprob=-float(i), rank=i)

    positions = [
        pb.PositionLogprobs(chosen=token(2), top=[token(1), token(2), token(3)]),
        pb.PositionLogprobs(chosen=token(4), top=[token(1)]),
    ]
    choice = pb.Choice(token_ids=[2, 4], logprobs=positions, text="xy")
    _, response = told(vllm_pb.ResponseOptions(output_logprobs=True)).responses(piece(choice))
    assert [[t.id for t in info.tokens] for info in response.outputs.candidate_tokens] == [[1, 3], [1]]
    assert list(response.outputs.ranks) == [2, 4]
    assert (response.outputs.text, response.outputs.num_tokens, list(response.outputs.token_ids)) == ("xy", 2, [])


def test_pieces_are_joined_into_one_response():
    one = told(vllm_pb.ResponseOptions(output_token_ids=True))
    joined = Joined()
    joined.add(one.responses(piece(pb.Choice(text="a", token_ids=[7]))))
    end = pb.Choice(text="b", token_ids=[8, END], finish_reason=pb.FINISH_REASON_STOP)
    joined.add(one.responses(piece(end, usage=pb.Usage(cached_prompt_tokens=1))))
    assert joined.complete() == vllm_pb.GenerateResponse(
        prompt_info=vllm_pb.PromptInfo(num_prompt_tokens=2),
        outputs=vllm_pb.SequenceOutput(
            text="ab",
            num_tokens=3,
            token_ids=[7, 8, END],
            finish_info=vllm_pb.FinishInfo(
                num_output_tokens=3, finish_reason=vllm_pb.FinishInfo.STOP, eos_token_id=END, num_cached_tokens=1
            ),
        ),
    )
