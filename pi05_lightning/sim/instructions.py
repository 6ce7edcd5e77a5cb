"""What a policy is told in a rollout: the right instruction, another task's, the same in other words, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from pi05_lightning.data.prompt import clean_task
from pi05_lightning.files.yaml_files import read_yaml
from pi05_lightning.sim.environment import EnvironmentConfig, check_tasks

Instruction = Literal["right", "swapped", "paraphrased", "empty"]
INSTRUCTIONS: tuple[Instruction, ...] = get_args(Instruction)
PARAPHRASES = Path(__file__).with_name("paraphrases.yaml")


def swapped_tasks(
    tasks: Sequence[str],
    swaps: Mapping[str, str],
    partners: Mapping[str, str],
    sentence_of: Callable[[str], str | None] = lambda task: None,
) -> dict[str, str]:
    """task -> the other one whose instruction is given in its scene.

    swaps: as the user says.  partners: tasks of one scene. Where neither says, it is the next one of `tasks`, whose
    instruction is another one.  sentence_of: a task's instruction, None where only its environment can tell.
    Raises ValueError where there is no other one, and for swaps of tasks that are not run.
    """
    for task in swaps:
        if task not in tasks:
            raise ValueError(f"swaps: {task} is not run, only {', '.join(tasks)}")
    found = {}
    for place, task in enumerate(tasks):
        others, said = [partners.get(task, task), *tasks[place + 1 :], *tasks[:place]], sentence_of(task)
        if task in swaps:
            others = [swaps[task]]
        other = next((o for o in others if o != task and (said is None or sentence_of(o) != said)), None)
        if other is None:
            raise ValueError(
                f"instructions swapped: there is no other instruction than that of {task}: name a task that has one, as"
                f" --swaps '{{{task}: another task}}'"
            )
        found[task] = other
    return found


def read_paraphrases(file: Path) -> dict[str, list[str]]:
    """instruction -> the same in other words, from a YAML file.

    Raises ValueError for a file that is none, or holds anything else.
    """
    found = read_yaml(file) if file.is_file() else None
    if found is None:
        raise ValueError(f"paraphrases: there is no file {file} with them")
    for sentence, others in found.items() if isinstance(found, dict) else [(file, None)]:
        if not isinstance(others, list) or not others or not all(isinstance(o, str) and o.strip() for o in others):
            raise ValueError(f"{file}, {sentence}: expected an instruction and a list of the same in other words")
    return found


def check_unheard(paraphrases: Mapping[str, Sequence[str]], heard: Sequence[str], file: Path) -> None:
    """ValueError for other words that a policy was trained on: whether it understands new ones would not be measured.

    heard: the instructions that it was trained on.
    """
    known = {clean_task(sentence) for sentence in heard}
    for sentence, others in paraphrases.items():
        if trained := [other for other in others if clean_task(other) in known]:
            raise ValueError(f"{file}, {sentence}: the policy was trained on {trained[0]!r}: take it out of the file")


def paraphrase(paraphrases: Mapping[str, Sequence[str]], sentence: str, number: int) -> str:
    """The instruction in other words, which take turns with the number of the episode.

    Raises ValueError, which says what to add, for a sentence without any.
    """
    if sentence not in paraphrases:
        raise ValueError(
            f"instructions paraphrased: there is {sentence!r} in no other words: give a YAML file with a list of them,"
            f" as `{sentence}: [...]`, with --paraphrases"
        )
    return paraphrases[sentence][number % len(paraphrases[sentence])]


# --- of a simulator's tasks


def sentence_of(env: EnvironmentConfig, task: str) -> str | None:
    """A task's instruction; None where only its environment can tell."""
    return next(iter(env.sentences(task)), None)


def swapped_of(env: EnvironmentConfig, tasks: Sequence[str], swaps: Mapping[str, str]) -> dict[str, str]:
    """task -> the one whose instruction is given. ValueError where there is none."""
    check_tasks(env, swaps.values())
    return swapped_tasks(tasks, swaps, env.partners(tasks), partial(sentence_of, env))


def paraphrases_of(
    env: EnvironmentConfig, tasks: Sequence[str], file: Path, heard: Sequence[str]
) -> dict[str, list[str]]:
    """instruction -> the same in other words, for every task whose instruction is known before it is opened.

    heard: the instructions that the policy was trained on.  ValueError for a task without other words, and for heard
    ones.
    """
    words = read_paraphrases(file)
    for sentence in filter(None, map(partial(sentence_of, env), tasks)):
        paraphrase(words, sentence, 0)
    check_unheard(words, heard, file)
    return words
