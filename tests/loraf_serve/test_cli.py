"""`loraf-serve` from the command line: what it refuses before an engine starts, which backend it takes, and the whole
way once with the merged backend."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import huggingface_hub
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from loraf.errors import BaseMismatch, ConfigError, CorruptCheckpoint
from loraf_serve import choose_backend, cli, client_cli
from loraf_serve.adapters.adapter_spec import AdapterSpec, open_adapter, parse_spec
from loraf_serve.client import Client
from loraf_serve.launch import launch
from tests.loraf_serve.damage import change_the_manifest, cut_a_byte, damaged, flip_a_bit
from tests.loraf_serve.harness import checkpoint_folder, model_folder
from tests.standins import make_model
from tests.tools import needs

HEAVY = ("torch", "transformers", "vllm", "grpc", "google.protobuf", "huggingface_hub", "numpy")


# --- --help


@pytest.mark.parametrize("module", ["loraf_serve.cli", "loraf_serve.client_cli"])
def test_help_is_quick_and_imports_nothing_heavy(module):
    script = f"import sys, {module} as m\ntry: m.main(['--help'])\nexcept SystemExit as e: code = e.code\n"
    script += f"print('LOADED', code, [name for name in {HEAVY} if name in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.rstrip().endswith("LOADED 0 []")
    # Processor time: the clock would measure what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_names_every_option_of_the_server(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for option in cli.parser()._option_string_actions:
        assert option in text


# --- --adapter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("./ckpt", ("ckpt", "./ckpt", None)),
        ("./ckpt/", ("ckpt", "./ckpt/", None)),
        ("prod=./ckpt", ("prod", "./ckpt", None)),
        ("./ckpt@math", ("ckpt", "./ckpt", ("math",))),
        ("prod=/a/b@math+nlu", ("prod", "/a/b", ("math", "nlu"))),
        ("org/adapter", ("adapter", "org/adapter", None)),
        ("a=org/adapter@x", ("a", "org/adapter", ("x",))),
        # `=` and `@` within a path
        ("/data/seed=3/ckpt", ("ckpt", "/data/seed=3/ckpt", None)),
        ("/home/me@work/ckpt", ("ckpt", "/home/me@work/ckpt", None)),
        ("a=/home/me@work/ckpt@x", ("a", "/home/me@work/ckpt", ("x",))),
        ("a=b=c", ("a", "b=c", None)),
    ],
)
def test_an_adapter_option_is_read(text, expected):
    assert parse_spec(text) == AdapterSpec(text, *expected)


def test_a_folder_is_named_after_itself(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert parse_spec(".").name == "mine"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no checkpoint"),
        ("a=", "names no checkpoint"),
        ("a=@x", "names no checkpoint"),
        ("./ckpt@", "is not a task name"),
        ("./ckpt@Math", "is not a task name"),
        ("./ckpt@a+a", "names a task twice"),
        ("./My Adapter", "cannot be the adapter's name"),
        ("all=./ckpt", "'all' is reserved"),
        ("=./ckpt", "cannot be"),
        ("A=./ckpt", "is not a valid adapter name"),
    ],
)
def test_an_adapter_option_that_cannot_be_read_is_refused(text, says):
    if text == "=./ckpt":
        assert parse_spec(text).name == "ckpt"  # an empty name is no name
        return
    with pytest.raises(ConfigError, match=says):
        parse_spec(text)


# --- refused before an engine starts


@pytest.fixture
def no_engine(monkeypatch):
    def never(*args):
        raise AssertionError("an engine would have been started")

    monkeypatch.setattr(choose_backend, "choose", never)


def refused(capsys, *arguments: str) -> str:
    assert cli.main([*arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and not captured.out
    return captured.err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_a_byte, ("nlu.safetensors", "expected)")),
        (change_the_manifest, ("loraf.json", "digest")),
        (lambda folder: (folder / "tasks" / "math.safetensors").unlink(), ("math.safetensors", "cannot be read")),
        (lambda folder: (folder / "loraf.json").unlink(), ("ckpt", "there is no loraf.json")),
    ],
)
def test_damage_that_the_manifest_tells_is_refused_before_an_engine_starts(tmp_path, capsys, no_engine, damage, says):
    folder = damaged(tmp_path, damage)
    text = refused(capsys, "--model", str(model_folder()), "--adapter", str(folder))
    assert all(part in text for part in says)
    assert "→" in text  # a remedy


def test_a_task_that_is_not_chosen_is_not_read(tmp_path):
    folder = damaged(tmp_path, flip_a_bit)
    adapter = open_adapter(parse_spec(f"{folder}@math"), model_folder())
    assert adapter.tasks == ("math",)
    with pytest.raises(CorruptCheckpoint):
        open_adapter(parse_spec(str(folder)), model_folder())


def test_another_base_model_is_refused_unless_allow_other_base_is_set(tmp_path, capsys, no_engine):
    other = make_model("mistral", tmp_path / "other", seed=1)
    text = refused(capsys, "--model", str(other), "--adapter", str(checkpoint_folder()))
    assert "other weights" in text and "--allow-other-base" in text
    with pytest.raises(BaseMismatch):
        open_adapter(parse_spec(str(checkpoint_folder())), other)
    assert open_adapter(parse_spec(str(checkpoint_folder())), other, allow_other_base=True)


def test_every_mistake_is_named_at_once(tmp_path, capsys, no_engine):
    folder = damaged(tmp_path, cut_a_byte)
    ckpt = checkpoint_folder()
    adapters = [f"a={folder}", f"b={ckpt}@art", f"c={ckpt}", f"c={ckpt}", "./nowhere", f"e={ckpt}@x+x"]
    options = ["--model", str(model_folder()), "--port", "99999", "--grace", "-1", "--host", "0.0.0.0"]
    text = refused(capsys, *options, *(part for adapter in adapters for part in ("--adapter", adapter)))
    for says in (
        "--port: 99999",
        "--grace: -1",
        "--host: 0.0.0.0 can be reached",
        "nlu.safetensors",
        f"--adapter b={ckpt}@art: there is no task 'art' → choose from: math, nlu, code",
        "the name 'c' is taken",
        "there is no checkpoint './nowhere'",
        "names a task twice",
    ):
        assert says in text, says


def test_a_wrong_model_does_not_hide_other_mistakes(capsys, no_engine):
    text = refused(capsys, "--model", "./nowhere", "--adapter", "A=x", "--max-queue", "0")
    assert "there is no model './nowhere'" in text and "--adapter A=x" in text and "--max-queue" in text


def test_a_model_whose_config_cannot_be_read_is_refused(tmp_path, capsys, no_engine):
    (tmp_path / "config.json").write_text("{")
    text = refused(capsys, "--model", str(tmp_path), "--port", "-1")
    assert "config.json: cannot be read" in text and "--port" in text


def test_a_checkpoint_without_its_option_is_refused_by_name(capsys, no_engine):
    text = refused(capsys, "--model", str(model_folder()), "./ckpt", "--dtype", "float32")
    assert "./ckpt: is not an option → checkpoints come after --adapter" in text


def test_an_option_that_argparse_refuses_ends_with_2():
    for wrong in (["--port", "x"], [], ["--model", "tiny", "--backend", "fastest"]):
        with pytest.raises(SystemExit) as error:
            cli.main(wrong)
        assert error.value.code == 2


# --- the hub


@pytest.mark.parametrize(
    ("spec", "patterns"),
    [
        ("org/adapter", ["loraf.json", "tasks/*.safetensors"]),
        ("org/adapter@nlu+math", ["loraf.json", "tasks/nlu.safetensors", "tasks/math.safetensors"]),
    ],
)
def test_from_the_hub_only_what_is_served_is_downloaded(monkeypatch, spec, patterns):
    asked = []

    def download(repository, allow_patterns, **options):
        assert not any(options.values())
        asked.append((repository, allow_patterns))
        return str(checkpoint_folder())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    adapter = open_adapter(parse_spec(spec), model_folder())
    assert asked == [("org/adapter", patterns)]
    assert adapter.name == "adapter"


def test_a_failed_download_is_a_mistake_of_the_user(monkeypatch, capsys, no_engine):
    def download(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    text = refused(capsys, "--model", str(model_folder()), "--adapter", "org/adapter")
    assert "org/adapter is not a local folder and could not be downloaded from the hub (offline and more)" in text


# --- which backend


@pytest.fixture
def obstacle(monkeypatch):
    """Sets what speaks against vLLM, and against the resident backend."""
    from loraf_serve.vllm.engine import support

    def set_them(vllm: str | None, resident: str | None = None) -> None:
        monkeypatch.setattr(support, "can_serve", lambda folder: vllm)
        monkeypatch.setattr(support, "can_serve_resident", lambda folder: resident)

    return set_them


def chosen(wanted: str, *options: str) -> choose_backend.BackendChoice:
    return choose_backend.choose(wanted, model_folder(), options, 8, print)


def test_auto_takes_resident_where_it_can_and_hands_it_the_engines_options(obstacle):
    pytest.importorskip("vllm", reason=needs("vLLM"))
    obstacle(None)
    found = chosen("auto", "--dtype", "float32")
    assert found.backend.name == "resident"
    assert found.backend._current._engine_options == ("--dtype", "float32")


def test_auto_takes_slots_where_resident_cannot_or_an_option_is_about_slots(obstacle):
    pytest.importorskip("vllm", reason=needs("vLLM"))
    obstacle(None, "no kernels")
    assert (chosen("auto").backend.name, chosen("auto").reason) == ("slots", "not resident: no kernels")
    obstacle(None)
    found = chosen("auto", "--max-loras", "3")
    assert (found.backend.name, found.reason) == ("slots", "not resident: --max-loras is an option of slots")
    slots = found.backend._current
    assert slots._engine_options == ("--max-loras", "3") and slots._max_rank == 8


def test_auto_takes_slots_where_resident_is_not_the_default(obstacle, monkeypatch):
    pytest.importorskip("vllm", reason=needs("vLLM"))
    from loraf_serve.vllm.engine import support

    obstacle(None)
    monkeypatch.setattr(support, "not_by_default", lambda: "on a GPU")
    assert (chosen("auto").backend.name, chosen("auto").reason) == ("slots", "not resident: on a GPU")
    assert chosen("resident").backend.name == "resident"


def test_auto_takes_merged_where_vllm_cannot_and_says_why(obstacle):
    obstacle("vLLM is not installed")
    found = chosen("auto", "--dtype", "float32", "--max-model-len=64")
    assert (found.backend.name, found.reason) == ("merged", "vLLM is not installed")
    assert (found.backend._dtype, found.backend._max_model_len) == ("float32", 64)


def test_a_requested_backend_that_cannot_serve_is_refused(obstacle):
    obstacle("vLLM does not support LoRA for Mamba")
    for wanted in ("slots", "resident"):
        with pytest.raises(ConfigError, match="vLLM does not support LoRA for Mamba → .* --backend merged"):
            chosen(wanted)
    obstacle(None, "no kernels")
    with pytest.raises(ConfigError, match="no kernels → .* --backend slots"):
        chosen("resident")


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (
            ["--max-loras", "3", "--tensor-parallel-size=2", "--dtype", "float32"],
            ["--max-loras", "--tensor-parallel-size"],
        ),
        (["--max-model-len", "long"], ["--max-model-len"]),
        (["--max-model-len", "1"], ["--max-model-len"]),
        (["--dtype"], ["--dtype"]),
    ],
)
def test_merged_refuses_the_options_that_it_does_not_know_by_name(options, fields):
    with pytest.raises(ConfigError) as error:
        chosen("merged", *options)
    assert [problem.field for problem in error.value.problems] == fields


# --- the whole way


@pytest.mark.slow
def test_end_to_end_with_the_merged_backend(capsys):
    """Command → model and checkpoint → answers through loraf-client and through reflection → SIGTERM → exit 0."""
    options = ("--backend", "merged", "--reflection", "--dtype", "float32", "--max-model-len", "128")
    with launch(str(model_folder()), f"trio={checkpoint_folder()}", options=options, start_timeout=300) as server:

        def ask(*arguments: str) -> tuple[int, str, str]:
            return client_cli.main([*arguments, "--server", server.address]), *capsys.readouterr()

        log = "\n".join(server.log)
        assert "loraf-serve: backend merged: requested by --backend" in log
        assert "loraf-serve: adapter trio: verified, rank 8" in log
        assert f"loraf-serve: listening on {server.address}" in log

        answers = {}
        for set_, selection in {
            "math+nlu+code": [],
            "nlu:0.5": ["--tasks", "nlu:0.5"],
            "math+nlu": ["--as-trained", "nlu"],
            "base": ["--base"],
        }.items():
            status, out, err = ask("generate", "hello", "--max-tokens", "12", "--json", "--no-stream", *selection)
            assert status == 0, err
            message = json.loads(out)
            answers[set_] = message["choices"][0].get("text", ""), message["choices"][0]["token_ids"]
            tasks = message["served_by"].get("tasks", [])
            found = "+".join(t["name"] if t["weight"] == 1 else f"{t['name']}:{t['weight']}" for t in tasks)
            assert (found or "base") == set_ and message["served_by"]["backend"] == "merged"
        assert len({tokens.__repr__() for _, tokens in answers.values()}) == len(answers)

        command = [sys.executable, "-m", "loraf_serve.client_cli", "generate", "hello", "--max-tokens", "12"]
        streamed = subprocess.run([*command, "--server", server.address], capture_output=True, text=True, timeout=120)
        assert streamed.returncode == 0 and streamed.stdout == answers["math+nlu+code"][0] + "\n"
        assert "math+nlu+code; trio@" in streamed.stderr
        assert ask("health") == (0, "SERVING\n", "")
        assert "nlu: " in ask("adapters")[1]

        # As a client that has never seen our protocol: everything from reflection.
        with grpc.insecure_channel(server.address) as channel:
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            method = pool.FindServiceByName("loraf.v1.GenerationService").methods_by_name["Generate"]
            Request, Response = (message_factory.GetMessageClass(t) for t in (method.input_type, method.output_type))
            request = Request(prompt="hello")
            request.task_selection.base.SetInParent()
            request.sampling.max_tokens = 12
            request.sampling.temperature = 0.0
            call = channel.unary_unary(
                "/loraf.v1.GenerationService/Generate", Request.SerializeToString, Response.FromString
            )
            assert list(call(request).choices[0].token_ids) == answers["base"][1]

        status, _, err = ask("generate", "hello", "--tasks", "art")
        assert status == 2 and "choose from: math, nlu, code" in err
        assert server.stop() == 0
        server._reader.join(10)
        assert server.log[-1] == "loraf-serve: stopped"


def test_sigterm_while_the_model_is_loading_stops_cleanly(tmp_path):
    script = f"""
import asyncio, sys
from loraf_serve import cli
from loraf_serve import choose_backend
from tests.loraf_serve.fake_backend import FakeBackend
backend = FakeBackend()
backend.gate = asyncio.Event()
choose_backend.choose = lambda *a: choose_backend.BackendChoice(backend, "a test")
sys.exit(cli.main(["--model", {str(model_folder())!r}, "--port", "0"]))
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        assert "NOT_SERVING" in lines[1]
        address = lines[1].split("health on ")[1].split()[0]
        with Client(address) as client:
            assert client.health(timeout=10) == "NOT_SERVING"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout.read().splitlines()[-1] == "loraf-serve: stopped"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
