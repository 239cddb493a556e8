"""What calls return, and how it looks in a terminal and a notebook."""

from __future__ import annotations

import pytest

from loraf_serve.client import AdapterList
from loraf_serve.client.results import answer_of, joined, pieces_of
from loraf_serve.v1 import adapter_pb2
from loraf_serve.v1 import generation_pb2 as pb
from tests.loraf_serve.client.stand_in import CLIENTS, INFO, call, standing_in
from tests.loraf_serve.fake_backend import expected_text
from tests.loraf_serve.harness import serving

EVIL = "<script>alert(1)</script>&"


def answer(text: str):
    served_by = pb.ServedBy(adapter="trio", digest="0123456789abcdef", backend="resident")
    served_by.tasks.add(name="math", weight=1.0)
    served_by.tasks.add(name="nlu", weight=0.5)
    choices = [pb.Choice(text=text, finish_reason=pb.FINISH_REASON_LENGTH), pb.Choice(index=1, text="other")]
    usage = pb.Usage(prompt_tokens=4, completion_tokens=5)
    return answer_of(pb.GenerateResponse(choices=choices, usage=usage, served_by=served_by))


def test_an_answer_is_its_text_and_says_what_answered():
    short, long = answer("yes"), answer("x" * 500)
    assert str(short) == "yes" and short.texts == ("yes", "other")
    assert repr(short) == "Answer('yes', math+nlu:0.5, trio@0123456789ab, resident, 4 + 5 tokens, length)"
    assert len(repr(long)) < 150 and "…'" in repr(long)


def test_pieces_print_as_text():
    message = pb.StreamGenerateResponse(choices=[pb.Choice(text="a"), pb.Choice(index=1, text="b", finish_reason=1)])
    assert [str(piece) for piece in pieces_of(message)] == ["a", "b"]
    assert [repr(p) for p in pieces_of(message)] == [
        "Piece('a', index=0)",
        "Piece('b', index=1, finish_reason='stop')",
    ]


def test_adapters_are_a_list_of_messages_and_a_table():
    adapter = adapter_pb2.Adapter(name="trio", rank=8, base_model=EVIL, resident_bytes=1_500_000, digest="d" * 64)
    adapter.tasks.add(name="math")
    adapter.tasks.add(name="nlu")
    adapter.sets.add(name="both").tasks.add(name="math", weight=0.5)
    adapters = AdapterList([adapter])
    assert isinstance(adapters, list) and adapters[0].name == "trio"
    assert repr(adapters) == "[trio: math, nlu]" and repr(AdapterList()) == "[]"
    html = adapters._repr_html_()
    assert "<td>math, nlu</td><td>both = math:0.5</td>" in html and "1.5 MB" in html


@pytest.mark.parametrize("kind", CLIENTS)
def test_server_info(kind):
    with standing_in() as (_, address):
        info = call(kind, address, "server_info")
    assert (info.model, info.backend, info.versions["torch"]) == ("tiny", "resident", "2.8")
    assert info.limits == {"max_model_len": 256} and info.unsupported_fields == ("sampling.structured_output",)
    assert info.response == INFO
    assert "ServerInfo('tiny', backend='resident'" in repr(info)
    assert "<td>max_model_len</td><td>256 (tokens of &lt;prompt&gt; and answer)</td>" in info._repr_html_()


def test_server_info_of_the_server():
    with serving() as running:
        info = running.client.server_info()
        assert info.backend == "fake" and "loraf" in info.versions
        assert info.limits["max_model_len"] == running.backend.max_model_len


def test_html_is_escaped():
    shown = [answer(EVIL), AdapterList([adapter_pb2.Adapter(name=EVIL, base_model=EVIL, digest=EVIL)])]
    for value in shown:
        assert "<script" not in value._repr_html_() and "&lt;script&gt;" in value._repr_html_()


def test_a_stream_ends_as_the_answer():
    with serving() as running:
        request = {"max_tokens": 6, "n": 2, "logprobs": 1, "tasks": ["nlu"], "request_id": "r"}
        stream = running.client.stream("hello", **request)
        first = next(stream)
        whole = stream.answer()
        assert whole.text.startswith(first.text)
        assert whole.texts == tuple(expected_text(running.backend.requests[-1], i) for i in range(2))
        assert whole.response == running.client.generate("hello", **request).response
        assert repr(whole).startswith(f"Answer('{whole.text}', nlu, trio@")
        assert stream.answer() == whole


def test_a_stream_that_is_closed_early_has_a_part_of_the_answer():
    with serving() as running, running.client.stream("hello", max_tokens=50) as stream:
        text = str(next(stream))
        stream.close()
        part = stream.answer()
    assert (part.text, part.finish_reason, part.response.HasField("usage")) == (text, "", False)
    assert answer_of(joined([])).text == ""


def test_an_async_stream_ends_as_the_answer():
    import asyncio

    from loraf_serve.client import AsyncClient

    async def ask(address: str):
        async with AsyncClient(address) as client, client.stream("hello", max_tokens=6) as stream:
            await anext(stream)
            return await stream.answer(), await client.generate("hello", max_tokens=6)

    with serving() as running:
        streamed, whole = asyncio.run(ask(running.address))
    assert streamed.text == whole.text and streamed.finish_reason == "length"
