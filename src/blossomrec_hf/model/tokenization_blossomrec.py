"""Tokenizer of item ids: each item is one token of a WordLevel vocabulary, and a history is a sequence of tokens."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal
from urllib.parse import unquote

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BatchEncoding, PreTrainedTokenizerFast

from .ids_blossomrec import NUM_SPECIAL_IDS
from .manifest_blossomrec import (
    FINDING,
    TOKENIZER_NAMES,
    ManifestMixin,
    check_manifest,
    inside,
    require_loadable,
    update_manifest,
)


PAD_TOKEN, UNK_TOKEN = "[PAD]", "[UNK]"
_UNSAFE = re.compile(r"[%\[\s\x00-\x20\x7f\x85]")  # "%" starts an escape, "[" a special token; spaces separate items
_INTEGER = re.compile("0|-?[1-9][0-9]*")
_EMPTY = "%"  # the token of the empty id; no other id is escaped to a single "%"


def _escape(text: str) -> str:
    """`text` as one token: percent-encode characters that the pre-tokenizer splits at or that start special tokens."""
    if not text:
        return _EMPTY
    if not _UNSAFE.search(text):
        return text
    return _UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), text)


def _unescape(token: str) -> str:
    return "" if token == _EMPTY else unquote(token) if "%" in token else token


class BlossomRecTokenizer(ManifestMixin, PreTrainedTokenizerFast):
    """
    Map raw item ids, integers or any strings, to vocabulary ids: `[PAD]` is 0, `[UNK]` is 1, the items follow.

    `tokenizer("12 15 3")` encodes one history given as text, `tokenizer(["12 15 3", "4"])` a batch, and
    `tokenizer([[12, 15, 3], [4]])` a batch given as lists of raw ids. In text, items are separated by whitespace, and
    whitespace, `%` and `[` in an id are percent-encoded (`"a b"` is `a%20b`). Lists of raw ids need no encoding. Truncation
    keeps the **latest** items.

    Args:
        vocab (`dict[str, int]`, *optional*): Ids of the escaped tokens, including `[PAD]` (0) and `[UNK]` (1). Use
            [`~BlossomRecTokenizer.from_items`] to build a tokenizer from raw ids.
        item_type (`"int"` or `"str"`, *optional*, defaults to `"str"`): Type of raw ids, which `decode_items` returns.

    Raises:
        ValueError: If `vocab` or a loaded tokenizer is no vocabulary of items.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        *,
        item_type: Literal["int", "str"] = "str",
        pad_token: str = PAD_TOKEN,
        unk_token: str = UNK_TOKEN,
        truncation_side: str = "left",
        padding_side: str = "right",
        **kwargs: Any,
    ) -> None:
        if item_type not in ("int", "str"):
            raise ValueError(f'`item_type` is {item_type!r}; it must be "int" or "str".')
        if not kwargs.keys() & {"tokenizer_object", "tokenizer_file"}:
            if vocab is None:
                vocab = {str(pad_token): 0, str(unk_token): 1}  # a saved tokenizer passes `AddedToken` objects
            self._tokenizer = Tokenizer(WordLevel(vocab, str(unk_token)))
            self._tokenizer.pre_tokenizer = WhitespaceSplit()
        super().__init__(
            item_type=item_type,
            pad_token=pad_token,
            unk_token=unk_token,
            truncation_side=truncation_side,
            padding_side=padding_side,
            **kwargs,
        )
        self.item_type = item_type
        self._items_by_id: list[int | str | None] | None = None
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        """Refuse a vocabulary that is none of items: ids must be 0, 1, 2, … without gaps, and tokens are never split."""
        parts = (self._tokenizer.model, self._tokenizer.pre_tokenizer)
        if not isinstance(parts[0], WordLevel) or not isinstance(parts[1], WhitespaceSplit):
            kinds = " and ".join(type(part).__name__ for part in parts)
            raise ValueError(
                f"The tokenizer consists of {kinds}; a BlossomRecTokenizer consists of WordLevel and WhitespaceSplit."
            )
        if self._tokenizer.normalizer is not None:
            raise ValueError("The tokenizer has a normalizer, which would change item ids; save it without one.")
        vocab = self.get_vocab()
        special = [vocab.get(str(token)) for token in (self.pad_token, self.unk_token)]
        if special != [0, 1]:
            raise ValueError(
                f"The vocabulary has {self.pad_token} and {self.unk_token} at {special[0]} and {special[1]}; they must be "
                "at 0 and 1."
            )
        ids = set(vocab.values())
        if len(ids) != len(vocab) or max(ids) != len(vocab) - 1:
            raise ValueError(
                f"The vocabulary has {len(vocab)} tokens, but their ids go up to {max(ids)} or repeat; they must be 0 to "
                f"{len(vocab) - 1}, each once."
            )
        if self.item_type == "int":
            special_tokens = set(self.all_special_tokens)
            for token in vocab:
                if not _INTEGER.fullmatch(token) and token not in special_tokens:
                    raise ValueError(f'The vocabulary has the item {token!r}, but its `item_type` is "int".')

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, check_files: bool = True, **kwargs: Any
    ) -> "BlossomRecTokenizer":
        """
        As in `transformers`; also compares the files with their saved hashes.

        Args:
            check_files (`bool`, *optional*, defaults to `True`): Whether to compare. `False` loads files that were changed.

        Raises:
            ValueError: If a file is damaged or is not the saved one, or the vocabulary is none of items.
            OSError: If there is no tokenizer, or the Hub cannot be reached and the cache is incomplete.
        """
        path = pretrained_model_name_or_path
        checking = {name: kwargs.get(name) for name in ("revision", *FINDING)}
        if os.path.isdir(path):
            for name in TOKENIZER_NAMES:
                inside(os.path.join(path, kwargs.get("subfolder") or ""), name)
        try:
            tokenizer = super().from_pretrained(path, *args, **kwargs)
        except Exception as error:
            if check_files:  # if a file changed, its name explains the error
                check_manifest(path, names=TOKENIZER_NAMES, **checking)
            if isinstance(error, (OSError, ImportError)):
                raise
            raise ValueError(
                f"The tokenizer of {os.fspath(path)} cannot be read: {' '.join(str(error).split())}. Download it with "
                "`force_download=True`, or save it again."
            ) from error
        if check_files:
            check_manifest(path, names=TOKENIZER_NAMES, **checking)
        return tokenizer

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """
        As in `transformers`; also writes the hashes of the files to the manifest of the folder.

        Raises:
            ValueError: If the class is defined in a script, a notebook or a function.
        """
        require_loadable(type(self))
        written = super().save_pretrained(save_directory, *args, **kwargs)
        self._write_manifest(save_directory)
        return written

    def _write_manifest(self, folder: str | os.PathLike) -> None:
        """Write the hashes of the tokenizer's files to the manifest of `folder`."""
        update_manifest(folder, TOKENIZER_NAMES)

    @classmethod
    def from_items(
        cls, items: Iterable[int | str], *, item_type: Literal["int", "str"] | None = None, **kwargs: Any
    ) -> "BlossomRecTokenizer":
        """
        Build a tokenizer in which item *i* of `items` has the id *i* + 2.

        Args:
            items (`Iterable[int | str]`): Distinct raw ids in vocabulary order, all `int` or all `str`.
            item_type (`"int"` or `"str"`, *optional*): Type of raw ids. Defaults to the type of the first item.

        Raises:
            ValueError: If `items` is a single string, the types are mixed, or an item is repeated.
        """
        items = _as_list(items)
        if item_type is None:
            item_type = "str" if not items or isinstance(items[0], str) else "int"
        tokens = _to_tokens(items, item_type)
        vocab = {PAD_TOKEN: 0, UNK_TOKEN: 1, **{token: index for index, token in enumerate(tokens, start=2)}}
        if len(vocab) != len(items) + NUM_SPECIAL_IDS:
            seen: set[str] = set()
            twice = next(item for item, token in zip(items, tokens) if token in seen or seen.add(token))
            raise ValueError(f"`items` has {twice!r} more than once; remove repeats.")
        return cls(vocab, item_type=item_type, **kwargs)

    @property
    def num_items(self) -> int:
        """The number of items: the vocabulary without `[PAD]` and `[UNK]`."""
        return len(self) - NUM_SPECIAL_IDS

    def encode_items(self, items: Iterable[int | str]) -> list[int]:
        """
        Convert raw ids to vocabulary ids, in order. Unknown items become `unk_token_id`.

        Raises:
            ValueError: If `items` is a single string, or an item is not of this tokenizer's `item_type`.
        """
        unknown = self.unk_token_id
        ids = map(self._tokenizer.token_to_id, _to_tokens(items, self.item_type))
        return [unknown if index is None else index for index in ids]

    def decode_items(self, ids: Any) -> list:
        """
        Convert vocabulary ids to raw ids. Special tokens become `None`, as does −1, which `recommend` returns if there are
        fewer candidates than `top_k`.

        Args:
            ids: One id, or a sequence, array or tensor of ids of any shape. Nested input gives nested lists.

        Raises:
            ValueError: If an id is outside of −1 … `len(tokenizer) - 1`, or is no integer.
        """
        if self._items_by_id is None:
            items: list[int | str | None] = [None] * (max(self.get_vocab().values()) + 1)
            special = set(self.all_special_ids)
            for token, index in self.get_vocab().items():
                if index not in special:
                    items[index] = int(token) if self.item_type == "int" else _unescape(token)
            self._items_by_id = items
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(ids, int):
            if not -1 <= ids < len(self._items_by_id):
                raise ValueError(
                    f"`ids` has {ids}; an id may be 0 to {len(self._items_by_id) - 1}, or −1 for no recommendation."
                )
            return None if ids == -1 else self._items_by_id[ids]
        if not isinstance(ids, Iterable) or isinstance(ids, str):
            raise ValueError(
                f"`ids` has {ids!r}; it must be whole numbers from 0 to {len(self._items_by_id) - 1}, or −1."
            )
        return [self.decode_items(index) for index in ids]

    def add_items(self, items: Iterable[int | str]) -> int:
        """
        Append raw ids to the vocabulary. Items that it has keep their ids. Call
        `model.resize_token_embeddings(len(tokenizer))` afterwards.

        A vocabulary of strings accepts integers as decimal digits, because a log in which all ids are digits is read as one
        of integers.

        Args:
            items (`Iterable[int | str]`): Raw ids.

        Returns:
            `int`: The number of new items.

        Raises:
            ValueError: If `items` is a single string, or an item is a string, for a vocabulary of integers. Nothing is
                added then.
        """
        items = _as_list(items)
        if self.item_type == "str":
            is_integer = [hasattr(item, "__index__") and not isinstance(item, bool) for item in items]
            items = [str(int(item)) if integer else item for item, integer in zip(items, is_integer)]
        elif texts := [item for item in items if isinstance(item, str)]:
            text = min(texts, key=str.isdecimal)  # one with other characters than digits, if any
            raise ValueError(
                f"`items` has the text id {text!r}, but the ids of this vocabulary are integers: give the new items "
                "integer ids, or train a new model on a log whose ids are text."
            )
        tokens = _to_tokens(items, self.item_type)
        # Not `add_tokens`, which would match inside other ids (`xnew5y` contains `new5`).
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        before = len(vocab)
        for token in tokens:
            vocab.setdefault(token, len(vocab))
        self._tokenizer.model = WordLevel(vocab, self.unk_token)
        self._items_by_id = None
        return len(vocab) - before

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        """As in `transformers`; `text` may also be a list of integer ids, or a list of lists of raw ids."""
        return super().__call__(self._as_text(text), *args, **kwargs)

    def _as_text(self, text: Any) -> Any:
        text = text.tolist() if hasattr(text, "tolist") else text
        if not isinstance(text, (list, tuple)) or all(isinstance(entry, str) for entry in text):
            return text
        if all(isinstance(entry, Sequence) and not isinstance(entry, str) for entry in text):
            return [" ".join(_to_tokens(history, self.item_type)) for history in text]
        return " ".join(_to_tokens(text, self.item_type))


def _as_list(items: Any) -> list:
    """A list of raw ids. A string is refused, because its characters would be the ids."""
    if isinstance(items, str):
        raise ValueError(f"`items` is {items!r}; it must be a list of raw ids, such as [{items!r}].")
    return items.tolist() if hasattr(items, "tolist") else list(items)


def _to_tokens(items: Iterable[int | str], item_type: str) -> list[str]:
    items = _as_list(items)
    wanted = int if item_type == "int" else str
    for item in items:
        if not isinstance(item, wanted) or isinstance(item, bool):
            if wanted is int and hasattr(item, "__index__") and not isinstance(item, bool):
                continue  # a numpy integer
            raise ValueError(
                f"`items` has {item!r}, a {type(item).__name__}; all raw ids of this tokenizer are {item_type}."
            )
    return [str(int(item)) for item in items] if wanted is int else [_escape(item) for item in items]
