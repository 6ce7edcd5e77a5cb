"""Byte-pair encoding of whole batches: token for token what `tokenizers` gives, several times as fast.

Merging pair by pair takes a priority queue and a step per merge. This reads from left to right instead: take the
longest token that fits, check that it may stand beside the one before it, step back where it may not. A sequence of
tokens is what BPE gives if and only if each pair of neighbours is (Berglund and van der Merwe, "Formalizing BPE
Tokenization", arXiv 2309.08715), and which tokens may be neighbours is a table. FAST chunks are long and made of few
tokens, so this is much less work. The rare word that makes it step back again and again is merged the plain way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from tokenizers import Tokenizer

NEVER = np.iinfo(np.int32).max  # the rank of a pair that no rule merges
PATIENCE = 8  # times the word's length that may be read in it, before it is merged the plain way

LETTER, NUMBER, OTHER, SPACE, BLANK, APOSTROPHE = range(6)


class Trie(NamedTuple):
    """All tokens by the atoms that they are made of; parents first, the largest child right behind its parent.

    pairs: i32[A A] node after two atoms, -1 for none.  atom: i32[nodes] that leads here from the node before, -1 if
    another node is the parent: those edges are in a hash table, keys and nodes i64[slots].  token: i32[nodes], the
    longest that ends here or on the way.  run: i32[nodes], how many of the next nodes repeat the same atom.
    """

    pairs: np.ndarray
    atom: np.ndarray
    token: np.ndarray
    run: np.ndarray
    keys: np.ndarray
    nodes: np.ndarray


class Tables(NamedTuple):
    """What encoding looks up. V is the vocabulary, C the characters, M the merge rules.

    spelling  i32[C 1..2] atoms of a character, -1 after the last      kinds  i8[C], or empty where texts are one word
    length    i32[V] in atoms       shorter  i32[V] the longest other token that begins this one, or -1
    neighbours  bits, u8[V V/8]     fitting  i32[V V] the longest beginning of a token that may follow another, or -1
    pair_rank   i32[V V] of the rule that merges two tokens     merged  i32[M] its result
    """

    spelling: np.ndarray
    kinds: np.ndarray
    trie: Trie
    length: np.ndarray
    shorter: np.ndarray
    neighbours: np.ndarray
    fitting: np.ndarray
    pair_rank: np.ndarray
    merged: np.ndarray


class BatchBPE:
    """A `tokenizers` BPE model for texts that come as rows of characters 0..C-1.

    spelling: for each character the token ids that BPE starts from: one, or one per byte under a byte-level scheme.
    Raises ValueError for a model that this method does not cover: one that is no plain BPE, or whose merge rules are
    not in the order in which training finds them.
    """

    def __init__(self, tokenizer: Tokenizer, spelling: Sequence[Sequence[int]]) -> None:
        settings = json.loads(tokenizer.to_str())
        kinds = _character_kinds(tokenizer, settings, len(spelling))
        merges = _merge_rules(settings["model"])
        vocab = tokenizer.get_vocab_size()
        left, right, rank = np.full((3, vocab), -1, dtype=np.int32)
        pair_rank = np.full((vocab, vocab), NEVER, dtype=np.int32)
        known = {token for letter, token in settings["model"]["vocab"].items() if len(letter) == 1}
        for order, (first, second, merged) in enumerate(merges):
            if merged in known or not {first, second} <= known:
                raise ValueError("its merge rules are not in the order of training")
            known.add(merged)
            left[merged], right[merged], rank[merged] = first, second, order
            pair_rank[first, second] = order

        made_of = {atom: [atom] for word in spelling for atom in word}
        for first, second, merged in merges:
            occurs = first in made_of and second in made_of
            if occurs and _may_touch(first, second, rank[merged], left, right, rank, pair_rank):
                made_of[merged] = made_of[first] + made_of[second]
        length = np.zeros(vocab, dtype=np.int32)
        length[list(made_of)] = [len(atoms) for atoms in made_of.values()]
        neighbours = _neighbours(np.array(list(made_of)), left, right, rank, pair_rank)
        shorter = _shorter(made_of, vocab)
        self._tables = Tables(
            spelling=_rectangle(spelling),
            kinds=kinds,
            trie=_trie(made_of),
            length=length,
            shorter=shorter,
            neighbours=np.packbits(neighbours, axis=1, bitorder="little"),
            fitting=_fitting(neighbours, shorter),
            pair_rank=pair_rank,
            merged=np.array([merged for _, _, merged in merges], dtype=np.int32),
        )

    def __call__(self, characters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all rows of i32[N L], one after the other, and where each row ends, i64[N]."""
        return _encode(np.ascontiguousarray(characters, dtype=np.int32), self._tables)


