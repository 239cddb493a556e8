"""vllm.Control: what the server is, Abort, adapters; tokens, and what is not offered."""

from __future__ import annotations

import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from loraf_serve.adapters.named_sets import OperatorSets
from loraf_serve.vllm_proto import control_pb2
from loraf_serve.vllm_proto import inference_pb2 as vllm_pb
from tests.loraf_serve.asking import ask, failure
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, checkpoints_root, eventually, one_adapter, two_adapters
from tests.loraf_serve.service.vllm_contract.stand import MODEL, asked, joined, speaking

CODES = grpc.StatusCode
LINES = {"ann": "load", "bob": "", "math": "tasks=math", "trio": "adapter=trio"}
TOKENS = {name: f"{name}-token-0123456789" for name in LINES}


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("".join(f"{TOKENS[name]} name={name} {rest}\n" for name, rest in LINES.items()))
    return file


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[name]}"),)


def names(response) -> list[str]:
    return [adapter.lora_name for adapter in response.adapters]


def test_the_server_describes_itself_as_sidecars_need_it():
    with speaking(reflection=True) as stand:
        info = stand.control.GetServerInfo(control_pb2.GetServerInfoRequest())
        assert (info.api_version, info.max_model_len, bool(info.instance_id)) == ("vllm", 256, True)
        assert not info.HasField("rl_capabilities") and not info.HasField("parallelism")
        model = stand.control.GetModelInfo(control_pb2.GetModelInfoRequest())
        assert (model.model_id, model.served_model_name) == (MODEL, MODEL)
        assert model.supports_lora and model.supports_token_ids_input and not model.supports_multimodal
        assert not stand.control.GetKvEventSources(control_pb2.GetKvEventSourcesRequest()).sources
        health = health_pb2_grpc.HealthStub(stand.running.channel)
        for service in ("vllm.Inference", "vllm.Control"):
            state = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert state == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(stand.running.channel).get_services()
        assert {"vllm.Inference", "vllm.Control", "loraf.v1.GenerationService"} <= set(services)


def test_a_server_that_loads_says_so():
    with speaking(warm=False) as stand:
        for call in (
            lambda: stand.control.GetServerInfo(control_pb2.GetServerInfoRequest()),
            lambda: stand.control.GetModelInfo(control_pb2.GetModelInfoRequest()),
            lambda: stand.inference.Generate(asked()),
        ):
            assert failure(call).code() is CODES.UNAVAILABLE


@pytest.mark.parametrize("method", ["Shutdown", "Sleep", "PauseGeneration", "UpdateWeights", "IsSleeping"])
def test_what_is_not_offered_is_unimplemented(method):
    with speaking() as stand:
        call = stand.running.channel.unary_unary(f"/vllm.Control/{method}")
        assert failure(lambda: call(b"")).code() is CODES.UNIMPLEMENTED


def test_the_list_names_adapters_tasks_and_named_sets():
    registry = two_adapters().with_sets(OperatorSets.parse(["trio/support=math:0.5+nlu"]))
    with speaking(adapters=registry) as stand:
        listed = stand.control.ListLoras(control_pb2.ListLorasRequest())
        assert names(listed) == [
            *("pair", "pair@code", "pair@nlu"),
            *("trio", "trio@code", "trio@math", "trio@nlu", "trio@support"),
        ]
        ids = [adapter.lora_id for adapter in listed.adapters]
        assert len(set(ids)) == len(ids) and min(ids) > 0
        assert [adapter.source_path for adapter in listed.adapters][3:5] == ["ckpt0", "ckpt0@code"]
        assert listed == stand.control.ListLoras(control_pb2.ListLorasRequest())  # the same numbers
        for name in names(listed):
            assert stand.inference.Generate(asked(lora_name=name)).outputs.text


def test_tokens_and_their_permissions(token_file):
    with speaking(token_file=token_file, root=checkpoints_root()) as stand:
        nobody = failure(lambda: stand.control.ListLoras(control_pb2.ListLorasRequest()))
        assert nobody.code() is CODES.UNAUTHENTICATED
        request = control_pb2.ListLorasRequest()
        assert names(stand.control.ListLoras(request, metadata=bearer("math"))) == ["trio@math"]
        assert names(stand.control.ListLoras(request, metadata=bearer("trio")))[0] == "trio"
        for who, name in (("math", "trio"), ("math", "trio@nlu"), ("trio", "pair")):
            refused = failure(lambda who=who, name=name: generate(stand, who, lora_name=name))
            assert refused.code() is CODES.PERMISSION_DENIED
        assert generate(stand, "math", lora_name="trio@math").outputs.text
        load = control_pb2.LoadLoraRequest(lora_name="new", source_path="ckpt1")
        assert failure(lambda: stand.control.LoadLora(load, metadata=bearer("bob"))).code() is CODES.PERMISSION_DENIED
        unload = control_pb2.UnloadLoraRequest(lora_name="trio")
        refused = failure(lambda: stand.control.UnloadLora(unload, metadata=bearer("bob")))
        assert refused.code() is CODES.PERMISSION_DENIED


def generate(stand, who, **fields):
    return stand.inference.Generate(asked(**fields), metadata=bearer(who))


