"""docs/tutorial.md as it stands, for a reader whose model and files are those of `rooms`."""

import contextlib
import json
import pathlib
import shutil

import gin
import nbclient
import nbformat
import pytest
import traitlets.config
from helpers import doc_pages, rooms

from tnt_jax.data import records
from tnt_jax.patching import asked
from tnt_jax.runtime import program

TUTORIAL = doc_pages.ROOT / "docs" / "tutorial.md"
NOTEBOOK = doc_pages.ROOT / "docs" / "notebooks" / "patch.ipynb"


@pytest.fixture(scope="module", autouse=True)
def readers_folder(tmp_path_factory):
    """A Hugging Face directory that learned the rooms in two orders, prompts, a list of words."""
    folder = tmp_path_factory.mktemp("reader")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen():
        rows = rooms.make_hub_model("model")
        lines = [json.dumps({"inputs": row.inputs}) + "\n" for row in rows]
        pathlib.Path("prompts.jsonl").write_text("".join(lines))
        for file in ("original", "corpus.jsonl", "vocabulary.model", "tiny.gin"):
            path = pathlib.Path(file)  # a reader has none of these
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def test_the_tutorial_works_as_it_stands():
    variables = {}
    for block in doc_pages.blocks(TUTORIAL):
        if block.language != "bash":
            continue
        # What stands for the reader's model is theirs; nothing else is changed.
        text = block.text.replace("model=google/flan-t5-small", "model=model")
        for words in doc_pages.commands(text, variables):
            if words[:2] == ["python", "-m"]:
                run(words)
            else:  # the reader's terminal
                assert words[0] in ("pip", "head"), words

    numbers = json.loads(pathlib.Path("patched/patch.json").read_text())
    assert numbers["unwanted_before"] > 0.3
    assert numbers["cut"] > 0.5
    assert pathlib.Path("patched/report.html").stat().st_size > 100_000
    # The model that was handed back, read anew, says what the report says of it, or goes on.
    handed_back = {row.id: row.targets for row in records.read_records("patched_outputs.jsonl")}
    compared = records.read_records("patched/TNFF/greedy.jsonl")
    assert {row.id for row in compared} == handed_back.keys()
    assert all(handed_back[row.id].startswith(row.targets) for row in compared)
    # The same in steps.
    rooms.assert_same_state("patched/TNFF/model", "runs/mine/TNFF/model")


def test_the_notebook_works_as_it_stands():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    changes = {
        '"google/flan-t5-small"': '"model"',
        "settings = []": "settings = ['LEARNING_RATE=3e-3']",
    }
    for cell in notebook.cells:
        for of_reader, ours in changes.items():
            cell.source = cell.source.replace(of_reader, ours)
    settings = traitlets.config.Config({"ConnectionFileMixin": {"transport": "ipc"}})
    nbclient.NotebookClient(notebook, timeout=600, config=settings).execute(cwd=pathlib.Path.cwd())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.get("text", "") for output in outputs)
    numbers = json.loads(pathlib.Path("patched/patch.json").read_text())
    assert f"{numbers['cut']:.1%} of the unwanted outputs are gone" in said
    assert "from transformers import AutoModelForSeq2SeqLM" in said
    shown = [output["data"] for output in outputs if "data" in output]
    assert any(f"'cut': {numbers['cut']}" in data.get("text/plain", "") for data in shown)
    # A line, its points, and the star.
    (drawn,) = (text for data in shown if "Scatter" in (text := str(data)))
    assert "BLEU to the original" in drawn


def run(words):
    name, arguments = words[2].removeprefix("tnt_jax."), words[3:]
    if name == "patch":  # a model of 30 thousand parameters has to go faster than a reader's
        arguments = asked.gin_arguments([*arguments, "--gin.LEARNING_RATE=3e-3"])
    with pytest.raises(SystemExit) as stopped:
        program.run(words[2], name, arguments)
    gin.clear_config()
    assert stopped.value.code == 0, words
