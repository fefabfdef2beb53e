"""From text to tokens: the same as the tokenizer alone, cut where it must be, counted."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from offramp.data import encode, load_examples, tokens
from offramp.errors import ConfigError, DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]


def tokenizer(template: bool = True, **options: object) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    given = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": names} | options
    return PreTrainedTokenizerFast(tokenizer_object=words, **given)


def rows(texts: list[str], pairs: list[str] | None = None) -> Dataset:
    columns = {"text": texts} | ({} if pairs is None else {"text_pair": pairs})
    return load_examples(Dataset.from_dict(columns))


words = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.tuples(words, words), min_size=1, max_size=30),
    pairs=st.booleans(),
    limit=st.integers(4, 30),
    batch=st.integers(1, 60),
)
def test_tokens_are_those_of_the_tokenizer_whatever_the_batches(
    texts: list[tuple[str, str]], pairs: bool, limit: int, batch: int
) -> None:
    first, second = (list(column) for column in zip(*texts, strict=True))
    fast = tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "BATCH_CHARACTERS", batch)
        patch.setattr(tokens, "BATCH_ROWS", 7)
        dataset, cut = encode(rows(first, second if pairs else None), fast, limit)
    given = (first, second) if pairs else (first,)
    whole = fast(*given)["input_ids"]
    short = fast(*given, truncation=True, max_length=limit)
    assert dataset["input_ids"][:] == short["input_ids"]
    assert dataset["token_type_ids"][:] == short["token_type_ids"]
    assert dataset["length"][:] == [len(ids) for ids in short["input_ids"]]
    assert cut == sum(len(ids) > limit for ids in whole)


def test_cut_rows_are_said_once_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, cut = encode(rows(["a b c"] * 3000 + ["a"]), tokenizer(), 4)
    assert cut == 3000
    assert [record.message for record in caplog.records] == [
        "3000 of 3001 rows are longer than 4 tokens and were cut."
    ]


def test_the_tokenizers_own_limit_holds_where_it_has_one() -> None:
    dataset, cut = encode(rows(["a " * 50]), tokenizer(model_max_length=10), 20)
    assert (dataset["length"][0], cut) == (10, 1)
    dataset, cut = encode(rows(["a " * 50]), tokenizer())
    assert (dataset["length"][0], cut) == (52, 0)


def test_a_text_of_100_000_tokens_is_cut_and_long_texts_share_no_batch() -> None:
    data = rows(["a " * 100_000] * 5 + ["b"])
    assert max(len(texts) for _, texts in tokens._batches(data)) == 5
    dataset, cut = encode(data, tokenizer(), 512)
    assert dataset["length"][:] == [512] * 5 + [3]
    assert cut == 5
    assert [len(texts) for _, texts in tokens._batches(rows(["a" * 600_000] * 2 + ["b"]))] == [1, 2]


def test_other_columns_stay_and_no_mask_is_kept() -> None:
    data = load_examples(Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}))
    dataset, _ = encode(data, tokenizer())
    names = {"text", "label", "row", "input_ids", "token_type_ids", "length"}
    assert set(dataset.column_names) == names
    assert dataset["label"][:] == [1, 0]
    assert not dataset.cache_files


def test_a_tokenizer_without_pad_token_is_refused_with_the_mend() -> None:
    with pytest.raises(ConfigError, match=r"no pad token.*tokenizer\.pad_token ="):
        encode(rows(["a"]), tokenizer(pad_token=None))


def test_a_limit_without_room_for_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4"):
        encode(rows(["a"], ["b"]), tokenizer(), 3)


def test_a_row_without_any_token_is_named() -> None:
    with pytest.raises(DataError, match=r"Row 1 \(from 0\)"):
        encode(rows(["a", "", "b"]), tokenizer(template=False))
    dataset, _ = encode(rows(["a", ""]), tokenizer())
    assert dataset["length"][:] == [3, 2]
