"""Byte-pair encoding of whole batches, token for token what `tokenizers` gives, in linear time.

Merging pair by pair needs a priority queue and a step per merge. This reads left to right instead: take the longest
token that fits, check that it may stand beside the one before it, step back where it may not. A sequence of tokens is
what BPE gives if and only if each pair of neighbours is (Berglund and van der Merwe, "Formalizing BPE Tokenization",
arXiv 2309.08715), and whether two tokens may stand side by side is a table. FAST chunks are long and made of few tokens,
so this is much less work (`benchmarks/fast.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
from tokenizers import Tokenizer

NEVER = np.iinfo(np.int32).max  # the rank of a pair that no rule merges

LETTER, NUMBER, OTHER, SPACE, BLANK, APOSTROPHE = range(6)


class BatchBPE:
    """A `tokenizers` BPE model whose texts are rows of characters 0..n-1.

    spelling: for each character, the token ids that BPE starts from: one, or one per byte under a byte-level scheme.
    Raises ValueError for a model that this method does not cover: one that is no plain BPE, or whose merge rules do not
    come in the order in which training finds them.
    """

    def __init__(self, tokenizer: Tokenizer, spelling: Sequence[Sequence[int]]) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        merges = _merge_rules(model)
        vocab = tokenizer.get_vocab_size()
        left, right, rank = np.full((3, vocab), -1, dtype=np.int32)
        for order, (first, second, merged) in enumerate(merges):
            if rank[merged] >= 0 or rank[first] >= order or rank[second] >= order:
                raise ValueError("merge rules out of order")
            left[merged], right[merged], rank[merged] = first, second, order
        pair_rank = np.full((vocab, vocab), NEVER, dtype=np.int32)
        for order, (first, second, _) in enumerate(merges):
            pair_rank[first, second] = order

        atoms = sorted({atom for word in spelling for atom in word})
        symbol = {atom: place for place, atom in enumerate(atoms)}
        spelled = {atom: [symbol[atom]] for atom in atoms}
        for first, second, merged in merges:
            parts_occur = first in spelled and second in spelled
            if parts_occur and _stand_apart(first, second, rank[merged], left, right, rank, pair_rank):
                spelled[merged] = spelled[first] + spelled[second]
        self._neighbours = _neighbour_table(np.array(sorted(spelled)), left, right, rank, pair_rank)
        self._length = np.zeros(vocab, dtype=np.int32)
        self._length[list(spelled)] = [len(word) for word in spelled.values()]
        self._shorter = _shorter(spelled, vocab)
        self._trie = _trie(spelled)
        self._spelling = np.full((len(spelling), max(map(len, spelling))), -1, dtype=np.int32)
        for character, word in enumerate(spelling):
            self._spelling[character, : len(word)] = [symbol[atom] for atom in word]
        self._kinds = _character_kinds(tokenizer, len(spelling))

    def __call__(self, characters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all rows of i32[N L], one after the other, and where each row ends, i64[N]."""
        return _encode(
            np.ascontiguousarray(characters, dtype=np.int32),
            self._spelling,
            self._kinds,
            self._trie,
            self._length,
            self._shorter,
            self._neighbours,
        )


def _merge_rules(model: dict) -> list[tuple[int, int, int]]:
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    if model["type"] != "BPE" or any(model.get(key) not in (value, "") for key, value in plain.items()):
        raise ValueError("not a plain BPE model")
    ids = model["vocab"]
    return [(ids[first], ids[second], ids[first + second]) for first, second in model["merges"]]


def _character_kinds(tokenizer: Tokenizer, count: int) -> np.ndarray:
    """How the tokenizer cuts texts into words before BPE: one kind per character, or none at all if it does not.

    The only cutting known here is GPT-2's, which comes with `ByteLevel`; the kinds are asked of it, not assumed.
    """
    stage = tokenizer.pre_tokenizer
    if tokenizer.normalizer is not None:
        raise ValueError("the tokenizer rewrites its text")
    if stage is None:
        return np.zeros(0, dtype=np.int8)
    settings = json.loads(tokenizer.to_str())["pre_tokenizer"]
    if settings["type"] != "ByteLevel" or settings["add_prefix_space"]:
        raise ValueError(f"an unknown pre-tokenizer, {settings['type']}")
    if not settings["use_regex"]:
        return np.zeros(0, dtype=np.int8)
    kinds = np.full(count, SPACE, dtype=np.int8)
    for kind, neighbour in ((LETTER, "a"), (NUMBER, "1"), (OTHER, "!")):
        for character in range(count):
            if len(stage.pre_tokenize_str(neighbour + chr(character))) == 1:
                kinds[character] = kind
    kinds[[c for c in (ord(" "),) if c < count]] = BLANK
    kinds[[c for c in (ord("'"),) if c < count]] = APOSTROPHE
    return kinds


