"""GGUF files as llama.cpp's converter writes them, from directories of Hugging Face's.

The names of tensors are those of the package `gguf`. The order of rows, the norms of Gemma and the
factors of Llama 3 are written down again here, as llama.cpp has them in conversion/llama.py and
conversion/gemma.py.
"""

import json
import math

import numpy as np
import safetensors.numpy

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def write(path, settings, tensors):
    """Writes a file.

    Args:
        path: of the file.
        settings: by their names; `general.architecture` among them.
        tensors: by their names in the file, each an array and the name of a type.
    """
    import gguf

    writer = gguf.GGUFWriter(path, settings["general.architecture"])
    for name, value in settings.items():
        if name == "general.architecture":
            continue
        if isinstance(value, list | np.ndarray):
            writer.add_array(name, list(value))
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_string(name, value)
    for name, (array, kind) in tensors.items():
        qtype = gguf.GGMLQuantizationType[kind]
        data = array if array.dtype == np.uint8 else gguf.quants.quantize(array, qtype)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, folder, kind="F32", tokenizer=None, **changes):
    """Writes a model of a directory: matrices in a type, vectors in float32.

    Args:
        path: of the file.
        folder: of the model.
        kind: of matrices.
        tokenizer: settings of a tokenizer.
        **changes: of settings, by their names without the architecture; None leaves one out.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    settings = settings_of(config) | changes
    settings = {f"{architecture}.{k}": v for k, v in settings.items() if v is not None}
    tensors = {
        name: (array, kind if array.ndim == 2 else "F32")
        for name, array in tensors_of(folder, config, architecture).items()
    }
    start = {"general.architecture": architecture}
    return write(path, start | settings | (tokenizer or {}), tensors)


def write_directory(folder, vocab_size):
    """Writes a directory with a tiny random Llama; its rows are of whole blocks of most types."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    shapes = {"model.embed_tokens": (vocab_size, 32), "model.norm": (32,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (32, 32) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (16, 32) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (64, 32) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (32, 64)}
        shapes |= {f"{layer}.{name}_layernorm": (32,) for name in ("input", "post_attention")}
    random = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": random.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def rope_of(config):
    found = config["rope_parameters"]
    return found.get("full_attention", found)


def settings_of(config):
    """What the converter says of a network, without the name of the architecture before it."""
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope_of(config)["rope_theta"]),
    }
    if config.get("head_dim"):
        found["attention.key_length"] = found["attention.value_length"] = config["head_dim"]
    if config["model_type"] == "llama":
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        found |= {"vocab_size": config["vocab_size"], "rope.dimension_count": width}
    if rope_of(config)["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear"}
        found |= {"rope.scaling.factor": float(rope_of(config)["factor"])}
    return found


def tensors_of(folder, config, architecture):
    import gguf

    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = {}
    for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        module = name.split(".")[-2]
        if architecture in ("llama", "smollm3") and module in heads:
            array = permuted(array, heads[module])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        found[names.get_name(name, (".weight", ".bias"))] = array
    if rope_of(config)["rope_type"] == "llama3":
        found["rope_freqs.weight"] = factors_of(config)
    return found


def permuted(weights, num_heads):
    width = weights.shape[0] // num_heads
    split = weights.reshape(num_heads, 2, width // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def factors_of(config):
    """By what rotations are slowed down, in float32 as the converter has it."""
    rope = rope_of(config)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factors = []
    for i in range(0, width, 2):
        speed = np.float32(1.0 / rope["rope_theta"] ** (np.float32(i) / np.float32(width)))
        length = 2 * math.pi / speed
        context = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if length < context / high:
            factors.append(1)
        elif length > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


# ------------------------------------------------------------------------------------ Tokenizers


def byte_level(folder, split):
    """Settings of the tokenizer of a directory, with the name of how it splits words."""
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    added = {one["id"]: one for one in content["added_tokens"]}
    names = {i: piece for piece, i in content["model"]["vocab"].items()}
    names |= {i: one["content"] for i, one in added.items()}
    kinds = [
        NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED
        for i in range(len(names))
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return settings_of_tokens(
        folder, [names[i] for i in range(len(names))], kinds, "gpt2", merges=merges, pre=split
    )


def settings_of_tokens(folder, tokens, kinds, model, **others):
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    found = {"model": model, "tokens": tokens, "token_type": kinds, **others}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if token := config.get(f"{ours}_token"):
            found[f"{theirs}_token_id"] = tokens.index(token)
    settings = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    if "chat_template" in config:
        settings["tokenizer.chat_template"] = config["chat_template"]
    return settings


def of_sentencepiece(processor, *, has_prefix, defined=()):
    """Settings of the tokenizer that a sentencepiece model is, with pieces that were `defined`."""
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]

    def kind(i, piece):
        if processor.is_unknown(i):
            return UNKNOWN
        if processor.is_control(i):
            return CONTROL
        if processor.is_byte(i):
            return BYTE
        return USER_DEFINED if piece in defined else NORMAL

    kinds = [kind(i, piece) for i, piece in enumerate(pieces)]
    tokens = [
        piece.replace("▁", " ") if k == USER_DEFINED else piece
        for piece, k in zip(pieces, kinds, strict=True)
    ]
    scores = [-1000.0 if k == USER_DEFINED else processor.get_score(i) for i, k in enumerate(kinds)]
    found = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        "add_space_prefix": has_prefix,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}
