"""What README.md, CONTRIBUTING.md and docs/ show: commands resolve or run, links lead somewhere.

A command is checked as far as that takes seconds and no network; `check_command` says for each kind
why it is not run. The tutorial is run as it stands, tests/programs/test_tutorial.py.
"""

import ast
import contextlib
import dataclasses
import doctest
import functools
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import urllib.parse

import gin
import pytest
from helpers.doc_pages import MARKDOWN, ROOT, blocks, commands

from tnt_jax import annotators, convert, patch
from tnt_jax.models import sharding
from tnt_jax.runtime import program

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

# The gin files of a training run.
TRAIN = [
    f"--gin_file={name}"
    for name in ("models/from_checkpoint.gin", "objectives/tnrf.gin", "runs/train.gin")
]

# The tutorial's, which the command before it writes: tests/programs/test_tutorial.py runs both.
WRITTEN_BY_PATCH = "patched/pipeline.gin"

# Programs with flags of their own, which become settings.
WITH_FLAGS = {"tnt_jax.convert": convert, "tnt_jax.patch": patch}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def kind_of(block):
    """bash, python, json, gin or text; what has no language is told by its first word."""
    if block.language:
        return block.language
    first = block.text.split()[0]
    if first in (*COMMANDS, "taskset") or re.match(r"launch/|--gin\.|\w+=", first):
        return "bash"
    return "python"


# --- Commands -------------------------------------------------------------------------------------


def check_command(words):
    """Fails where a command could not work, as far as that is seen without running it."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "taskset":  # taskset -c 0 COMMAND
        words = words[3:]
    name = words[0].removeprefix(".venv-gpu/bin/")  # where launch/gpu_node.sh installs
    if name.startswith("--gin."):  # settings to add to a run's
        return check_settings([*TRAIN, *words])
    if name.startswith("launch/"):
        return check_launch(words)
    assert name in COMMANDS, f"a command that no test knows: {shlex.join(words)}"
    return COMMANDS[name](words)


def check_python(words):
    if words[1] == "-c":
        return check_code(words[2])
    if words[1] == "-m":
        module, arguments = words[2], words[3:]
        if module.startswith("tnt_jax."):
            return check_program(module, arguments)
        assert module == "t5x.train", words
        return check_t5x(arguments)
    assert words[1].startswith(("benchmarks/", "docs/")), words
    return check_benchmark(ROOT / words[1], words[2:])


def check_program(module, arguments):
    """Every flag, gin file and setting resolves. Not run: minutes, and a model of the reader's."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
    if "--help" in arguments or WRITTEN_BY_PATCH in " ".join(arguments):
        return
    (call,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "program.run"
    )
    settings = {
        key.arg: ast.literal_eval(key.value)
        for key in call.keywords
        if key.arg in ("flags", "needs_all")
    }
    if module in WITH_FLAGS:
        arguments = WITH_FLAGS[module].gin_arguments(arguments)
    program.configure(
        *map(ast.literal_eval, call.args[:2]),
        arguments,
        settings.get("flags", ()),
        settings.get("needs_all", True),
    )


def check_t5x(arguments):
    """Our gin files and settings are there. Not run: it needs T5X; test_t5x_plugin.py does it."""
    for argument in arguments:
        if argument.startswith("--gin_file=") and not argument.startswith("--gin_file=t5x/"):
            name = argument.removeprefix("--gin_file=")
            assert (ROOT / name).exists() or (ROOT / "gin_configs" / name).exists(), name
    files = [ROOT / "gin_configs/t5x/train.gin", ROOT / "gin_configs/objectives/tnff.gin"]
    known = "".join(file.read_text("utf-8") for file in files)
    for argument in arguments:
        if setting := re.match(r"--gin\.([A-Z_]+)=", argument):
            assert re.search(rf"^{setting[1]} = ", known, re.MULTILINE), argument


def check_benchmark(path, arguments):
    """The file and its flags are there. Not run: minutes, and many measure hours."""
    flags = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            keywords = {key.arg: key.value for key in node.keywords}
            flags[ast.literal_eval(node.args[0])] = keywords
    before = ""  # the flag that an argument may be one of the values of
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not name.startswith("-"):
            takes_several = "nargs" in flags.get(before, ())
            assert takes_several or any(not flag.startswith("-") for flag in flags), argument
            continue
        assert name in flags, f"{path.name} has no {name}"
        before = name
        assert bool(equals) != bool({"action", "nargs"} & flags[name].keys()), argument
        with contextlib.suppress(KeyError, ValueError):  # no choices, or none that stand there
            assert value in ast.literal_eval(flags[name]["choices"]), argument


