"""Every status is an error of its own class, with all that the server sent."""

from __future__ import annotations

import pickle

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from loraf_serve import client as public
from loraf_serve.client import ServiceError
from tests.loraf_serve.client.stand_in import CLIENTS, Refusal, call, standing_in

both = pytest.mark.parametrize("kind", CLIENTS)
DETAILS = "grpc-status-details-bin"


def refusal(code: grpc.StatusCode, *details, metadata=(), message: str = "no") -> Refusal:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return Refusal(code, message, ((DETAILS, status.SerializeToString()), *metadata))


def error_of(kind: type, refused: Refusal) -> ServiceError:
    with standing_in(refused) as (_, address), pytest.raises(ServiceError) as error:
        call(kind, address, "generate", "x", options={"retries": 0})
    return error.value


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_the_class_is_named_like_the_status(code):
    error = error_of(CLIENTS[0], Refusal(code, "why"))
    named = getattr(public, "".join(part.capitalize() for part in code.name.split("_")), ServiceError)
    assert type(error) is named and (error.code, error.message) == (code.name, "why")
    # The server refuses with none of these.
    assert named is not ServiceError or code.name in ("UNKNOWN", "ABORTED", "OUT_OF_RANGE")


@both
def test_an_error_has_everything_that_the_server_sent(kind):
    violation = error_details_pb2.BadRequest.FieldViolation(field="prompt", description="is empty")
    details = (
        error_details_pb2.BadRequest(field_violations=[violation]),
        error_details_pb2.RequestInfo(request_id="abc"),
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
    )
    error = error_of(kind, refusal(grpc.StatusCode.INVALID_ARGUMENT, *details))
    assert type(error) is public.InvalidArgument
    assert (error.violations, error.retry_after, error.request_id) == ((("prompt", "is empty"),), 1.5, "abc")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and vars(again) == vars(error) and str(again) == str(error)


@both
def test_the_request_id_comes_from_the_metadata_where_there_are_no_details(kind):
    error = error_of(kind, Refusal(grpc.StatusCode.INTERNAL, metadata=(("loraf-request-id", "abc"),)))
    assert type(error) is public.Internal and error.request_id == "abc"


@both
@pytest.mark.parametrize(
    "details",
    [b"\xff\xff", status_pb2.Status(code=5, message="another").SerializeToString()],
    ids=["no message", "another status"],
)
def test_details_that_a_proxy_has_spoilt_do_not_hide_the_status(kind, details):
    error = error_of(kind, Refusal(grpc.StatusCode.PERMISSION_DENIED, "no", ((DETAILS, details),)))
    assert type(error) is public.PermissionDenied and error.message == "no" and error.violations == ()


@both
def test_no_server_is_told_with_its_address(kind):
    with pytest.raises(public.Unavailable, match="no server can be reached at 127.0.0.1:9") as error:
        call(kind, "127.0.0.1:9", "adapters", options={"retries": 1})
    assert error.value.request_id == ""


@both
def test_a_stream_raises_the_same_errors(kind):
    refused = refusal(grpc.StatusCode.NOT_FOUND, error_details_pb2.RequestInfo(request_id="abc"))
    with standing_in(refused) as (_, address), pytest.raises(public.NotFound) as error:
        call(kind, address, "stream", "x")
    assert error.value.request_id == "abc"
