"""A model from wherever it is: its weights, its network, its vocabulary.

`checkpoint_kinds` finds it and says of which kind it is, `trained_parts` reads what was trained of
it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from tnt_jax.checkpoints import (
    checkpoint_kinds,
    digests,
    gguf_files,
    gguf_models,
    huggingface,
    lazy_arrays,
    orbax,
    t5x,
    trained_parts,
)
from tnt_jax.checkpoints.checkpoint_kinds import Kind, kind_of
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models import adapters, families, parameters
from tnt_jax.models.network_config import COMPUTATION, NetworkConfig
from tnt_jax.runtime import console, files
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import hub_files, hub_tokenizer, tokenization, vocabularies

_SOME_BYTES = 64 * 10**6  # of `Pretrained.digest_of_some`


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A model in files.

    Attributes:
      kind: Kind of checkpoint, for people.
      path: The checkpoint's directory or file.
      config: The settings of the network, in float32 and without dropout.
      weights: By T5X's names, layers apart; those that are not the network's are here too.
      step: Number of updates that the checkpoint states; 0 where it states none.
      run: What a training run of ours has noted, None elsewhere.
      description: Where `config.json`, the tokenizer and what else is no weight may lie.
      output_format: The setting of `tnt_jax.convert` that writes this kind, or the nearest one.
      scan_layers: Whether T5X's layers are stacked. How those of ours are stored, nobody need know.
      adapters: What a run of adapters has trained, which `weights` have added; None elsewhere.
      beside: The original, where a run has trained adapters or layers of it; None elsewhere.
      quantisation: The types of the blocks that weights were read from; None where there are none.
    """

    kind: str
    path: epath.Path
    config: NetworkConfig
    weights: dict[str, LazyArray]
    step: int
    run: dict[str, Any] | None
    description: epath.Path
    output_format: str
    scan_layers: bool = False
    adapters: trained_parts.Adapters | None = None
    beside: "Pretrained | None" = None
    quantisation: str | None = None
    # What Orbax can read by itself.
    _orbax: "_OrbaxItem | None" = None

    @property
    def max_positions(self) -> int | None:
        """The longest text, in tokens, that the model was made for; None where nothing says so."""
        if not (self.description / huggingface.CONFIG).exists():
            return None
        found = huggingface.read_config(self.description).get("max_position_embeddings")
        return found if type(found) is int else None

    def check_original(self) -> None:
        """Reads the weights that adapters or layers were trained beside.

        Raises:
          UsageError: They are no longer the same.
        """
        if self.beside is None or self.run is None:
            return
        original, noted = self.beside, self.run["original"]["digest"]
        names = lazy_arrays.shapes(families.network_of(original.config).abstract_params())
        found = digests.of_files({name: original.weights[name] for name in names})
        if found != noted:
            raise UsageError(
                f"{self.path}: its {trained_parts.part_of(self.run)} were trained beside weights "
                f"with the digest {noted}, but {original.path} has {found} now. Bring back what "
                "was there."
            )

    def digest_of_some(self) -> str:
        """A fingerprint of the smallest of its weights and adapters, of 64 MB of them at most.

        Norms alone differ from one update to the next. It is of the files that this process sees,
        which the digest of parameters that lie over several hosts is not.
        """
        names = lazy_arrays.shapes(families.network_of(self.config).abstract_params())
        some = {name: array for name, array in self.weights.items() if name in names}
        if self.adapters is not None:
            some |= self.adapters.by_name
        sizes = {name: math.prod(of.shape) * of.dtype.itemsize for name, of in some.items()}
        smallest = sorted(some, key=lambda name: (sizes[name], name))
        ends = itertools.accumulate(sizes[name] for name in smallest)
        sampled = [name for name, end in zip(smallest, ends, strict=True) if end <= _SOME_BYTES]
        return digests.of_files({name: some[name] for name in sampled})

    def check(self, abstract_params: PyTree, setting: str = "the model settings") -> None:
        """Raises a UsageError, naming every difference, unless these are the weights."""
        apart = parameters.unstack_layers(abstract_params)
        lazy_arrays.check(self.weights, apart, str(self.path), setting)

    def restore(self, abstract_params: PyTree) -> PyTree:
        """The parameters, each straight to the devices that hold it.

        Args:
          abstract_params: Shapes, dtypes and shardings to restore to; layers stacked or apart,
            whichever way they are stored.

        Raises:
          UsageError: They are of another network: every difference is named.
        """
        self.check(abstract_params)
        self.check_original()
        item = self._orbax
        if item is not None and item.names == lazy_arrays.shapes(abstract_params).keys():
            return orbax.restore_item(item.folder, abstract_params, item.part)
        return lazy_arrays.restore(
            lazy_arrays.laid_out(self.weights, abstract_params), abstract_params
        )