def check_make(words):
    """The targets are there. Not run: minutes, network."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        pattern = rf"\b{name}\b" if equals else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), word


def check_pip(words):
    """The extras are in setup.py. Not run: network."""
    setup = (ROOT / "setup.py").read_text("utf-8")
    for word in words:
        if extras := re.fullmatch(r"(?:\.|tnt_jax)\[([\w,-]+)\]", word):
            for extra in extras[1].split(","):
                assert re.search(rf'^ +"{extra}": \[', setup, re.MULTILINE), word


def check_pytest(words):
    """The files are there. Not run: they are run as tests."""
    for word in words[1:]:
        if word.endswith(".py"):
            assert (ROOT / word).exists(), word


def check_launch(words):
    """The script and its flags are there, and the run's settings resolve. Not run: cloud, GPUs."""
    script = ROOT / words[0]
    assert os.access(script, os.X_OK), words[0]
    text = script.read_text("utf-8")
    for word in words[1:]:
        if word.startswith("--") and not word.startswith(("--gin.", "--gin_file=")):
            assert word.partition("=")[0].removeprefix("--") in text, f"{words[0]} has no {word}"
    check_settings(words)


def check_settings(words):
    """A command that hands them to `tnt_jax.train`, or its `--program`, and sets some itself."""
    settings = [word for word in words if word.startswith(("--gin.", "--gin_file="))]
    flags = (word.removeprefix("--program=") for word in words if word.startswith("--program="))
    name = next(flags, "train")
    if settings:
        program.configure(f"tnt_jax.{name}", name, settings, needs_all=False)


def check_other(words):
    """Tools of others: what is ours in them resolves. Not run: cloud, network, a reader's files."""
    check_settings(words)
    for word in words:
        if word.startswith("launch/"):
            assert os.access(ROOT / word, os.X_OK), word


COMMANDS = {
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    **dict.fromkeys(
        ("head", "gcloud", "hf", "sbatch", "docker", "xpk", "tensorboard"), check_other
    ),
}


@each_page
def test_commands(page):
    variables = {"PWD": "/here", "HOME": "/home"}
    with contextlib.chdir(ROOT):
        for block in blocks(page):
            if kind_of(block) != "bash":
                continue
            for words in commands(block.text, variables):
                try:
                    check_command(words)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{block.place}: {shlex.join(words)}") from error
                finally:
                    gin.clear_config()


@each_page
def test_commands_within_text(page):
    for code in codes(page):
        with contextlib.suppress(ValueError):  # half a quotation
            words = shlex.split(code)
            if words and words[0] in ("make", "pip", "pytest"):
                check_command(words)
            if words[:2] == ["python", "-m"] and words[2].startswith("tnt_jax."):
                name = words[2].removeprefix("tnt_jax.")
                assert name == "NAME" or (ROOT / f"tnt_jax/{name}.py").exists(), code
            elif words[:1] == ["python"] and words[1:2] and words[1].startswith("benchmarks/"):
                check_command(words)


def codes(page):
    for token in MARKDOWN.parse(page.read_text("utf-8")):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


# --- Other blocks ---------------------------------------------------------------------------------


@each_page
def test_other_blocks(page, tmp_path):
    for block in blocks(page):
        match kind_of(block):
            case "bash" | "text":
                pass
            case "python":
                check_code(block.text)
            case "json":
                for line in block.text.splitlines():
                    json.loads(line)
            case "pycon":
                example = doctest.DocTestParser().get_doctest(block.text, {}, block.place, None, 0)
                assert example.examples
                assert doctest.DocTestRunner().run(example).failed == 0, block.place
            case "gin":
                (tmp_path / "block.gin").write_text(block.text)
                program.parse_gin_file(tmp_path / "block.gin")
                gin.clear_config()
            case other:
                raise AssertionError(f"{block.place}: a language that no test knows: {other}")


