"""Every file of gin_configs/experiments: a setting that names a folder moves all that is in it."""

import copy
import json
import re

import gin
import pytest
from gin import config as gin_config
from helpers import tiny_tokenizers

from tnt_jax import sweep
from tnt_jax.checkpoints import pretrained
from tnt_jax.runtime import gin_files, program

FILES = sorted(path.stem for path in (gin_files.GIN_CONFIGS / "experiments").glob("*.gin"))
PROGRAMS = {"pipeline.pipeline.arms": "pipeline", "sweep.sweep.grids": "sweep"}


@pytest.fixture(autouse=True)
def own_settings():
    with gin.unlock_config():
        gin.clear_config()
        yield
        gin.clear_config()


def read(name):
    settings = gin_files.Settings([gin_files.GIN_CONFIGS])
    settings.add_file(f"experiments/{name}.gin", given_by="this test")
    return settings


def folders_of(name):
    """The settings of an experiment that name a folder, but for those that are None."""
    settings = read(name)
    values = {**dict(settings.defaults()), **dict.fromkeys(settings.required(), "")}
    return [key for key, text in values.items() if key.endswith("_DIR") and text != "None"]


FOLDERS = [(name, folder) for name in FILES for folder in folders_of(name)]


def configure(name, **flags):
    """Gives gin what a program would give it; what has to be set is set to a name of its own."""
    settings = read(name)
    given = {key: f"given/{key}" for key in settings.required()} | flags
    functions = [PROGRAMS[key] for key in PROGRAMS if key in settings.values]
    function = functions[-1] if functions else "train"
    program.configure(
        f"tnt_jax.{function}",
        function,
        [
            f"--gin_file=experiments/{name}.gin",
            *(f"--gin.{key}={value}" for key, value in given.items()),
        ],
    )


@pytest.mark.parametrize("name", ["llama_3_1_8b_v5e8", "demo", "smollm2_sweep"])
def test_a_chat_template_is_told_what_the_setting_says(name, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    configure(
        name,
        VOCABULARY_PATH=tiny_tokenizers.qwen(tmp_path / "model"),
        CHAT_TEMPLATE=tmp_path / "own.jinja",
        CHAT_TEMPLATE_KWARGS='{"enable_thinking": False}',
    )
    vocabulary = gin.get_configurable(pretrained.vocabulary)()
    assert json.loads(vocabulary.template.kwargs) == {"enable_thinking": False}


def texts_of(name, **flags):
    """By setting, all texts in its value, as the run gets them: macros and paths are resolved."""
    configure(name, **flags)
    found = {}
    for (scope, selector), bindings in gin_config._CONFIG.items():
        with gin.config_scope(scope or None):
            for argument, value in bindings.items():
                found[f"{scope}/{selector}.{argument}"] = list(resolved(value))
    gin.clear_config()
    return {setting: texts for setting, texts in found.items() if texts}


def resolved(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from resolved(part)
    elif isinstance(value, dict):
        yield from resolved([*value, *value.values()])
    elif isinstance(value, gin_config.ConfigurableReference) and value.evaluate:
        if value.selector == "gin.macro":
            yield from resolved(gin.query_parameter(f"{'/'.join(value.scopes)}/gin.macro.value"))
        elif value.selector.endswith("experiment.path_in"):
            yield copy.deepcopy(value)  # which is how gin calls it


def moved(texts, old, new):
    """The texts that name a folder, or what is in it, with another folder in its place."""
    return [new + text[len(old) :] if f"{text}/".startswith(f"{old}/") else text for text in texts]


def test_every_experiment_names_a_folder():
    assert {name for name, _ in FOLDERS} == set(FILES)
    assert ("e2e_sweep", "CORPUS_DIR") in FOLDERS


@pytest.mark.parametrize(("name", "folder"), FOLDERS)
def test_another_folder_holds_all_that_the_old_one_held(name, folder):
    before = texts_of(name)
    (old,) = before[f"{folder}/gin.macro.value"]
    after = texts_of(name, **{folder: "another/place"})
    assert after == {
        setting: moved(texts, old, "another/place") for setting, texts in before.items()
    }


def test_a_vocabulary_has_the_same_settings_in_every_program():
    """In a pipeline and a sweep the vocabulary is made later, so these do not include its file."""
    macros, other = (
        set(
            re.findall(
                r"^([A-Z_]+) = ", (gin_files.GIN_CONFIGS / "runs" / name).read_text(), re.MULTILINE
            )
        )
        for name in ("vocabulary.gin", "experiment.gin")
    )
    assert macros - {"VOCABULARY"} <= other


@pytest.mark.parametrize(
    ("flags", "corpus"),
    [
        ({}, "runs/e2e_sweep/corpus"),
        ({"OUTPUT_DIR": "/mine"}, "/mine/corpus"),
        ({"CORPUS_DIR": "/mine"}, "/mine"),
        ({"CORPUS_DIR": "gs://mine/corpus/"}, "gs://mine/corpus"),
    ],
)
def test_the_files_of_a_sweep(flags, corpus):
    output_dir = flags.get("OUTPUT_DIR", "runs/e2e_sweep")
    texts = texts_of("e2e_sweep", E2E_FILE="dev.csv", **flags)
    experiment = "/tnt_jax.experiments.experiment.Experiment"
    original = "/tnt_jax.experiments.experiment.NewOriginal"
    expected = {
        "/tnt_jax.experiments.corpora.e2e.source_file": "dev.csv",
        "/tnt_jax.experiments.corpora.e2e.output_dir": flags.get("CORPUS_DIR", corpus),
        f"{experiment}.output_dir": output_dir,
        f"{experiment}.train_prompts": f"{corpus}/mine.jsonl",
        f"{experiment}.eval_prompts": f"{corpus}/eval.jsonl",
        f"{original}.records": f"{corpus}/train.jsonl",
        f"{original}.vocabulary_path": f"{output_dir}/vocabulary.model",
        "/tnt_jax.annotators.Gazetteer.path": f"{corpus}/gazetteer.json",
    }
    assert {setting: texts[setting] for setting in expected} == {
        setting: [text] for setting, text in expected.items()
    }


def test_annotators_of_the_arms_read_from_another_folder_too(tmp_path):
    """Within a scope of their own, as gin calls them in a run."""
    (tmp_path / "gazetteer.json").write_text(json.dumps({"tree": {"elm": []}}))
    configure("e2e_sweep", CORPUS_DIR=str(tmp_path))
    settings = gin.get_bindings(sweep.sweep)
    annotators = [settings["experiment"].annotator]
    annotators += [grid.annotator for grid in settings["grids"] if grid.annotator]
    assert len(annotators) > 2
    for make in annotators:
        assert make().path == str(tmp_path / "gazetteer.json")
