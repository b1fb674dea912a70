"""Prompts to numbers and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikastream_jax.text.tokenizer import PAD, START, UNKNOWN, Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.;:!?'-"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(("man", "smiles", "woman"), 12)


def pieces(tokenizer, text):
    """The pieces that a text is cut into, decoded independently of the encoder."""
    names = ("<pad>", "<start>", "<unknown>", *LETTERS, *tokenizer.words)
    tokens, valid = tokenizer.encode(text)
    assert tokens.shape == (tokenizer.length,) and (tokens[valid:] == PAD).all()
    return [names[token] for token in tokens[:valid]]


def test_known_words_are_one_token(tokenizer):
    assert pieces(tokenizer, "Woman SMILES") == ["<start>", "woman", "smiles"]


def test_unknown_words_are_spelled(tokenizer):
    assert pieces(tokenizer, "man grins!") == ["<start>", "man", "g", "r", "i", "n", "s", "!"]


def test_numbers_are_spelled_and_signs_stand_alone(tokenizer):
    assert pieces(tokenizer, "woman,42") == ["<start>", "woman", ",", "4", "2"]


def test_what_no_letter_spells_is_unknown(tokenizer):
    assert pieces(tokenizer, "é man ☺") == ["<start>", "<unknown>", "man", "<unknown>"]
    assert UNKNOWN in tokenizer.encode("é")[0]


def test_a_long_prompt_is_cut(tokenizer):
    tokens, valid = tokenizer.encode("smiles " * 30)
    assert valid == tokenizer.length == len(tokens)
    assert (tokens[1:] == tokens[1]).all() and tokens[0] == START


@pytest.mark.parametrize("text", ["", "   \n\t"])
def test_the_empty_prompt_is_the_start_token_alone(tokenizer, text):
    tokens, valid = tokenizer.encode(text)
    assert valid == 1 and tokens.tolist() == [START] + [PAD] * (tokenizer.length - 1)


def test_a_batch_is_its_prompts(tokenizer):
    tokens, valid = tokenizer.encode_batch(["man", "", "woman smiles"])
    assert tokens.shape == (3, tokenizer.length) and valid.tolist() == [2, 1, 3]
    assert tokens[2].tolist() == tokenizer.encode("woman smiles")[0].tolist()


def test_learning_keeps_the_most_frequent_words():
    texts = ["smiles smiles smiles a a a a", "woman woman, man!", "frowns"]
    room = len(LETTERS) + 3
    learned = Tokenizer.learn(texts, room + 2, 8)
    assert learned.words == ("smiles", "woman"), "sorted, and no single letters: those are known already"
    assert learned.size == room + 2
    assert Tokenizer.learn(texts, room + 3, 8).words == ("frowns", "smiles", "woman"), "ties by the alphabet"
    assert Tokenizer.learn(texts, 512, 8).size == room + 4


def test_too_small_a_vocabulary_is_named():
    with pytest.raises(ValueError, match="size 47 leaves no room for words; use more than 47"):
        Tokenizer.learn(["smiles"], 47, 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["man", "woman", "smiles", "nods", "x", "7", "?"]), max_size=30))
def test_every_text_of_words_comes_back(words):
    """Spelling and whole words together lose nothing but spaces, until the cut."""
    tokenizer = Tokenizer(("man", "smiles", "woman"), 40)
    back = "".join(pieces(tokenizer, " ".join(words))[1:])
    assert "".join(words).startswith(back)
    if tokenizer.encode(" ".join(words))[1] < tokenizer.length:
        assert back == "".join(words)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_any_text_gives_tokens_in_range(text):
    tokenizer = Tokenizer(("man", "smiles", "woman"), 12)
    tokens, valid = tokenizer.encode(text)
    assert tokens[0] == START and 1 <= valid <= 12
    assert (tokens >= 0).all() and (tokens < tokenizer.size).all()
    assert (tokens[:valid] != PAD).all()


def test_the_vocabulary_is_all_that_need_be_stored(tokenizer):
    again = Tokenizer(list(tokenizer.words), tokenizer.length)
    assert again.encode("a woman grins")[0].tolist() == tokenizer.encode("a woman grins")[0].tolist()
