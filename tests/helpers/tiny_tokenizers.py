"""Directories as the Hugging Face hub has them, with tokenizers of a few hundred ids."""

import json
import pathlib

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "It is a wonderful Japanese place in the city centre (riverside).",
    "user assistant system: the house is in the area, and the café is cheap.",
    "日本語 日本 🤖 emoji, naïve “quotes” and 42 numbers.\n\nA new line",
]
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(folder, pattern, special, *, nfc=False, bos=None, added=(), texts=TEXTS, **settings):
    """Writes one with the alphabet of GPT-2 and the regular expression that splits words."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    _train(tokenizer, 400, pre_tokenizers.ByteLevel.alphabet(), [], texts)
    # As in the models: behind the vocabulary.
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False) for name in added])
    return _write(folder, tokenizer, bos, settings)


def sentencepiece_style(folder, special, *, prefix="prepend", bos=None, fallback=True, **settings):
    """Writes one with "▁" for spaces and bytes for what has no piece; `special` come first."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", "▁")
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.normalizer = replace
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    # Words are apart while it is trained, and only then.
    own, tokenizer.pre_tokenizer = (
        tokenizer.pre_tokenizer,
        pre_tokenizers.Sequence(
            [
                *([tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []),
                pre_tokenizers.Split("▁", "merged_with_next"),
            ]
        ),
    )
    _train(tokenizer, 420, [], [*special, *BYTES])
    tokenizer.pre_tokenizer = own
    content = json.loads(tokenizer.to_str())
    # Bytes, and pieces that merges make, are of the vocabulary alone.
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in BYTES
    ]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    return _write(folder, tokenizer, bos, settings)


def byte_fallback_sentencepiece(path, texts, vocab_size):
    """Writes a sentencepiece model that spells unknown characters in bytes."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=vocab_size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def _train(tokenizer, size, alphabet, special, texts=TEXTS):
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts * 3, trainer)


def _write(folder, tokenizer, bos, settings):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = settings.pop("ends", None)
    if ends is not None:
        ids = [tokenizer.token_to_id(name) for name in ends]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    if bos is not None:
        settings["bos_token"] = bos
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def gpt2(folder, **settings):
    """EOS, BOS and padding are one token."""
    return byte_level(folder, GPT_2, ["<|endoftext|>"], eos_token="<|endoftext|>", **settings)


def qwen(folder, **settings):
    """Composed characters (NFC); added tokens that are text; two ends, one of them padding."""
    return byte_level(
        folder,
        LLAMA_3,
        CHATML,
        nfc=True,
        added=["<think>", "</think>"],
        ends=["<|im_end|>", "<|endoftext|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        **settings,
    )


def llama3(folder, **settings):
    """A BOS before every text."""
    return byte_level(
        folder,
        LLAMA_3,
        [
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
            *("<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"),
        ],
        bos="<|begin_of_text|>",
        ends=["<|end_of_text|>", "<|eot_id|>"],
        eos_token="<|eot_id|>",
        **settings,
    )


def llama2(folder, **settings):
    """A space before every text; control tokens in the vocabulary."""
    return sentencepiece_style(
        folder, ["<unk>", "<s>", "</s>"], bos="<s>", ends=["</s>"], eos_token="</s>", **settings
    )


def gemma(folder, **settings):
    """No space before a text; padding with id 0."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    return sentencepiece_style(
        folder,
        special,
        prefix=None,
        bos="<bos>",
        ends=["<eos>", "<end_of_turn>"],
        eos_token="<eos>",
        **settings,
    )


def mistral(folder, **settings):
    """A space before every text, put there in the second way there is."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return sentencepiece_style(
        folder, special, prefix="metaspace", bos="<s>", ends=["</s>"], eos_token="</s>", **settings
    )


KINDS = {one.__name__: one for one in (gpt2, qwen, llama3, llama2, gemma, mistral)}