class _Trie(NamedTuple):
    """All tokens by their symbols, parents before children and the largest child right behind its parent.

    symbol: i32[nodes] that leads here from the node before, -1 if another one is the parent; those edges are in a hash
    table, keys and nodes i64[slots].  token: i32[nodes] that ends here, or -1.
    """

    symbol: np.ndarray
    token: np.ndarray
    keys: np.ndarray
    nodes: np.ndarray


def _trie(spelled: dict[int, list[int]]) -> _Trie:
    edges: list[dict[int, int]] = [{}]
    tokens = [-1]
    for token, word in spelled.items():
        node = 0
        for symbol in word:
            node = edges[node].setdefault(symbol, len(edges))
            if node == len(edges):
                edges.append({})
                tokens.append(-1)
        tokens[node] = token
    size = [1] * len(edges)
    for node in reversed(range(len(edges))):
        size[node] += sum(size[child] for child in edges[node].values())

    trie = _Trie(*np.full((2, len(edges)), -1, dtype=np.int32), *np.full((2, _power_of_two(2 * len(edges))), -1))
    stack = [(0, -1, -1)]
    for place in range(len(edges)):
        node, symbol, parent = stack.pop()
        trie.token[place] = tokens[node]
        if parent == place - 1:
            trie.symbol[place] = symbol
        else:
            slot = _slot(trie.keys, parent, symbol)
            trie.keys[slot], trie.nodes[slot] = _key(parent, symbol), place
        children = sorted(edges[node].items(), key=lambda edge: size[edge[1]])
        stack.extend((child, symbol, place) for symbol, child in children)
    return trie


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _shorter(spelled: dict[int, list[int]], vocab: int) -> np.ndarray:
    """For each token the longest other one that begins it, or -1."""
    token_of = {tuple(word): token for token, word in spelled.items()}
    shorter = np.full(vocab, -1, dtype=np.int32)
    for token, word in spelled.items():
        beginnings = (token_of.get(tuple(word[:end])) for end in range(len(word) - 1, 0, -1))
        shorter[token] = next((other for other in beginnings if other is not None), -1)
    return shorter


@numba.njit(cache=True, nogil=True)
def _key(node, symbol):  # type: ignore[no-untyped-def]
    return np.int64(node) << 16 | np.int64(symbol)


@numba.njit(cache=True, nogil=True)
def _slot(keys, node, symbol):  # type: ignore[no-untyped-def]
    """Where the edge is in the hash table, or where it would go."""
    key = _key(node, symbol)
    mask = len(keys) - 1
    slot = (key * 0x9E3779B1 >> 16) & mask  # Fibonacci hashing
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@numba.njit(cache=True, nogil=True)
def _stand_apart(first, second, deadline, left, right, rank, pair_rank):  # type: ignore[no-untyped-def]
    """Whether BPE, given the text of two tokens, makes both and nothing across their border before rank `deadline`.

    Takes the tokens apart in reverse order of merging. At each moment a piece of the first touches a piece of the
    second; a rule for those two would have acted if its turn came before either piece was merged away. On equal rank
    the leftmost goes first, hence `<` on one side and `<=` on the other.
    """
    first_gone = second_gone = deadline
    while True:
        across = pair_rank[first, second]
        if across < first_gone and across <= second_gone:
            return False
        if rank[first] < 0 and rank[second] < 0:
            return True
        if rank[first] > rank[second]:
            first_gone = rank[first]
            first = right[first]
        else:
            second_gone = rank[second]
            second = left[second]