def open_checkpoint(path: str) -> Pretrained:
    """Opens what a setting names; no weight is read yet.

    Args:
      path: A directory of Hugging Face's or its name on the hub; a GGUF file; a checkpoint of ours
        or of T5X's, or a model directory for its newest. Local, or anything that `etils.epath`
        opens.

    Raises:
      UsageError: There is none, or it is damaged or of another architecture.
      OSError: The system does not let it be read.
    """
    return _opened(checkpoint_kinds.find(path), ())


def _opened(folder: epath.Path, within: tuple[epath.Path, ...]) -> Pretrained:
    """Opens a checkpoint, for adapters in those `within`, each beside the next."""
    kind = kind_of(folder)
    assert kind is not None
    return _OPENERS[kind.name](kind, folder, within)


class _OrbaxItem(NamedTuple):
    """Parameters that Orbax can read by itself.

    Attributes:
      folder: The item.
      part: The keys within it under which they are.
      names: The names of the parameters that are stored there.
    """

    folder: epath.Path
    part: tuple[str, ...]
    names: frozenset[str]


def _open_hugging_face(
    kind: Kind, folder: epath.Path, within: tuple[epath.Path, ...]
) -> Pretrained:
    del within
    return _of_hub_model(kind, folder, huggingface.read(folder))


def _open_gguf(kind: Kind, folder: epath.Path, within: tuple[epath.Path, ...]) -> Pretrained:
    del within
    return _of_hub_model(kind, folder, *gguf_models.read(folder))


def _of_hub_model(
    kind: Kind, folder: epath.Path, model: huggingface.Model, quantisation: str | None = None
) -> Pretrained:
    return Pretrained(
        kind=kind.name,
        path=folder,
        config=model.config,
        weights=model.weights,
        step=0,
        run=None,
        description=kind.description(folder),
        output_format=kind.output_format,
        quantisation=quantisation,
    )


def _open_ours(kind: Kind, folder: epath.Path, within: tuple[epath.Path, ...]) -> Pretrained:
    stored = orbax.lazy_item(folder / orbax.PARAMS)
    item: _OrbaxItem | None = _OrbaxItem(folder / orbax.PARAMS, (), frozenset(stored))
    lazy_arrays.check_types(stored)  # what is beside it may have others, such as float16
    weights, run = lazy_arrays.layers_apart(stored), orbax.read_run(folder)
    trained, beside = None, None
    if run is not None and trained_parts.part_of(run) is not None:
        beside, item = _original_of(run, folder, (*within, folder)), None
        if "adapters" in run:
            trained = trained_parts.read_adapters(weights, beside, run, folder)
            weights = trained_parts.with_adapters(trained)
        else:
            weights = beside.weights | trained_parts.read_upper_layers(weights, beside, run, folder)
    elif any(name.endswith(f"/{adapters.ADAPTER_IN}") for name in weights):
        raise UsageError(
            f"{folder}: it has adapters, and its notes do not say beside which original. Copy "
            "the checkpoint again."
        )
    config_file = kind.description(folder) / huggingface.CONFIG
    described = _described(config_file, weights)
    if described is None and beside is not None:
        described = beside.config
    if described is None and not any(name.startswith("encoder/") for name in weights):
        raise UsageError(
            f"{folder}: expected {config_file}, which says what a decoder-only model computes, "
            "found none. Copy the whole model directory."
        )
    return _of_checkpoint(
        kind,
        folder,
        weights,
        described,
        step=_step_of_name(folder),
        run=run,
        adapters=trained,
        beside=beside,
        _orbax=item,
    )