# --- tables


def _merge_rules(model: dict[str, Any]) -> list[tuple[int, int, int]]:
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(option) for option in options):
        raise ValueError("it is no plain BPE model")
    ids = model["vocab"]
    return [(ids[first], ids[second], ids[first + second]) for first, second in model["merges"]]


def _character_kinds(tokenizer: Tokenizer, settings: dict[str, Any], count: int) -> np.ndarray:
    """How texts are cut into words before BPE: a kind per character, or nothing where they are not cut.

    The only cutting known here is GPT-2's, which `ByteLevel` brings; the kinds are asked of it rather than assumed.
    """
    stage = settings["pre_tokenizer"] or {"type": None}
    if settings["normalizer"] or settings["added_tokens"]:
        raise ValueError("it rewrites texts or knows special tokens")
    if stage["type"] not in (None, "ByteLevel") or stage.get("add_prefix_space"):
        raise ValueError(f"it cuts texts in an unknown way, {stage['type']}")
    if not stage.get("use_regex"):
        return np.zeros(0, dtype=np.int8)
    kinds = np.full(max(count, 128), SPACE, dtype=np.int8)
    for kind, example in ((LETTER, "a"), (NUMBER, "1"), (OTHER, "!")):
        for character in range(count):
            if len(tokenizer.pre_tokenizer.pre_tokenize_str(example + chr(character))) == 1:
                kinds[character] = kind
    kinds[ord(" ")], kinds[ord("'")] = BLANK, APOSTROPHE
    return kinds


def _rectangle(rows: Sequence[Sequence[int]]) -> np.ndarray:
    filled = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
    return filled


def _shorter(made_of: dict[int, list[int]], vocab: int) -> np.ndarray:
    token_of = {tuple(atoms): token for token, atoms in made_of.items()}
    shorter = np.full(vocab, -1, dtype=np.int32)
    for token, atoms in made_of.items():
        beginnings = (token_of.get(tuple(atoms[:end])) for end in range(len(atoms) - 1, 0, -1))
        shorter[token] = next((other for other in beginnings if other is not None), -1)
    return shorter


def _trie(made_of: dict[int, list[int]]) -> Trie:
    edges: list[dict[int, int]] = [{}]
    longest = [-1]
    for token, atoms in sorted(made_of.items(), key=lambda item: len(item[1])):
        node = 0
        for atom in atoms:
            parent, node = node, edges[node].setdefault(atom, len(edges))
            if node == len(edges):
                edges.append({})
                longest.append(longest[parent])
        longest[node] = token
    size = [1] * len(edges)
    for node in reversed(range(len(edges))):
        size[node] += sum(size[child] for child in edges[node].values())

    count, letters = len(edges), 1 + max(edges[0])
    slots = 1 << (2 * sum(max(0, len(children) - 1) for children in edges)).bit_length()  # at most half full
    trie = Trie(
        pairs=np.full((letters, letters), -1, dtype=np.int32),
        atom=np.full(count + 1, -1, dtype=np.int32),  # one more, so that there always is a next one
        token=np.empty(count, dtype=np.int32),
        run=np.zeros(count, dtype=np.int32),
        keys=np.full(slots, -1),
        nodes=np.full(slots, -1),
    )
    place_of, own = np.empty((2, count), dtype=np.int32)
    stack = [(0, -1, -1)]
    for place in range(count):
        node, own[place], parent = stack.pop()
        place_of[node], trie.token[place] = place, longest[node]
        if parent == place - 1:
            trie.atom[place] = own[place]
        else:
            slot = _slot(trie.keys, parent, own[place])
            trie.keys[slot], trie.nodes[slot] = _key(parent, own[place]), place
        children = sorted(edges[node].items(), key=lambda edge: size[edge[1]])
        stack.extend((child, atom, place) for atom, child in children)
    for place in reversed(range(1, count)):
        if trie.atom[place + 1] == own[place]:
            trie.run[place] = trie.run[place + 1] + 1
    for first, node in edges[0].items():
        for second, child in edges[node].items():
            trie.pairs[first, second] = place_of[child]
    return trie


