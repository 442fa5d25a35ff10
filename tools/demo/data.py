"""Writes the data of the miniature: training items of the three edges, tasks, and the calibration documents.

    NAME.train.jsonl   {"prompt", "completion"}: which-is-true, single questions and statements on the domain's facts
    NAME.val.jsonl     the same forms, other prompts
    NAME.jsonl         task: single questions on the domain's facts, in wordings that no training item has
    NAME.true.jsonl    task: which-is-true on the domain's facts, in a wording that no training item has
    A_B.jsonl          task: which-is-true over two facts of A and two of B
    general.jsonl      task: single and which-is-true questions on what the base knows
    calibration.jsonl  {"text"}: documents of the mixture that the base was trained on
"""

import json
import random
from pathlib import Path

import base
import world
from world import DOMAINS, LETTERS, PAIRS, STATEMENTS, TEST_QUESTIONS, TEST_WHICH_TRUE, TRAIN_QUESTIONS, TRAIN_WHICH_TRUE

QUESTIONS_PER_TASK = 240
# Items of a training file, by form. Every fact occurs equally often in each form.
WHICH_TRUE_ITEMS, SINGLE_ITEMS, STATEMENT_ITEMS = 2400, 1680, 720
VALIDATION_ITEMS = 60  # which-is-true and single each


def cycle(draw, facts, count):
    """`count` facts, each equally often, in random order."""
    order = [facts[i % len(facts)] for i in range(count)]
    draw.shuffle(order)
    return order


def which_true_about(draw, wording, fact, facts):
    """A which-is-true question whose true line is `fact`, the false ones about other facts of `facts`."""
    others = draw.sample([f for f in facts if f != fact], 3)
    return world.which_true(draw, wording, [fact, *others], 0)


def options(prompt):
    """The option lines of a question, in their order."""
    return tuple(prompt.split("\n")[:4])


def training(draw, facts, counts, taken, reserved):
    """Items on `facts`, `counts` = (which-is-true, single): none in `taken`, which grows, no options in `reserved`."""
    items = []
    for count, wordings, make in (
        (counts[0], TRAIN_WHICH_TRUE, lambda w, f: which_true_about(draw, w, f, facts)),
        (counts[1], TRAIN_QUESTIONS, lambda w, f: world.single(draw, w, f)),
    ):
        for fact in cycle(draw, facts, count):
            prompt, answer = make(draw.choice(wordings), fact)
            while prompt in taken or options(prompt) in reserved:
                prompt, answer = make(draw.choice(wordings), fact)
            taken.add(prompt)
            items.append({"prompt": prompt, "completion": " " + LETTERS[answer]})
    return items


def task(name, questions):
    """Task items of (prompt, answer); each prompt once."""
    assert len({prompt for prompt, _ in questions}) == len(questions), f"{name}: a question twice"
    continuations = [" " + letter for letter in LETTERS]
    return [
        {"id": f"{name}-{i}", "prompt": prompt, "continuations": continuations, "answer": answer}
        for i, (prompt, answer) in enumerate(questions)
    ]


def distinct(count, make):
    """`count` questions (prompt, answer) from `make(i)`, none twice."""
    found = {}
    while len(found) < count:
        prompt, answer = make(len(found))
        found.setdefault(prompt, answer)
    return list(found.items())


def cross(draw, one, other):
    """Which-is-true over two facts of each side; the sides take turns in having the true one."""

    def make(i):
        facts = draw.sample(one, 2) + draw.sample(other, 2)
        return world.which_true(draw, draw.choice(TEST_WHICH_TRUE), facts, 2 * (i % 2) + draw.randrange(2))

    return distinct(QUESTIONS_PER_TASK, make)


def general(draw):
    facts = base.GENERAL_FACTS

    def make(i):
        if i % 2:
            return world.which_true(draw, draw.choice(TEST_WHICH_TRUE), draw.sample(facts, 4), 0)
        return world.single(draw, draw.choice(TEST_QUESTIONS), draw.choice(facts))

    return distinct(QUESTIONS_PER_TASK, make)


def calibration(draw, count=32, longest=64):
    """Documents of the base's mixture, every other one a which-is-true question, of less than `longest` tokens."""
    words, texts = {i: token for token, i in world.IDS.items()}, []
    while len(texts) < count:
        ids = (base.which_true(draw) if len(texts) % 2 else base.knowledge(draw)).ids
        if len(ids) < longest:
            texts.append(" ".join(words[i] for i in ids[1:-1]).replace(" \n ", "\n"))
    return [{"text": text} for text in texts]


def make(seed):
    """Every file's items, {file name: [dict]}."""
    facts = world.private_facts(seed)
    draw = random.Random(seed)
    files = {}
    for name in DOMAINS:
        own = facts[name]
        order = cycle(draw, own, QUESTIONS_PER_TASK)
        files[f"{name}.jsonl"] = task(
            name, distinct(len(order), lambda i: world.single(draw, TEST_QUESTIONS[i % len(TEST_QUESTIONS)], order[i]))
        )
        files[f"{name}.true.jsonl"] = task(
            f"{name}-true",
            distinct(len(order), lambda i: which_true_about(draw, draw.choice(TEST_WHICH_TRUE), order[i], own)),
        )
    for one, other in PAIRS:
        files[f"{one}_{other}.jsonl"] = task(f"{one}-{other}", cross(draw, facts[one], facts[other]))
    files["general.jsonl"] = task("general", general(draw))
    asked = {options(q["prompt"]) for questions in files.values() for q in questions}
    for name in DOMAINS:
        taken = set()
        items = training(draw, facts[name], (WHICH_TRUE_ITEMS, SINGLE_ITEMS), taken, asked)
        for i, fact in enumerate(cycle(draw, facts[name], STATEMENT_ITEMS)):
            prompt, value = world.statement(STATEMENTS[i % len(STATEMENTS)], fact)
            items.append({"prompt": prompt, "completion": value})
        draw.shuffle(items)
        files[f"{name}.train.jsonl"] = items
        files[f"{name}.val.jsonl"] = training(draw, facts[name], (VALIDATION_ITEMS, VALIDATION_ITEMS), taken, asked)
    files["calibration.jsonl"] = calibration(draw)
    return files


def check(files):
    """Fail unless every task has its questions, and neither their wordings nor their options in order are trained on."""
    slots = dict.fromkeys(world.ENTITIES, "{e}") | dict.fromkeys(world.RELATIONS, "{r}")

    def wording(prompt):
        return " ".join(slots.get(word, word) for word in prompt.split("\n")[4].split())

    trained = [x["prompt"] for name, items in files.items() if ".train." in name for x in items]
    trained = [prompt for prompt in trained if "\n" in prompt]
    orders, wordings = {options(prompt) for prompt in trained}, {wording(prompt) for prompt in trained}
    tasks = {name: items for name, items in files.items() if "continuations" in items[0]}
    assert len(tasks) == 2 * len(DOMAINS) + len(PAIRS) + 1, "a task is missing"
    for name, items in tasks.items():
        for x in items:
            assert wording(x["prompt"]) not in wordings, f"{name}: the wording of {x['id']} is trained on"
            assert options(x["prompt"]) not in orders, f"{name}: the options of {x['id']} are trained on"
        counts = [sum(x["answer"] == i for x in items) for i in range(4)]
        assert len(items) >= 240 and min(counts) >= len(items) // 8, f"{name}: answers {counts}"


def save(files, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in files.items():
        lines = "".join(json.dumps(x, ensure_ascii=False, separators=(",", ":")) + "\n" for x in items)
        (folder / name).write_text(lines)