def _open_t5x(kind: Kind, folder: epath.Path, within: tuple[epath.Path, ...]) -> Pretrained:
    del within
    return _of_t5x(kind, folder, *t5x.read_legacy(folder))


def _open_t5x_orbax(kind: Kind, folder: epath.Path, within: tuple[epath.Path, ...]) -> Pretrained:
    del within
    item = folder / t5x.ORBAX_ITEM
    weights = orbax.lazy_item(item, ("target",))
    stated = orbax.lazy_item(item, ("state",)).get("step")
    if stated is None or stated.shape not in ((), (1,)):
        raise UsageError(f"{item}: expected T5X's state, with a step; found none.")
    step = lazy_arrays.checked_step(stated.load(), str(item))
    return _of_t5x(kind, folder, weights, step, _OrbaxItem(item, ("target",), frozenset(weights)))


def _of_t5x(
    kind: Kind,
    folder: epath.Path,
    weights: dict[str, LazyArray],
    step: int,
    item: _OrbaxItem | None = None,
) -> Pretrained:
    lazy_arrays.check_types(weights)
    described = _described(kind.description(folder) / huggingface.CONFIG, weights)
    scan_layers = False
    if t5x.is_scalable(weights):
        scan_layers, item = t5x.is_scanned(weights), None
        share_biases = not getattr(described, "relpos_bias_per_layer", False)
        weights = t5x.from_scalable(weights, str(folder), share_biases=share_biases)
    return _of_checkpoint(
        kind,
        folder,
        weights,
        described,
        step=step,
        run=None,
        scan_layers=scan_layers,
        _orbax=item,
    )


def _described(config_file: epath.Path, weights: Mapping[str, LazyArray]) -> NetworkConfig | None:
    """The network of the `config.json` that lies beside a checkpoint, if one does."""
    if not config_file.exists():
        return None
    return huggingface.network_config(
        huggingface.read_config(config_file.parent),
        str(config_file),
        is_tied="decoder/logits_dense/kernel" not in weights,
    )


def _of_checkpoint(
    kind: Kind,
    folder: epath.Path,
    weights: dict[str, LazyArray],
    described: NetworkConfig | None,
    **more: Any,
) -> Pretrained:
    """A checkpoint of ours or of T5X's, whose network is `described` or found by its weights."""
    config = described or t5x.infer_config(weights, str(folder))
    description = kind.description(folder)
    huggingface.check_depth(config, len(weights), str(description / huggingface.CONFIG))
    return Pretrained(
        kind=kind.name,
        path=folder,
        config=config,
        weights=weights,
        description=description,
        output_format=kind.output_format,
        **more,
    )


def _original_of(
    run: dict[str, Any], folder: epath.Path, within: tuple[epath.Path, ...]
) -> Pretrained:
    """What the adapters or layers of a run were trained beside."""
    part, of_part = trained_parts.part_of(run), run.get("adapters") or run["upper_layers"]
    path = of_part.get("beside") or run["original"]["path"]
    if path is None:
        raise UsageError(
            f"{folder}: it has {part} beside a random initialisation, which no file holds. Train "
            f"{part} with an INITIAL_CHECKPOINT_PATH."
        )
    try:
        found = checkpoint_kinds.find_noted(path)
        if found in within:
            raise UsageError(f"{found} is trained beside itself: its notes are damaged.")
        return _opened(found, within)
    except UsageError as error:
        raise UsageError(
            f"{folder}: it has {part} for an original that the run noted as {path} (digest "
            f"{run['original']['digest']}): {error}"
        ) from error


