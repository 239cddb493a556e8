"""Python client for loraf-serve.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("2 + 3 =", tasks=["math"], temperature=0).text)
        for piece in client.stream("2 + 3 =", tasks={"math": 1.0, "nlu": 0.5}, max_tokens=100):
            print(piece.text, end="")

Without `tasks`, `as_trained` or `base`, all tasks of the adapter are used. For requests that this client does not
cover, use the messages and stubs in `loraf_serve.v1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from loraf_serve.addresses import DEFAULT_ADDRESS, host_of, is_local
from loraf_serve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

Request = TypeVar("Request", generation_pb2.GenerateRequest, generation_pb2.StreamGenerateRequest)


class ServiceError(Exception):
    """The server refused the request, failed, or cannot be reached.

    Attributes:
        code: name of the gRPC status, such as "NOT_FOUND".
        message: the server's text.
        violations: with INVALID_ARGUMENT, (field, description) of each mistake.
        retry_after: with RESOURCE_EXHAUSTED from a full queue, seconds after which to try again; else None.
    """

    def __init__(
        self,
        code: str,
        message: str,
        violations: Sequence[tuple[str, str]] = (),
        retry_after: float | None = None,
    ):
        self.code = code
        self.message = message
        self.violations = tuple(violations)
        self.retry_after = retry_after
        super().__init__(f"{code}:\n{message}" if "\n" in message else f"{code}: {message}")

    def __reduce__(self) -> tuple[type[ServiceError], tuple[Any, ...]]:
        return (type(self), (self.code, self.message, self.violations, self.retry_after))


@dataclass(frozen=True)
class Piece:
    """A new piece of one answer.

    Attributes:
        index: which of the `n` answers, from 0.
        finish_reason: "" until the last piece, then "stop", "length" or "aborted".
        response: the whole message: log-probabilities; usage in the last; served_by in the first and the last.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    response: generation_pb2.StreamGenerateResponse


@dataclass(frozen=True)
class Answer:
    """The first of the `n` answers.

    Attributes:
        finish_reason: "stop", "length" or "aborted".
        response: the whole message: all answers, log-probabilities, usage, served_by.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    response: generation_pb2.GenerateResponse

    def __str__(self) -> str:
        return self.text


class Client:
    """A connection to a server. Use it as a context manager, or call `close`. Safe to use from several threads.

    Args:
        address: host:port, or a Unix socket (unix:/path).
        tls: connect over TLS, and trust the system's authorities.
        tls_ca: PEM file of the authority that signed the server's certificate; implies `tls`.
        tls_cert, tls_key: PEM files of this client's certificate and private key, if the server requires one.
        timeout: seconds for each request, None for no limit; every method can override it.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: bool = False,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        timeout: float | None = None,
    ):
        self.address = address
        self.timeout = timeout
        options: list[tuple[str, int]] = [("grpc.max_receive_message_length", -1)]
        if is_local(host_of(address)):
            options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot reach this machine's loopback
        if tls or tls_ca or tls_cert:
            parts = [Path(file).read_bytes() if file else None for file in (tls_ca, tls_key, tls_cert)]
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*parts), options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        # Generated code for services has no types, hence the ignores.
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def generate(self, prompt: str | None = None, *, timeout: float | None = None, **request: Any) -> Answer:
        """Generates one answer (or `n`) and returns it when it is complete.

        Args:
            prompt: text; alternatively give `messages` or `prompt_token_ids`.
            timeout: seconds.
            **request: see `request_of`.

        Raises:
            ServiceError: the server refused the request, failed, or cannot be reached.
        """
        try:
            message = request_of(generation_pb2.GenerateRequest, prompt, **request)
            response = self._generation.Generate(message, timeout=self._seconds(timeout))
        except grpc.RpcError as error:
            raise _service_error(error, self.address) from None
        first = response.choices[0]
        return Answer(first.text, tuple(first.token_ids), _finish_reason(first), response)

    def stream(self, prompt: str | None = None, *, timeout: float | None = None, **request: Any) -> Iterator[Piece]:
        """Yields the answer in pieces, as it is generated. Arguments and errors as `generate`.

        Leaving the loop early, or closing the iterator, cancels the request.
        """
        call = self._generation.StreamGenerate(
            request_of(generation_pb2.StreamGenerateRequest, prompt, **request), timeout=self._seconds(timeout)
        )
        try:
            for response in call:
                for choice in response.choices:
                    yield Piece(choice.index, choice.text, tuple(choice.token_ids), _finish_reason(choice), response)
        except grpc.RpcError as error:
            raise _service_error(error, self.address) from None
        finally:
            call.cancel()

    def adapters(self, *, timeout: float | None = None) -> list[adapter_pb2.Adapter]:
        """Lists the loaded adapters. Raises ServiceError."""
        try:
            request = adapter_pb2.ListAdaptersRequest()
            return list(self._adapters.ListAdapters(request, timeout=self._seconds(timeout)).adapters)
        except grpc.RpcError as error:
            raise _service_error(error, self.address) from None

    def load_adapter(
        self,
        name: str,
        path: str,
        tasks: Sequence[str] | None = None,
        replace: bool = False,
        *,
        timeout: float | None = None,
    ) -> adapter_pb2.Adapter:
        """Loads a checkpoint under a name while the server continues to serve.

        Args:
            path: the checkpoint's folder, relative to the server's `--adapter-root`.
            tasks: load only these; None for all.
            replace: replace the adapter of this name; running requests end on the old content.

        Raises:
            ServiceError: nothing has changed. FAILED_PRECONDITION: the server has no `--adapter-root`;
                ALREADY_EXISTS: the name is taken; RESOURCE_EXHAUSTED: the server has no memory for it.
        """
        if isinstance(tasks, str):
            raise TypeError(f"tasks is a list of names: tasks=[{tasks!r}]")
        request = adapter_pb2.LoadAdapterRequest(name=name, path=path, tasks=tasks, replace=replace)
        try:
            response: adapter_pb2.LoadAdapterResponse = self._adapters.LoadAdapter(
                request, timeout=self._seconds(timeout)
            )
        except grpc.RpcError as error:
            raise _service_error(error, self.address) from None
        return response.adapter

    def unload_adapter(self, name: str, *, timeout: float | None = None) -> adapter_pb2.UnloadAdapterResponse:
        """Unloads an adapter. The response names what still needs its content; if nothing does, its memory is freed.

        Raises:
            ServiceError: FAILED_PRECONDITION: the server has no `--adapter-root`; NOT_FOUND: there is no such adapter.
        """
        try:
            request = adapter_pb2.UnloadAdapterRequest(name=name)
            response: adapter_pb2.UnloadAdapterResponse = self._adapters.UnloadAdapter(
                request, timeout=self._seconds(timeout)
            )
        except grpc.RpcError as error:
            raise _service_error(error, self.address) from None
        return response

    def health(self, *, timeout: float | None = None) -> str:
        """Returns "SERVING", or "NOT_SERVING" while the server loads or drains, or when its engine is gone.

        Raises:
            ServiceError: the server cannot be reached.
        """
        try:
            response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=self._seconds(timeout))
        except grpc.RpcError as error:
            raise _service_error(error, self.address) from None
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def wait_until_serving(self, timeout: float) -> None:
        """Waits until the server is serving.

        Args:
            timeout: seconds.

        Raises:
            ServiceError: it was not serving in time (DEADLINE_EXCEEDED).
        """
        # Watch reports every change; wait_for_ready also waits for a server that does not listen yet.
        call = self._health.Watch(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=True)
        try:
            for response in call:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        except grpc.RpcError as error:
            raise _service_error(error, self.address) from None
        finally:
            call.cancel()

    def _seconds(self, timeout: float | None) -> float | None:
        return self.timeout if timeout is None else timeout


