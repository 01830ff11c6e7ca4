"""A byte-pair tokenizer for small text towers: 4096 pieces that spell any word.

``python -m training.pretrain.tokenizer --captions CAPTIONS.json --out runs/tokenizer.json``

Trained on captions and a broad list of nouns. The alphabet is the 256 bytes, so a word never met is spelt from shorter
pieces rather than lost. Ids 4094 and 4095 start and end a text; the caller adds them, as it does the padding id 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from odise_rt.command_line import CommandParser, command
from odise_rt.errors import CheckpointError
from odise_rt.files import atomic_writer
from training.config import OdiseConfig
from training.data.coco_panoptic import read_captions
from training.data.sticker_world.nouns import all_nouns

VOCABULARY_SIZE = 4096
START_PIECE, END_PIECE = "<|startoftext|>", "<|endoftext|>"


def broad_nouns() -> list[str]:
    """About a thousand everyday words, and every name of Sticker World."""
    words = Path(__file__).with_name("broad_nouns.txt").read_text(encoding="utf-8").split()
    return sorted(set(words)) + [name for noun in all_nouns() for name in noun.names]


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """Learn byte pairs.

    Args:
        texts: Captions and nouns, any case.
        vocabulary_size: All pieces, the two markers included.

    Returns:
        A tokenizer whose last two ids are the start and end markers. Where the texts give too few pairs, reserved
        pieces that match no text fill the gap, so that the ids of the markers do not depend on the texts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(pattern=Regex(r"\s+"), content=" "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    for number in range(len(vocabulary), vocabulary_size - 2):
        vocabulary[f"<|reserved{number}|>"] = number
    vocabulary[START_PIECE] = vocabulary_size - 2
    vocabulary[END_PIECE] = vocabulary_size - 1
    return Tokenizer.from_str(json.dumps(content))


def with_markers(tokenizer_json: str, config: OdiseConfig, source: Path) -> Tokenizer:
    """The tokenizer of a file, whose markers must have the ids that a model's text towers know.

    Raises:
        CheckpointError: it has others, or none; names ``source``.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    found = tokenizer.token_to_id(START_PIECE), tokenizer.token_to_id(END_PIECE)
    wanted = config.clip.start_token, config.clip.end_token
    if found != wanted:
        raise CheckpointError(
            f"{source} has the ids {found} for {START_PIECE} and {END_PIECE}, {config.name} needs {wanted}: make one "
            "with python -m training.pretrain.tokenizer"
        )
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], context_length: int, pad: int = 0) -> torch.Tensor:
    """Token ids with markers and padding.

    Args:
        tokenizer: From :func:`train_tokenizer`.
        texts: Any strings.
        context_length: Columns of the result; a longer text is cut and still ends with the end marker.
        pad: Id behind the end marker: 0 for the CLIP tower, the end marker for the diffusion model's.

    Returns:
        int64 (len(texts), context_length).
    """
    start, end = tokenizer.token_to_id(START_PIECE), tokenizer.token_to_id(END_PIECE)
    tokens = torch.full((len(texts), context_length), pad, dtype=torch.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
        ids = [start, *encoding.ids[: context_length - 2], end]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


@command("nothing was written")
def main(arguments: list[str] | None = None) -> int:
    """Train and save; returns the exit status."""
    parser = CommandParser(prog="python -m training.pretrain.tokenizer", description=__doc__)
    parser.add_argument("--captions", type=Path, required=True, help="COCO captions JSON.")
    parser.add_argument("--out", type=Path, required=True, help="File tokenizer.json to write.")
    options = parser.parse_args(arguments)
    captions = [text for texts in read_captions(options.captions).values() for text in texts]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(captions + broad_nouns() * 20)
    with atomic_writer(options.out) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    used = sum(not re.fullmatch(r"<\|reserved\d+\|>", piece) for piece in tokenizer.get_vocab())
    print(f"{options.out}: {used} pieces of {tokenizer.get_vocab_size()} in use, from {len(captions)} captions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