# By the name of the kind: each is given the kind, the path, and the checkpoints in whose adapters
# or layers it lies, each beside the next.
_OPENERS: dict[str, Callable[[Kind, epath.Path, tuple[epath.Path, ...]], Pretrained]] = {
    "Hugging Face": _open_hugging_face,
    "tnt_jax": _open_ours,
    "T5X": _open_t5x,
    "T5X (Orbax)": _open_t5x_orbax,
    "GGUF": _open_gguf,
}


def _step_of_name(folder: epath.Path) -> int:
    match = re.fullmatch(r"checkpoint_(\d+)", folder.name)
    return lazy_arrays.checked_step(int(match[1]), str(folder)) if match else 0


# ------------------------------------------------------------------------------- The network


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromCheckpoint:
    """Says of a model that its sizes are those of its checkpoint.

    Attributes:
      dtype: Dtype of the computation, "float32" or "bfloat16".
      dropout_rate: Probability of zeroing an activation in training. What a checkpoint says is left
        aside.
      float32_attention_logits: Whether attention logits and softmax are float32 whatever `dtype`
        is.
      attention: How attention over whole rows is computed: "xla", "splash" (TPUs) or "cudnn"
        (NVIDIA GPUs).
      scan_layers: Whether layers are stacked and run in one compiled loop. The checkpoint may have
        them either way.
      remat_policy: What the backward pass computes again: "none", "minimal" or "full", see
        `NetworkConfig`.
    """

    dtype: str = "float32"
    dropout_rate: float = 0.0
    float32_attention_logits: bool = False
    attention: str = "xla"
    scan_layers: bool = False
    remat_policy: str = "none"


def config_of(model: NetworkConfig | FromCheckpoint, source: Pretrained | None) -> NetworkConfig:
    """The settings of a network whose weights come from a checkpoint.

    Args:
      model: The settings; or that they are the checkpoint's.
      source: The checkpoint; None for random parameters.

    Raises:
      UsageError: The checkpoint is of another network, or `model` needs one and there is none.
    """
    if source is None:
        if isinstance(model, FromCheckpoint):
            raise UsageError(
                "models/from_checkpoint.gin takes the model's sizes from its checkpoint, and "
                "INITIAL_CHECKPOINT_PATH is None: choose another file of gin_configs/models."
            )
        return model
    computation = {name: getattr(model, name) for name in COMPUTATION}
    of_checkpoint = dataclasses.replace(source.config, **computation)
    if isinstance(model, FromCheckpoint):
        source.check(
            families.network_of(of_checkpoint).abstract_params(), lazy_arrays.ITS_OWN_SETTINGS
        )
        return of_checkpoint
    source.check(families.network_of(model).abstract_params())
    _check_same(model, of_checkpoint, source)
    return model


def _check_same(model: NetworkConfig, of_checkpoint: NetworkConfig, found: Pretrained) -> None:
    """Compares the settings that no shape shows, such as the activation, with the checkpoint's."""
    if not (found.description / huggingface.CONFIG).exists():
        return
    differences = [
        f"{name} = {mine!r} ({theirs!r})"
        for name in type(model).unseen
        if (mine := getattr(model, name)) != (theirs := getattr(of_checkpoint, name))
    ]
    if differences:
        raise UsageError(
            f"the model settings differ from {found.description / huggingface.CONFIG}, in "
            f"brackets: {'; '.join(differences)}. Use --gin_file=models/from_checkpoint.gin."
        )


# ------------------------------------------------------------------------------- The vocabulary


