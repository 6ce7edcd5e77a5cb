"""Makes the shipped tokenizer: `python tools/make_tokenizer.py`. Deterministic; not needed otherwise.

4096 ids, in PaliGemma's order: <pad> <eos> <bos> <unk>, bytes and words, 1024 that no text uses (FAST's), <loc>, <seg>.
Byte-level, so any text comes back as it was; every whole number to 255 is one token, as the state's bins need.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pi05_lightning.data.prompt import Prompts
from pi05_lightning.data.tokenizer import with_coordinates
from pi05_lightning.files.shipped import PACKAGE
from pi05_lightning.types import NUM_LOC, NUM_SEG

VOCAB_SIZE, FAST_SIZE = 4096, 1024
TEXT_SIZE = VOCAB_SIZE - FAST_SIZE - NUM_LOC - NUM_SEG

VERBS = "move reach push pull press pick place open close turn lift lower grasp release slide insert stay put"
PLACES = "above below beside behind ahead left right top bottom middle centre front back inside near at to"
OBJECTS = """
drawer handle window button lever door knob puck block ball goal peg hammer nail basket box shelf stick coffee machine
mug plate soccer faucet gripper arm robot table wall bin cup bowl plate red blue green white black hand object cabinet
microwave stove kettle bottle can book towel sink tray
"""
WORDS = """
task subtask state action caption detect where what is the a an of in on and yes no how many which it there closed open
camera image robot arm over you see shown show main color colour any are
"""


def corpus() -> Iterator[str]:
    """Prompts and the words of manipulation, which decide what becomes one token."""
    for _ in range(20):
        for number in range(256):
            yield f"State: {number} {number}; {number}, {number}."
    prompts = Prompts()
    for _ in range(20):
        for name, template in vars(prompts).items():
            if isinstance(template, str) and name != "advantage":  # is younger, and the tokens stay what they were
                yield template.format(task="", subtask="", state="", question="")
    for verb, place, thing in product(VERBS.split(), PLACES.split(), OBJECTS.split()):
        yield f"{verb} {place} the {thing}"
    for word in " ".join([VERBS, PLACES, OBJECTS, WORDS]).split():
        for _ in range(50):
            yield f"{word} {word}, {word.capitalize()} {word.capitalize()}"


def make() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_SIZE,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    unused = range(VOCAB_SIZE - NUM_LOC - NUM_SEG - tokenizer.get_vocab_size())
    tokenizer.add_tokens([AddedToken(f"<unused{i:04d}>", normalized=False, special=True) for i in unused])
    return with_coordinates(tokenizer)


if __name__ == "__main__":
    (PACKAGE / "data" / "assets" / "tokenizer.json").write_text(make().to_str(), encoding="utf-8")
