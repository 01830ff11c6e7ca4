"""OpenAI CLIP's byte-pair tokenizer as a ``tokenizers`` file, built from the merges that open_clip ships.

The file only splits text into ids; start, end and padding are added by whoever knows the context length. It agrees
with ``open_clip.tokenizer.SimpleTokenizer`` but for what ftfy and HTML unescaping repair there before splitting: text
decoded with a wrong code page, HTML entities ("&amp;") and full-width letters, of which the runtime mends the last two
by itself. Nor do "<start_of_text>" and "<end_of_text>" in a user's text become the special tokens here.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from odise_rt.errors import CheckpointError

START_TOKEN = 49406
END_TOKEN = 49407

_MERGES = START_TOKEN - 2 * 256
"""Merges that make a token: the others in the file are beyond CLIP's vocabulary."""
_SPECIAL = ("<start_of_text>", "<end_of_text>")

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Contractions, runs of letters, single digits, runs of anything else but white space."""

# What ftfy does to text that is not broken, written out because the runtime has no ftfy: Latin ligatures and digraphs
# to letters, curly quotes to straight ones, control characters away. Case does not matter: all is lowered afterwards.
_LIGATURES = {
    "\\x{0132}\\x{0133}": "ij",
    "\\x{0149}": "'n",
    "\\x{01C4}-\\x{01C6}": "dž",
    "\\x{01C7}-\\x{01C9}": "lj",
    "\\x{01CA}-\\x{01CC}": "nj",
    "\\x{01F1}-\\x{01F3}": "dz",
    "\\x{FB00}": "ff",
    "\\x{FB01}": "fi",
    "\\x{FB02}": "fl",
    "\\x{FB03}": "ffi",
    "\\x{FB04}": "ffl",
    "\\x{FB05}": "ſt",
    "\\x{FB06}": "st",
}
_CLEANING = {
    "\\x{0000}-\\x{0008}\\x{000B}\\x{000E}-\\x{001F}\\x{007F}\\x{206A}-\\x{206F}\\x{FEFF}\\x{FFF9}-\\x{FFFC}": "",
    **_LIGATURES,
    "\\x{02BC}\\x{2018}-\\x{201B}": "'",
    "\\x{201C}-\\x{201F}": '"',
}


@functools.lru_cache(maxsize=1)
def openai_clip_tokenizer_json() -> str:
    """The tokenizer of OpenAI's CLIP models and of SD 1.x's text encoder as the text of a ``tokenizer.json``.

    Raises:
        CheckpointError: the installed open_clip ships no merges, or others than CLIP's.
    """
    merges = _read_merges()
    symbols = _byte_symbols()
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + list(_SPECIAL)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != END_TOKEN + 1:
        raise CheckpointError(
            f"open_clip's merges give {len(vocabulary)} tokens, expected {END_TOKEN + 1}: install open_clip_torch>=2.30"
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    cleaning = [normalizers.Replace(Regex(f"[{characters}]"), content) for characters, content in _CLEANING.items()]
    # Lowercase works letter by letter, but a sigma that ends a word has a form of its own.
    cleaning.append(normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"))
    tokenizer.normalizer = normalizers.Sequence([*cleaning, normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Written by json so that equal input gives equal bytes, whatever version of tokenizers formats it.
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))


def _read_merges() -> list[tuple[str, str]]:
    import open_clip

    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise CheckpointError(
            f"{path}, CLIP's list of merges, cannot be read ({exc}): reinstall open_clip_torch"
        ) from exc
    merges = []
    for line in lines[1 : _MERGES + 1]:  # the first line is a version
        left, _, right = line.partition(" ")
        merges.append((left, right))
    return merges


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in CLIP's order: printable bytes first, the others after them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
