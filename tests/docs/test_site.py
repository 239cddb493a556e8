"""The site builds without a warning and loads nothing from other hosts; its generated parts leave nothing out."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from loraf_serve.v1 import adapter_pb2, generation_pb2
from loraf_train.settings.reference import describe_settings
from tests.docs.pages import DOCS, ROOT, name, read
from tests.tools import needs
from tools.docs import commands, figures, grpc_reference, hooks, settings


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, a folder."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason=needs("MkDocs"))
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert build.returncode == 0, build.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_built(site):
    for page in DOCS:
        path = page.relative_to(ROOT / "docs").with_suffix("")
        folder = path.parent if path.name == "index" else path
        assert (site / folder / "index.html").is_file(), name(page)


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site):
    loads = re.compile(
        r"<(?:script|img|iframe|link(?=[^>]*rel=\"?(?:stylesheet|preconnect|icon)))[^>]*?https?://[^>]*>"
    )
    for file in site.rglob("*.html"):
        assert loads.findall(file.read_text(encoding="utf-8")) == [], file.relative_to(site)


@pytest.mark.slow
def test_the_python_reference_has_the_public_names(site):
    text = (site / "reference" / "python-loraf" / "index.html").read_text(encoding="utf-8")
    for public in ("loraf.checkpoint.Checkpoint.open", "loraf.tasksets.TaskSet.parse", "loraf.errors.LorafError"):
        assert f'id="{public}"' in text
    text = (site / "reference" / "python-serving" / "index.html").read_text(encoding="utf-8")
    for public in ("loraf_serve.client.Client.generate", "loraf_serve.launch.launch"):
        assert f'id="{public}"' in text


def test_every_setting_is_in_its_reference():
    text = settings.markdown()
    for setting in describe_settings():
        assert setting.meaning and setting.meaning in text, setting.key


@pytest.mark.parametrize("program", commands.MODULES)
def test_every_option_is_in_its_reference(program):
    text = commands.markdown(program)
    parser = commands.parser_of(program)
    below = commands.subparsers(parser)
    for command in below:
        assert f"## {program} {command}" in text
    for one in below.values() or [parser]:
        for option in set(one._option_string_actions) - {"-h", "--help", "--version"}:
            assert f"`{option}" in text


def test_every_message_and_field_is_in_its_reference():
    text = grpc_reference.markdown()
    for file in (generation_pb2.DESCRIPTOR, adapter_pb2.DESCRIPTOR):
        for message in file.message_types_by_name.values():
            section = re.search(rf"^### {message.name}$(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
            assert section, message.name
            for field in message.fields:
                assert f"`{field.name} = {field.number}`" in section[1]
        for enum in file.enum_types_by_name.values():
            assert all(f"`{value.name} = {value.number}`" in text for value in enum.values)
        for service in file.services_by_name.values():
            assert all(f"### {service.name}.{method.name}" in text for method in service.methods)


def test_a_line_of_a_proto_file_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="line 2"):
        grpc_reference.parse("message A {\n  extensions 4;\n}")


def test_markers_name_generators():
    markers = [marker for page in DOCS for marker in hooks.MARKER.findall(read(page))]
    assert sorted(markers) == sorted(hooks.GENERATORS)


def test_the_pictures_are_what_their_script_draws():
    assert figures.main(["--check"]) == 0


def test_links_out_of_the_docs_become_paths_or_links_to_the_repository():
    page = ROOT / "docs" / "how-to" / "export.md"
    text = "[compare](../../examples/compare/README.md) [home](../index.md) [x](https://a.b/c)"
    rewritten = hooks.rewrite_links(text, page)
    assert rewritten == "compare (`examples/compare/README.md`) [home](../index.md) [x](https://a.b/c)"
    linked = hooks.rewrite_links(text, page, "https://host.example/org/loraf")
    assert linked.startswith("[compare](https://host.example/org/loraf/blob/main/examples/compare/README.md)")
