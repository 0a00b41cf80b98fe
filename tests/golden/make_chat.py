"""Writes chat_ids.json: the ids that transformers gives for conversations by chat templates.

    python tests/golden/make_chat.py

Needs transformers (made with 5.24.0 and tokenizers 0.23.3), and nothing of this project but the
helpers that the tests use.
"""

import json
import pathlib
import sys
import tempfile

FOLDER = pathlib.Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import transformers  # noqa: E402
from helpers import chat_templates, tiny_tokenizers  # noqa: E402


def main():
    """Writes, of each kind of tokenizer, the ids of each conversation."""
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for kind, template in chat_templates.TEMPLATES.items():
            folder = tiny_tokenizers.KINDS[kind](pathlib.Path(root) / kind, chat_template=template)
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            found[kind] = [
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False
                )
                for messages in chat_templates.CONVERSATIONS
            ]
    (FOLDER / "chat_ids.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