@numba.njit(cache=True, nogil=True)
def _neighbour_table(tokens, left, right, rank, pair_rank):  # type: ignore[no-untyped-def]
    table = np.zeros(pair_rank.shape, dtype=np.bool_)
    for first in tokens:
        for second in tokens:
            table[first, second] = _stand_apart(first, second, NEVER, left, right, rank, pair_rank)
    return table


@numba.njit(cache=True, nogil=True)
def _encode(characters, spelling, kinds, trie, length, shorter, neighbours):  # type: ignore[no-untyped-def]
    rows, columns = characters.shape
    symbols = np.empty(columns * spelling.shape[1], dtype=np.int32)
    dead = np.empty(len(symbols) + 1, dtype=np.bool_)
    ids = np.empty(rows * len(symbols), dtype=np.int32)
    row_ends = np.empty(rows, dtype=np.int64)
    count = 0
    for row in range(rows):
        text = characters[row]
        begin = 0
        while begin < columns:
            end = _word_end(text, begin, kinds) if len(kinds) else columns
            size = 0
            for character in text[begin:end]:
                for symbol in spelling[character]:
                    if symbol >= 0:
                        symbols[size] = symbol
                        size += 1
            count = _encode_word(symbols[:size], ids, count, dead, trie, length, shorter, neighbours)
            begin = end
        row_ends[row] = count
    return ids[:count], row_ends


@numba.njit(cache=True, nogil=True)
def _encode_word(symbols, ids, start, dead, trie, length, shorter, neighbours):  # type: ignore[no-untyped-def]
    """Write the word's tokens at ids[start:] and return where they end.

    dead marks positions from which no way leads on; the tokens up to a position are the same whichever way it is reached.
    """
    dead[: len(symbols) + 1] = False
    count, position = start, 0
    token = _longest(symbols, position, trie)
    while True:
        while token >= 0 and (
            dead[position + length[token]] or (count > start and not neighbours[ids[count - 1], token])
        ):
            token = shorter[token]
        if token < 0:
            dead[position] = True
            count -= 1
            position -= length[ids[count]]
            token = shorter[ids[count]]
            continue
        ids[count] = token
        count += 1
        position += length[token]
        if position == len(symbols):
            return count
        token = _longest(symbols, position, trie)


@numba.njit(cache=True, nogil=True)
def _longest(symbols, position, trie):  # type: ignore[no-untyped-def]
    node, token = np.int64(0), np.int32(-1)
    for symbol in symbols[position:]:
        if node + 1 < len(trie.symbol) and trie.symbol[node + 1] == symbol:
            node += 1
        else:
            slot = _slot(trie.keys, node, symbol)
            if trie.keys[slot] == -1:
                break
            node = trie.nodes[slot]
        if trie.token[node] >= 0:
            token = trie.token[node]
    return token


@numba.njit(cache=True, nogil=True)
def _word_end(text, begin, kinds):  # type: ignore[no-untyped-def]
    """Where GPT-2's pattern ends the word that begins here: 's|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?O+|\\s+(?!\\S)|\\s+"""
    size = len(text)
    if kinds[text[begin]] == APOSTROPHE and begin + 1 < size:
        one = text[begin + 1]
        two = text[begin + 2] if begin + 2 < size else -1
        if one in (ord("s"), ord("t"), ord("m"), ord("d")):
            return begin + 2
        if (one in (ord("r"), ord("v")) and two == ord("e")) or (one == ord("l") and two == ord("l")):
            return begin + 3
    end = begin
    if kinds[text[begin]] == BLANK and begin + 1 < size and kinds[text[begin + 1]] not in (SPACE, BLANK):
        end += 1
    kind = kinds[text[end]]
    while end < size and _same_kind(kinds[text[end]], kind):
        end += 1
    is_space = kind == SPACE or kind == BLANK
    return end - 1 if is_space and end < size and end - begin > 1 else end


@numba.njit(cache=True, nogil=True)
def _same_kind(one, other):  # type: ignore[no-untyped-def]
    if one == APOSTROPHE or other == APOSTROPHE:
        return one in (APOSTROPHE, OTHER) and other in (APOSTROPHE, OTHER)
    if one == BLANK or other == BLANK:
        return one in (BLANK, SPACE) and other in (BLANK, SPACE)
    return one == other