@numba.njit(cache=True, nogil=True)
def _key(node, atom):
    return np.int64(node) << 20 | np.int64(atom)


@numba.njit(cache=True, nogil=True)
def _slot(keys, node, atom):
    """Where this edge is in the hash table, or where it would go."""
    key = _key(node, atom)
    mask = len(keys) - 1
    slot = (key * 0x9E3779B1 >> 16) & mask  # Knuth's multiplicative hashing
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@numba.njit(cache=True, nogil=True)
def _may_touch(first, second, deadline, left, right, rank, pair_rank):
    """Whether BPE, given the text of two tokens, makes these two and nothing across their border before `deadline`.

    Takes both apart in reverse order of merging. At each moment a piece of the first touches a piece of the second; a
    rule for those two would have acted if its turn had come before either was merged into something larger. Of equal
    ranks the leftmost goes first, hence `<` on one side and `<=` on the other.
    """
    first_gone = second_gone = deadline
    while True:
        across = pair_rank[first, second]
        if across < first_gone and across <= second_gone and across != NEVER:
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
def _neighbours(tokens, left, right, rank, pair_rank):
    table = np.zeros(pair_rank.shape, dtype=np.bool_)
    for first in tokens:
        for second in tokens:
            table[first, second] = _may_touch(first, second, NEVER, left, right, rank, pair_rank)
    return table


@numba.njit(cache=True, nogil=True)
def _fitting(neighbours, shorter):
    fitting = np.empty(neighbours.shape, dtype=np.int32)
    for first in range(len(neighbours)):
        for second in range(len(neighbours)):
            token = second
            while token >= 0 and not neighbours[first, token]:
                token = shorter[token]
            fitting[first, second] = token
    return fitting


# --- encoding


@numba.njit(cache=True, nogil=True)
def _encode(characters, tables):
    rows, columns = characters.shape
    spelling, kinds = tables.spelling, tables.kinds
    # taken out here and handed on by name: taking them out for every word would cost half as much as reading it
    length, shorter, neighbours, fitting = tables.length, tables.shorter, tables.neighbours, tables.fitting
    pairs, edge, longest, run, keys, nodes = tables.trie
    atoms = np.empty(columns * spelling.shape[1], dtype=np.int32)
    runs = np.empty(len(atoms), dtype=np.int32)
    dead = np.empty(len(atoms) + 1, dtype=np.bool_)
    ids = np.empty(rows * len(atoms), dtype=np.int32)
    row_ends = np.empty(rows, dtype=np.int64)
    count = 0
    for row in range(rows):
        text = characters[row]
        begin = 0
        while begin < columns:
            end = _word_end(text, begin, kinds) if len(kinds) else columns
            size = 0
            for place in range(begin, end):
                for letter in range(spelling.shape[1]):
                    atom = spelling[text[place], letter]
                    if atom >= 0:
                        atoms[size] = atom
                        size += 1
            stop = _read_word(
                atoms, size, runs, dead, ids, count,
                length, shorter, neighbours, fitting, pairs, edge, longest, run, keys, nodes,
            )  # fmt: skip
            count = stop if stop >= 0 else _merge_word(atoms[:size], ids, count, tables)
            begin = end
        row_ends[row] = count
    return ids[:count], row_ends