@pytest.mark.parametrize("absolute", [False, True])
def test_an_adapter_is_loaded_and_unloaded(absolute):
    folder = checkpoint_folder(1)
    with speaking(adapters=one_adapter(), root=checkpoints_root()) as stand:
        path = str(folder) if absolute else folder.name
        load = control_pb2.LoadLoraRequest(lora_name="new", source_path=path)
        loaded = stand.control.LoadLora(load).adapter
        assert (loaded.lora_name, loaded.source_path) == ("new", "ckpt1") and loaded.lora_id > 0
        own = stand.running.generation.Generate(ask("hello", adapter="new", tasks={"nlu": 1.0}, max_tokens=20))
        assert stand.inference.Generate(asked(lora_name="new@nlu")).outputs.text == own.choices[0].text
        assert failure(lambda: stand.control.LoadLora(load)).code() is CODES.ALREADY_EXISTS
        assert stand.control.UnloadLora(control_pb2.UnloadLoraRequest(lora_name="new")).adapter == loaded
        assert failure(lambda: stand.inference.Generate(asked(lora_name="new"))).code() is CODES.NOT_FOUND


@pytest.mark.parametrize(
    ("name", "path", "code"),
    [
        ("new", "/etc", CODES.INVALID_ARGUMENT),
        ("new", "../outside", CODES.INVALID_ARGUMENT),
        ("new", "", CODES.INVALID_ARGUMENT),
        ("trio@math", "ckpt1", CODES.INVALID_ARGUMENT),
        ("", "ckpt1", CODES.INVALID_ARGUMENT),
        ("base", "ckpt1", CODES.INVALID_ARGUMENT),
    ],
)
def test_a_load_that_cannot_be(name, path, code):
    checkpoint_folder(1)
    with speaking(adapters=one_adapter(), root=checkpoints_root()) as stand:
        load = control_pb2.LoadLoraRequest(lora_name=name, source_path=path)
        error = failure(lambda: stand.control.LoadLora(load))
        assert error.code() is code
        assert str(checkpoints_root()) not in error.details()
        assert ("source_path" if name == "new" else "lora_name") in error.details()


def test_loading_is_off_without_a_root():
    with speaking(adapters=one_adapter()) as stand:
        load = control_pb2.LoadLoraRequest(lora_name="new", source_path="ckpt1")
        assert failure(lambda: stand.control.LoadLora(load)).code() is CODES.FAILED_PRECONDITION
        unload = control_pb2.UnloadLoraRequest(lora_name="trio")
        assert failure(lambda: stand.control.UnloadLora(unload)).code() is CODES.FAILED_PRECONDITION


# --- Abort


def long(request_id: str) -> vllm_pb.GenerateRequest:
    stopping = vllm_pb.StoppingCriteria(max_new_tokens=200)
    response = vllm_pb.ResponseOptions(output_token_ids=True)
    return asked("x", request_id=request_id, lora_name="trio", stopping=stopping, response=response)


def test_abort_ends_the_answer_and_the_backends_work():
    with speaking(FakeBackend(seconds_per_token=0.02)) as stand:
        stream = stand.inference.GenerateStream(long("mine"))
        pieces = [next(stream), next(stream), next(stream)]
        stand.control.Abort(control_pb2.AbortRequest(request_ids=["nobody's", "mine"]))
        pieces += list(stream)
        text, token_ids = joined(pieces)
        finish = pieces[-1].outputs.finish_info
        assert finish.finish_reason == vllm_pb.FinishInfo.ABORTED
        assert finish.num_output_tokens == len(token_ids) == len(text) < 200
        assert eventually(lambda: not stand.backend.running)
        assert len(stand.backend.closed_early) == 1
        stand.control.Abort(control_pb2.AbortRequest(request_ids=["mine"]))  # over: a no-op
        stand.control.Abort(control_pb2.AbortRequest())


def test_abort_of_a_unary_call_returns_what_there_is():
    with speaking(FakeBackend(seconds_per_token=0.02)) as stand:
        call = stand.inference.Generate.future(long("mine"))
        assert eventually(lambda: bool(stand.backend.running))
        stand.control.Abort(control_pb2.AbortRequest(request_ids=["mine"]))
        outputs = call.result(10).outputs
        assert outputs.finish_info.finish_reason == vllm_pb.FinishInfo.ABORTED
        assert outputs.num_tokens == len(outputs.text) < 200


def test_nobody_ends_the_request_of_another_client(token_file):
    with speaking(FakeBackend(seconds_per_token=0.01), token_file=token_file) as stand:
        request = long("mine")
        request.stopping.max_new_tokens = 40
        done = threading.Event()
        answers = []

        def run():
            answers.append(stand.inference.Generate(request, metadata=bearer("ann")))
            done.set()

        threading.Thread(target=run, daemon=True).start()
        assert eventually(lambda: bool(stand.backend.running))
        stand.control.Abort(control_pb2.AbortRequest(request_ids=["mine"]), metadata=bearer("bob"))
        assert done.wait(20)
        assert answers[0].outputs.finish_info.finish_reason == vllm_pb.FinishInfo.LENGTH


def test_a_client_that_goes_away_ends_its_request_and_nothing_stays():
    with speaking(FakeBackend(seconds_per_token=0.02)) as stand:
        stream = stand.inference.GenerateStream(long("gone"))
        next(stream)
        stream.cancel()
        assert eventually(lambda: not stand.backend.running)
        assert stand.backend.closed_early