def check_code(text):
    """It is Python, and what it takes from tnt_jax is there."""
    tree = ast.parse(text)
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tnt_jax"):
            for alias in node.names:
                modules[alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            assert module is None or hasattr(module, node.attr), ast.unparse(node)


@each_page
def test_gin_files_named_in_text_are_there(page):
    for code in codes(page):
        for name in re.findall(r"[\w./]+\.gin\b", code):
            name = name.removeprefix("gin_configs/")
            found = [*(ROOT / "gin_configs").rglob(pathlib.Path(name).name)]
            is_written = name.endswith(
                ("operative_config.gin", "block.gin", "NAME.gin", WRITTEN_BY_PATCH)
            )
            assert is_written or any(str(path).endswith(name) for path in found), code


@pytest.mark.parametrize("target", ["demo", "demo-phrases"])
def test_make_installs_what_its_gin_file_needs(target):
    """The target runs the gin file of its name, and installs all that this one's heading names."""
    gin_file = f"gin_configs/experiments/{target.replace('-', '_')}.gin"
    (needs,) = re.findall(
        r"^# Needs +pip install (.*)$", (ROOT / gin_file).read_text("utf-8"), re.MULTILINE
    )
    settings = ["VENV=absent", "PYTHON=python3", "UV="]
    *installs, run = subprocess.run(
        ["make", "--dry-run", *settings, target],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        check=True,
        text=True,
    ).stdout.splitlines()
    assert run.endswith(f" -m tnt_jax.pipeline --gin_file={gin_file}")
    packages = {word for line in installs if " pip install " in line for word in line.split()}
    assert {word for word in needs.split() if "==" in word} <= packages


def test_messages_in_troubleshooting_are_those_of_the_code():
    constants = " ".join(
        node.value
        for path in (ROOT / "tnt_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)`", page.partition("## It runs out")[0], re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        for part in message.split("..."):
            assert part.strip(" ?[].") in constants, message


def test_the_table_of_axes_is_that_of_the_code():
    page = (ROOT / "docs/sharding.md").read_text("utf-8").partition("## One table")[2]
    found = {}
    for names, mesh_axes in re.findall(r"^\| (`.+?) \| (.+?) \|", page, re.MULTILINE):
        axes = tuple(re.findall(r"`(\w+)`", mesh_axes))
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), axes)
    assert found == dict(sharding.AXIS_RULES)


def test_settings_have_the_names_that_the_table_says():
    page = (ROOT / "docs/howto_mark.md").read_text("utf-8").partition("## Names of settings")[2]
    rows = re.findall(r"^\| [\w ]+ \| (`[A-Z].+) \| (`annotators\..+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for short, long in rows:
        kind, *more = re.findall(r"`([\w.]+)`", long)
        _, annotator, first = kind.split(".")
        fields = [first, *(name.removeprefix(".") for name in more)]
        texts = [file.read_text("utf-8") for file in (ROOT / "gin_configs/runs").glob("annotate_*")]
        (text,) = (text for text in texts if f"@annotators.{annotator}()" in text)
        bound = dict(re.findall(r"^(?:  |\S+\.)(\w+) = %(\w+)$", text, re.MULTILINE))
        names = re.findall(r"`(\w+)`", short)
        assert {bound[field] for field in fields} == {*names}, annotator
        known = {field.name for field in dataclasses.fields(getattr(annotators, annotator))}
        assert known.issuperset(fields), annotator


# --- Links ----------------------------------------------------------------------------------------


def slug(heading):
    """The anchor that GitHub and mkdocs give a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@functools.cache
def anchors(text):
    tokens = MARKDOWN.parse(text)
    return {
        slug("".join(child.content for child in inline.children))
        for opening, inline in itertools.pairwise(tokens)
        if opening.type == "heading_open"
    }


@pytest.fixture(scope="module")
def generated():
    """Pages that mkdocs makes, by path within docs/."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def broken_links(folder, text, generated):
    for token in MARKDOWN.parse(text):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src") or ""
            if not target or "://" in target:
                continue
            path, _, anchor = urllib.parse.unquote(target).partition("#")
            file = (folder / path).resolve() if path else None
            if file is None:
                content = text
            elif file.is_relative_to(ROOT / "docs") and (
                (name := file.relative_to(ROOT / "docs").as_posix()) in generated
            ):
                content = generated[name]
            elif file.exists():
                content = file.read_text("utf-8") if file.suffix == ".md" else ""
            else:
                yield target
                continue
            if anchor and anchor not in anchors(content):
                yield target


@each_page
def test_links(page, generated):
    broken = [*broken_links(page.parent, page.read_text("utf-8"), generated)]
    assert not broken, f"{page.name} links to what is not there: {broken}"


def test_links_of_generated_pages(generated):
    for name, text in generated.items():
        broken = [*broken_links((ROOT / "docs" / name).parent, text, generated)]
        assert not broken, f"{name} links to what is not there: {broken}"


def test_every_page_is_in_the_navigation(generated):
    listed = re.findall(r"- ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    pages = {page.name for page in PAGES if page.parent.name == "docs"}
    pages |= {name for name in generated if not name.startswith("reference/modules/")}
    assert sorted(listed) == sorted(pages)


# --- The reference --------------------------------------------------------------------------------


def test_the_reference_has_every_program_module_and_gin_file(generated):
    programs = generated["reference/programs.md"]
    for path in (ROOT / "tnt_jax").rglob("*.py"):
        if path.stem == "__init__":
            continue
        module = ".".join(path.relative_to(ROOT / "tnt_jax").with_suffix("").parts)
        assert f"# tnt_jax.{module}\n" in generated[f"reference/modules/{module}.md"]
        if "\n    program.run(" in path.read_text("utf-8"):
            assert f"## {path.stem}\n" in programs
    for path in (ROOT / "gin_configs").rglob("*.gin"):
        page = generated[f"reference/gin_{path.parent.name}.md"]
        assert path.read_text("utf-8").strip() in page


def test_a_run_file_lists_what_it_includes_with_its_own_defaults(generated):
    page = generated["reference/gin_runs.md"].partition("## runs/train.gin")[2]
    table = page.partition("```")[0]
    assert "| `TRAIN_STEPS` | *must be set* |  | training.gin |" in table
    assert "| `VOCABULARY_PATH` | `%INITIAL_CHECKPOINT_PATH` |" in table
    assert '| `ORIGINAL` | `"parameters"` | Where the original\'s logits come from.' in table
