"""Adapters change while requests run: every interleaving ends with the right content there, added and freed once."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf import manifest
from loraf.errors import BaseMismatch, Problem, UnknownTask
from loraf.manifest import Templates
from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.adapters.registry import Registry
from loraf_serve.adapters.root import AdapterRoot
from loraf_serve.backends.backend import BackendUnavailable
from loraf_serve.errors import LoadingOff, NameTaken
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, on_a_loop, open_adapter
from tests.loraf_serve.library_stand import CONTENTS, FIRST, SECOND, digest, library, quiet, until

# --- versions


@on_a_loop
async def test_requests_end_on_the_version_that_they_began_with():
    async with library() as (made, backend):
        old = await made.load("a", *FIRST)
        with made.lease("a") as before:
            new = await made.load("a", *SECOND, replace=True)
            assert (old.digest, new.digest) == (digest(FIRST), digest(SECOND))
            with made.lease("a") as after:
                assert before.get("a") is old and after.get("a") is new is made.registry.get("a")
            await quiet(made)
            assert backend.added == {old.digest, new.digest}
        await quiet(made)
        assert backend.history == [("add", old.digest), ("add", new.digest), ("remove", old.digest)]


@on_a_loop
async def test_the_last_of_several_requests_frees_the_content():
    async with library() as (made, backend):
        await made.load("a", *FIRST)
        with ExitStack() as first, ExitStack() as second:
            first.enter_context(made.lease("a"))
            second.enter_context(made.lease(""))  # the only one
            await made.load("a", *SECOND, replace=True)
            first.close()
            await quiet(made)
            assert digest(FIRST) in backend.added
        await quiet(made)
        assert backend.added == {digest(SECOND)}


@on_a_loop
async def test_loading_the_same_content_again_changes_nothing():
    async with library() as (made, backend):
        first = await made.load("a", *FIRST)
        again = await made.load("a", *FIRST, replace=True)
        assert again.digest == first.digest
        assert again.checkpoint.tasks is first.checkpoint.tasks  # in memory once
        assert backend.history == [("add", first.digest)]


@on_a_loop
async def test_templates_which_the_digest_does_not_cover_come_from_the_new_load(tmp_path):
    """Templates are no part of the content, but of what a request with apply_task_template gets."""
    shutil.copytree(checkpoint_folder(), tmp_path / "other")
    found = manifest.read(tmp_path / "other")
    tasks = tuple(dataclasses.replace(task, templates=Templates("Again: {prompt}")) for task in found.tasks)
    (tmp_path / "other/loraf.json").write_text(dataclasses.replace(found, tasks=tasks).to_json())
    shutil.copytree(checkpoint_folder(), tmp_path / "one")
    async with library(root=tmp_path) as (made, backend):
        await made.load("a", "one")
        again = await made.load("a", "other", replace=True)
        assert made.registry.get("a").manifest.task("math").templates.prompt == "Again: {prompt}"
        assert backend.history == [("add", again.digest)]


@on_a_loop
async def test_content_under_two_names_is_held_once():
    async with library() as (made, backend):
        await made.load("a", *FIRST)
        await made.load("b", *FIRST)
        with made.lease("b"):
            found = await made.unload("a")
            assert (found.running, found.other_names) == (1, ("b",))
            found = await made.unload("b")
            assert (found.running, found.other_names) == (1, ())
            assert backend.history == [("add", digest(FIRST))]
        await quiet(made)
        assert backend.history == [("add", digest(FIRST)), ("remove", digest(FIRST))]


@on_a_loop
async def test_content_that_is_loaded_again_while_it_drains_stays():
    async with library() as (made, backend):
        await made.load("a", *FIRST)
        with made.lease("a"):
            await made.load("a", *SECOND, replace=True)
            await made.load("b", *FIRST)
        await quiet(made)
        assert backend.history == [("add", digest(FIRST)), ("add", digest(SECOND))]


@on_a_loop
async def test_content_that_is_loaded_again_while_it_is_being_freed_is_added_again():
    async with library() as (made, backend):
        await made.load("a", *FIRST)
        backend.remove_gate = asyncio.Event()
        unloading = asyncio.create_task(made.unload("a"))
        await until(lambda: backend._changing)
        loading = asyncio.create_task(made.load("b", *FIRST))
        await asyncio.sleep(0.05)
        assert not loading.done() and not unloading.done() and "a" not in made.registry
        backend.remove_gate.set()
        await asyncio.gather(loading, unloading)
        assert [what for what, _ in backend.history] == ["add", "remove", "add"]


@on_a_loop
async def test_unload_removes_the_name_at_once_and_waits_only_for_the_memory():
    async with library() as (made, backend):
        await made.load("a", *FIRST)
        await made.load("b", *SECOND)
        with made.lease("a"):
            assert (await made.unload("a")).running == 1
            with made.lease("a") as now, pytest.raises(UnknownTask, match="choose from: b"):
                now.find("a")
        await quiet(made)
        backend.remove_gate = asyncio.Event()
        unloading = asyncio.create_task(made.unload("b"))
        await until(lambda: "b" not in made.registry)
        await asyncio.sleep(0.05)
        assert not unloading.done()
        backend.remove_gate.set()
        assert (await unloading).running == 0
        assert backend.added == set()


@on_a_loop
async def test_adapters_of_the_command_line_can_be_replaced_and_unloaded():
    given_ones = [open_adapter(name, checkpoint_folder()) for name in ("a", "b")]
    async with library(registry=Registry(given_ones)) as (made, backend):
        await made.load("a", *SECOND, replace=True)
        assert [adapter.name for adapter in made.registry] == ["a", "b"]
        await made.unload("b")
        assert backend.history == [("add", digest(FIRST)), ("add", digest(SECOND)), ("remove", digest(FIRST))]


# --- failures


@on_a_loop
async def test_a_taken_name_is_refused_unless_replace_is_set():
    async with library() as (made, backend):
        old = await made.load("a", *FIRST)
        with pytest.raises(NameTaken, match="'a' is taken → set replace"):
            await made.load("a", *FIRST)
        assert made.registry.get("a") is old and backend.history == [("add", old.digest)]


@pytest.mark.parametrize(
    "failure",
    [BaseMismatch(Problem("rank 8 is too large")), RuntimeError("out of memory"), BackendUnavailable("died")],
    ids=lambda failure: type(failure).__name__,
)
@on_a_loop
async def test_an_adapter_that_the_backend_refuses_changes_nothing(failure):
    async with library() as (made, backend):
        old = await made.load("a", *FIRST)
        backend.add_failure = failure
        for name, replace in (("a", True), ("b", False)):
            with pytest.raises(type(failure), match=str(failure)):
                await made.load(name, *SECOND, replace=replace)
        backend.add_failure = None
        assert list(made.registry) == [old] and backend.history == [("add", old.digest)]
        assert (await made.load("a", *SECOND, replace=True)).digest == digest(SECOND)


@on_a_loop
async def test_a_removal_that_fails_is_reported_and_leaves_the_name_free():
    async with library() as (made, backend):
        await made.load("a", *FIRST)
        backend.remove_failure = RuntimeError("the device is gone")
        with pytest.raises(RuntimeError, match="the device is gone"):
            await made.unload("a")
        assert "a" not in made.registry
        backend.remove_failure = None
        backend.added.clear()
        backend.history.clear()
        await made.load("a", *FIRST)  # the backend is asked again


@pytest.mark.parametrize("where", ["waiting", "finding", "reading", "adding"])
@pytest.mark.parametrize("replace", [False, True])
@on_a_loop
async def test_a_load_that_is_cancelled_leaves_everything_as_it_was(monkeypatch, where, replace):
    async with library() as (made, backend):
        old = await made.load("a", *FIRST)
        name = "a" if replace else "b"
        if where == "waiting":
            await made._changing.acquire()
        elif where == "adding":
            backend.add_gate = asyncio.Event()
        else:
            method = {"finding": "find", "reading": "open"}[where]
            go_on, began, original = threading.Event(), threading.Event(), getattr(AdapterRoot, method)

            def slow(*arguments):
                began.set()
                assert go_on.wait(10)
                return original(*arguments)

            monkeypatch.setattr(AdapterRoot, method, slow)
        load = asyncio.create_task(made.load(name, *SECOND, replace=replace))
        if where == "waiting":
            await asyncio.sleep(0.02)
        elif where == "adding":
            await until(lambda: backend._changing)
        else:
            await until(began.is_set)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert list(made.registry) == [old]
        if where == "waiting":
            made._changing.release()
        elif where == "adding":
            backend.add_gate.set()
        else:
            go_on.set()
        await quiet(made)
        assert list(made.registry) == [old] and backend.added == {old.digest}
        assert (await made.load(name, *SECOND, replace=replace)).digest == digest(SECOND)


@on_a_loop
async def test_a_cancelled_unload_still_removes_the_name_and_frees_the_memory():
    async with library() as (made, backend):
        await made.load("a", *FIRST)
        backend.remove_gate = asyncio.Event()
        unload = asyncio.create_task(made.unload("a"))
        await until(lambda: backend._changing)
        unload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unload
        backend.remove_gate.set()
        await quiet(made)
        assert backend.added == set()


@on_a_loop
async def test_loads_come_one_after_the_other():
    async with library() as (made, backend):
        backend.add_gate = asyncio.Event()
        loads = [asyncio.create_task(made.load(name, *content)) for name, content in zip("abcd", CONTENTS, strict=True)]
        await until(lambda: backend._changing)
        assert not any(load.done() for load in loads) and not made.registry
        backend.add_gate.set()
        await asyncio.gather(*loads)  # the fake refuses two changes at once
        assert [adapter.name for adapter in made.registry] == list("abcd")


@on_a_loop
async def test_of_two_loads_under_one_name_the_second_is_refused():
    async with library() as (made, _):
        loads = [asyncio.create_task(made.load("a", *content)) for content in (FIRST, SECOND)]
        first, second = await asyncio.gather(*loads, return_exceptions=True)
        assert isinstance(second, NameTaken) and made.registry.get("a") is first


@on_a_loop
async def test_closing_cancels_a_load_in_progress():
    backend = FakeBackend()
    async with library(backend) as (made, _):
        backend.add_gate = asyncio.Event()
        load = asyncio.create_task(made.load("a", *FIRST))
        await until(lambda: backend._changing)
        await made.close()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert not made.registry


@on_a_loop
async def test_without_a_root_nothing_changes():
    backend = FakeBackend()
    await backend.start()
    adapter = open_adapter("a", checkpoint_folder())
    made = AdapterLibrary(backend, Registry([adapter]))
    await made.start()
    with pytest.raises(LoadingOff, match="--adapter-root"):
        await made.load("b", *SECOND)
    with pytest.raises(LoadingOff):
        await made.unload("a")
    assert list(made.registry) == [adapter]
    await made.close()


# --- any order of events

event = st.one_of(
    st.tuples(st.just("load"), st.sampled_from("abc"), st.sampled_from(CONTENTS), st.booleans()),
    st.tuples(st.just("unload"), st.sampled_from("abc")),
    st.tuples(st.just("begin"), st.sampled_from("abc")),
    st.tuples(st.just("end"), st.integers(0, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.sampled_from([0, 1, 3, 10])),
)


@given(events=st.lists(event, min_size=3, max_size=25), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_any_order_of_events_ends_with_exactly_the_needed_content(events, seed):
    asyncio.run(play(events, seed))


async def play(events, seed: int) -> None:
    """Requests look at the backend at each turn: what they run on must be there."""
    backend, tasks, requests = FakeBackend(), [], []

    async def request(made: AdapterLibrary, name: str, over: asyncio.Event) -> None:
        with made.lease(name) as registry:
            if name not in registry:
                return
            adapter = registry.get(name)
            while not over.is_set():
                assert adapter.digest in backend.added
                await asyncio.sleep(0)

    async with library(backend) as (made, _):
        for i, (what, *arguments) in enumerate(events):
            if what == "load":
                name, content, replace = arguments
                tasks.append(asyncio.create_task(made.load(name, *content, replace=replace)))
            elif what == "unload":
                tasks.append(asyncio.create_task(made.unload(*arguments)))
            elif what == "begin":
                over = asyncio.Event()
                requests.append((asyncio.create_task(request(made, arguments[0], over)), over))
            elif what == "end" and requests:
                requests[arguments[0] % len(requests)][1].set()
            elif what == "cancel" and tasks:
                tasks[arguments[0] % len(tasks)].cancel()
            elif what == "wait":
                await asyncio.sleep(arguments[0] / 1000)
            if (i + seed) % 4:
                await asyncio.sleep(0)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        expected = (NameTaken, UnknownTask, asyncio.CancelledError)
        assert not [o for o in outcomes if isinstance(o, BaseException) and not isinstance(o, expected)], outcomes
        for _, over in requests:
            over.set()
        await asyncio.gather(*(task for task, _ in requests))
        assert not made._leases