def request_of(
    kind: type[Request],
    prompt: str | None = None,
    *,
    messages: Sequence[Mapping[str, str]] | None = None,
    prompt_token_ids: Sequence[int] | None = None,
    adapter: str = "",
    adapter_digest: str = "",
    tasks: Sequence[str] | Mapping[str, float] | None = None,
    as_trained: str | None = None,
    base: bool = False,
    apply_task_template: bool = False,
    request_id: str = "",
    **sampling: Any,
) -> Request:
    """Makes a request message.

    Args:
        kind: GenerateRequest or StreamGenerateRequest.
        messages: a chat, as [{"role": "user", "content": "…"}].
        tasks: use exactly these tasks: names, or a mapping from names to weights.
        as_trained: use the task set that was active when this task had just been trained.
        base: use the base model without any task.
        apply_task_template: put the prompt into the template that the selected task was trained with.
        sampling: fields of SamplingParams: max_tokens, temperature, top_p, stop, …

    Raises:
        TypeError: several inputs or selections, an unknown sampling field, or a value of the wrong type.
        ValueError: a number out of its field's range.
    """
    if (prompt is not None) + (messages is not None) + (prompt_token_ids is not None) > 1:
        raise TypeError("give one of prompt, messages and prompt_token_ids")
    if (tasks is not None) + (as_trained is not None) + bool(base) > 1:
        raise TypeError("give one of tasks, as_trained and base, or none of them for all tasks")
    if isinstance(tasks, str):
        raise TypeError(f"tasks is a list of names: tasks=[{tasks!r}]")
    request = kind(
        adapter=adapter,
        adapter_digest=adapter_digest,
        apply_task_template=apply_task_template,
        request_id=request_id,
        sampling=_sampling(sampling),
    )
    if prompt is not None:
        request.prompt = prompt
    elif messages is not None:
        request.messages.SetInParent()
        for message in messages:
            request.messages.messages.add(**message)
    elif prompt_token_ids is not None:
        request.prompt_token_ids.SetInParent()
        request.prompt_token_ids.ids.extend(prompt_token_ids)
    if tasks is not None:
        request.task_selection.tasks.SetInParent()
        for name in tasks:
            weight = tasks[name] if isinstance(tasks, Mapping) else None
            request.task_selection.tasks.tasks.add(name=name, weight=weight)
    elif as_trained is not None:
        request.task_selection.as_trained.name = as_trained
        request.task_selection.as_trained.SetInParent()
    elif base:
        request.task_selection.base.SetInParent()
    return request


def _sampling(fields: Mapping[str, Any]) -> generation_pb2.SamplingParams:
    params = generation_pb2.SamplingParams()
    for name, value in fields.items():
        if name not in params.DESCRIPTOR.fields_by_name:
            raise TypeError(f"SamplingParams has no field {name}")
        try:
            params.MergeFrom(generation_pb2.SamplingParams(**{name: value}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}={value!r}: {error}") from None
    return params


def _finish_reason(choice: generation_pb2.Choice) -> str:
    if not choice.finish_reason:
        return ""
    return generation_pb2.FinishReason.Name(choice.finish_reason).removeprefix("FINISH_REASON_").lower()


def _service_error(error: grpc.RpcError, address: str) -> ServiceError:
    assert isinstance(error, grpc.Call)  # every RpcError of a call is one
    code = error.code()
    message = error.details() or ""
    status = rpc_status.from_call(error)
    violations: list[tuple[str, str]] = []
    retry_after = None
    for detail in status.details if status else ():
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad_request):
            violations = [(v.field, v.description) for v in bad_request.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in message.lower():
        message = f"no server can be reached at {address} ({message})"
    return ServiceError(code.name, message, violations, retry_after)