def vocabulary(
    path: str | None,
    extra_ids: int | None = None,
    chat_template: str | None = "auto",
    chat_date: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tokenization.Tokeniser:
    """A vocabulary from a sentencepiece model, or the one that a model comes with.

    Args:
      path: A file of sentencepiece's or GGUF; or a directory of Hugging Face's, a checkpoint or a
        model directory of ours.
      extra_ids: After the pieces; None is T5's 100 for a file, and for a directory what it says.
      chat_template: "auto" is the model's own if it has one: then a text is what a user says, and
        the model replies. None is no template: the model goes on with the text. Else a file with
        one. For decoder-only models; T5 has none.
      chat_date: What a template that writes today's date writes, as YYYY-MM-DD; None is today.
      chat_template_kwargs: Further variables for the template, such as {"enable_thinking": False}.

    Raises:
      UsageError: There is none.
    """
    if path is None:
        raise UsageError(
            "VOCABULARY_PATH: expected a sentencepiece model or a directory, found None. The model "
            "whose outputs these are has its own: its directory, or its checkpoint."
        )
    given = epath.Path(path).expanduser()
    if gguf_files.is_gguf(given):
        folder = gguf_models.tokenizer(given)
    elif given.name == hub_files.TOKENIZER and given.is_file():
        raise UsageError(
            f"VOCABULARY_PATH: expected a directory, found a file in it, {path}: what is beside it "
            f"counts, too. Set VOCABULARY_PATH={given.parent}."
        )
    elif given.is_file() or path.endswith(".model"):
        return vocabularies.of_file(path, extra_ids)
    elif given.is_dir() and vocabularies.has_tokenizer(given):
        folder = given
    else:
        folder = checkpoint_kinds.description_of(checkpoint_kinds.find(path))
    found = vocabularies.of_directory(folder, extra_ids)
    return vocabularies.with_template(found, chat_template, chat_date, chat_template_kwargs)


def check_vocabulary(
    vocabulary: tokenization.Tokeniser, config: NetworkConfig, source: Pretrained | None
) -> int:
    """Compares a vocabulary with the model that it is used for; returns its size.

    Args:
      vocabulary: The tokeniser of inputs and targets.
      config: The settings of the network.
      source: The model's checkpoint; None for a random model.

    Raises:
      UsageError: It is no tokeniser, or a SentencePiece with other ids than T5's; it has more ids
        than the model, or far fewer; or the checkpoint comes with another one.
    """
    vocab_size = tokenization.check_vocabulary(vocabulary)
    vocabularies.check_size(vocabulary, config.vocab_size)
    if source is not None:
        vocabularies.check_same(vocabulary, source.description, str(source.path))
    return vocab_size


def describe(
    model_dir: str,
    config: NetworkConfig,
    vocabulary: tokenization.Tokeniser,
    original: Pretrained | None,
    *,
    is_new: bool = False,
) -> None:
    """Writes beside our checkpoints what Hugging Face's directory has beside its weights.

    So a model directory says by itself which network it is of and how its text is tokenised, and it
    goes back to the format that the original came in when the original is no longer there.

    Args:
      model_dir: The model directory.
      config: The settings of the network.
      vocabulary: The tokeniser.
      original: The checkpoint that it started from, whose files are taken where there are any.
      is_new: Whether there is no checkpoint yet: what is there then is of a run that left none,
        perhaps of another model, and is replaced.
    """
    whole = epath.Path(model_dir).expanduser() / orbax.DESCRIPTION
    is_there = not is_new and (whole / huggingface.CONFIG).exists()
    if is_there or not console.is_first_process():
        return
    # A run that is killed here leaves no half of a tokenizer under the name of a whole one.
    folder = whole.with_name(f"{whole.name}.unfinished")
    if folder.exists():
        folder.rmtree()
    folder.mkdir(parents=True)
    source = None if original is None else original.description
    if isinstance(vocabulary, hub_tokenizer.HubTokenizer):
        vocabularies.write(folder, vocabulary)  # first: a chat template may be the user's own
    if source is not None and (source / huggingface.CONFIG).exists():
        settings = huggingface.read_config(source)
        for name in huggingface.OTHER_FILES:
            if (source / name).exists() and not (folder / name).exists():
                (folder / name).write_bytes((source / name).read_bytes())
    else:
        try:
            settings = huggingface.new_config(config)
        except UsageError:  # a network that Hugging Face has no words for, but that can be trained
            settings = None
    if not vocabularies.has_tokenizer(folder):
        vocabularies.write(folder, vocabulary)
    if settings is not None:
        (folder / huggingface.CONFIG).write_text(files.json_text(settings))
    if whole.exists():
        whole.rmtree()
    folder.rename(whole)