@numba.njit(cache=True, nogil=True, forceinline=True)
def _read_word(
    atoms, size, runs, dead, ids, start,
    length, shorter, neighbours, fitting, pairs, edge, longest, run, keys, nodes,
):  # fmt: skip
    """Write the word's tokens at ids[start:] and return where they end, or -1 when that takes too long.

    dead marks places from which no way leads to the end; whichever way leads to a place, the tokens up to it are the
    same.
    """
    _count_runs(atoms, size, runs)
    dead[: size + 1] = False
    count, place = start, 0
    token, read = _longest(atoms, size, runs, place, pairs, edge, longest, run, keys, nodes)
    while True:
        before = ids[count - 1] if count > start else -1
        while token >= 0:
            if before >= 0 and not neighbours[before, token >> 3] >> (token & 7) & 1:
                token = fitting[before, token]
            elif dead[place + length[token]]:
                token = shorter[token]
            else:
                break
        if token >= 0:
            ids[count] = token
            count += 1
            place += length[token]
            if place == size:
                return count
            token, steps = _longest(atoms, size, runs, place, pairs, edge, longest, run, keys, nodes)
            read += steps
            if read > PATIENCE * size:
                return -1
        else:
            if count == start:
                return -1
            dead[place] = True
            count -= 1
            place -= length[ids[count]]
            token = shorter[ids[count]]


@numba.njit(cache=True, nogil=True, forceinline=True)
def _count_runs(atoms, size, runs):
    """How often each atom follows itself from there on, itself included."""
    count = 0
    for place in range(size - 1, -1, -1):
        count = count + 1 if count and atoms[place] == atoms[place + 1] else 1
        runs[place] = count


@numba.njit(cache=True, nogil=True, forceinline=True)
def _longest(atoms, size, runs, place, pairs, edge, longest, run, keys, nodes):
    """The longest token that begins here, and in how many steps it was found. The last six are the `Trie`."""
    end = place + 1
    node = pairs[atoms[place], atoms[end]] if end < size else -1
    if node < 0:
        return atoms[place], 1
    steps = 1
    while True:
        again = min(runs[end] - 1, run[node])
        node += again
        end += again + 1
        if end == size:
            break
        steps += 1
        if edge[node + 1] == atoms[end]:
            node += 1
        else:
            slot = _slot(keys, node, atoms[end])
            if keys[slot] == -1:
                break
            node = nodes[slot]
    return longest[node], steps


@numba.njit(cache=True, nogil=True)
def _merge_word(atoms, ids, start, tables):
    """The plain way, same contract: again and again merge all pairs of the lowest rank, from left to right."""
    stop = start + len(atoms)
    ids[start:stop] = atoms
    while True:
        lowest = NEVER
        for place in range(start, stop - 1):
            lowest = min(lowest, tables.pair_rank[ids[place], ids[place + 1]])
        if lowest == NEVER:
            return stop
        place = kept = start
        while place < stop:
            if place + 1 < stop and tables.pair_rank[ids[place], ids[place + 1]] == lowest:
                ids[kept] = tables.merged[lowest]
                place += 2
            else:
                ids[kept] = ids[place]
                place += 1
            kept += 1
        stop = kept


@numba.njit(cache=True, nogil=True)
def _word_end(text, begin, kinds):
    """Where GPT-2's pattern ends the word that begins here.

    Letters, numbers or others in a row, one blank before them included; whitespace, but for the last before a word;
    after an apostrophe English contractions.
    """
    size = len(text)
    if kinds[text[begin]] == APOSTROPHE and begin + 1 < size:
        one, two = text[begin + 1], text[begin + 2] if begin + 2 < size else -1
        if one == ord("s") or one == ord("t") or one == ord("m") or one == ord("d"):
            return begin + 2
        if ((one == ord("r") or one == ord("v")) and two == ord("e")) or (one == ord("l") and two == ord("l")):
            return begin + 3
    end = begin
    if kinds[text[begin]] == BLANK and begin + 1 < size and _family(kinds[text[begin + 1]]) != SPACE:
        end += 1
    family = _family(kinds[text[end]])
    while end < size and _family(kinds[text[end]]) == family:
        end += 1
    return end - 1 if family == SPACE and end < size and end - begin > 1 else end


@numba.njit(cache=True, nogil=True)
def _family(kind):
    if kind == BLANK:
        return SPACE
    return OTHER if kind == APOSTROPHE else kind
