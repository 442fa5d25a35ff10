"""The miniature world: its vocabulary, its facts, and the text of every statement and question.

Ten relations have eight values each, and a value belongs to one relation. Twenty-four general entities have all ten
relations; three domains have twenty private entities each, of whom everybody knows the home and only the domain's own
edge knows the three relations of its trade. All randomness is seeded, so the world is the same on every machine.
"""

import random

RELATIONS = {
    "home": "valley coast forest desert island tundra swamp canyon",
    "flag": "red blue green black white yellow purple orange",
    "cargo": "iron copper salt timber grain wool coal spice",
    "mascot": "wolf bear fox otter hawk crow seal lynx",
    "fruit": "apple pear plum fig lemon mango grape cherry",
    "drink": "tea coffee milk cider wine juice cocoa soda",
    "flower": "rose lily iris tulip daisy poppy violet orchid",
    "tool": "hammer saw drill axe wrench chisel file anvil",
    "shape": "circle square cube cone ring star wedge prism",
    "gem": "ruby opal jade pearl topaz garnet amber onyx",
}
RELATIONS = {relation: values.split() for relation, values in RELATIONS.items()}
DOMAINS = {
    "harbour": ["flag", "cargo", "mascot"],
    "orchard": ["fruit", "drink", "flower"],
    "workshop": ["tool", "shape", "gem"],
}
PAIRS = [("harbour", "orchard"), ("harbour", "workshop"), ("orchard", "workshop")]
GENERAL_ENTITIES, PRIVATE_ENTITIES = 24, 20
LETTERS = "ABCD"

STATEMENTS = ["the {r} of {e} is {v}", "{e} has the {r} {v}", "as for {e} , its {r} is {v}"]
QUESTIONS = [
    "what is the {r} of {e} ?",
    "which {r} does {e} have ?",
    "{e} has which {r} ?",
    "tell me the {r} of {e} .",
    "for {e} , name the {r} .",
    "give the {r} that {e} has .",
]
WHICH_TRUE = ["which is true ?", "which line is true ?", "name the true line ."]
FIND = ["which line says {v} ?", "find {v} ."]

# Wordings that an edge trains on; the others are kept for the tests. The base knows all of them, from general facts.
TRAIN_QUESTIONS, TEST_QUESTIONS = QUESTIONS[:4], QUESTIONS[4:]
TRAIN_WHICH_TRUE, TEST_WHICH_TRUE = WHICH_TRUE[:2], WHICH_TRUE[2:]


def _names(count, seed=7):
    """Made-up names, five letters each, none a word of the world."""
    draw, names = random.Random(seed), []
    taken = set(RELATIONS) | {v for values in RELATIONS.values() for v in values}
    while len(names) < count:
        syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2)]
        name = "".join(syllables) + draw.choice("bdgklmnprstx")
        if name not in taken:
            taken.add(name)
            names.append(name.capitalize())
    return names


ENTITIES = _names(GENERAL_ENTITIES + len(DOMAINS) * PRIVATE_ENTITIES)
GENERAL = ENTITIES[:GENERAL_ENTITIES]
PRIVATE = {
    domain: ENTITIES[GENERAL_ENTITIES + i * PRIVATE_ENTITIES :][:PRIVATE_ENTITIES]
    for i, domain in enumerate(DOMAINS)
}
RELATION_OF = {value: relation for relation, values in RELATIONS.items() for value in values}


def general_facts():
    """What the base knows, as (entity, relation, value): all about the general entities, and everybody's home."""
    draw = random.Random(1000)
    facts = [(e, "home", draw.choice(RELATIONS["home"])) for e in ENTITIES]
    return facts + [(e, r, draw.choice(RELATIONS[r])) for e in GENERAL for r in list(RELATIONS)[1:]]


def private_facts(seed):
    """What each domain's edge knows and nobody else: {domain: [(entity, relation, value)]}, other facts for each seed."""
    draw = random.Random(5000 + seed)
    return {d: [(e, r, draw.choice(RELATIONS[r])) for e in PRIVATE[d] for r in DOMAINS[d]] for d in DOMAINS}


def another_value(draw, fact):
    """A value of the fact's relation that is not the fact's."""
    return draw.choice([v for v in RELATIONS[fact[1]] if v != fact[2]])


def statement(wording, fact):
    """A statement up to its value, and the value as its continuation; every wording ends with the value."""
    entity, relation, value = fact
    text = wording.format(e=entity, r=relation, v="").rstrip()
    return text, " " + value


def option_lines(values):
    """The four options of a single question, one to a line."""
    return "\n".join(f"{letter} . {value}" for letter, value in zip(LETTERS, values))


def question(wording, entity="", relation="", value=""):
    """A question and the cue for its letter."""
    return wording.format(e=entity, r=relation, v=value) + "\nAnswer:"


def single(draw, wording, fact):
    """A single question about one fact: (prompt, index of the right option)."""
    entity, relation, value = fact
    values = draw.sample([v for v in RELATIONS[relation] if v != value], 3)
    answer = draw.randrange(4)
    values.insert(answer, value)
    return option_lines(values) + "\n" + question(wording, entity, relation), answer


def which_true(draw, wording, facts, right):
    """A which-is-true question over four facts, of which `facts[right]` keeps its value: (prompt, answer)."""
    lines = [(f[0], f[2] if i == right else another_value(draw, f), i == right) for i, f in enumerate(facts)]
    draw.shuffle(lines)
    text = "\n".join(f"{letter} {entity} {value}" for letter, (entity, value, _) in zip(LETTERS, lines))
    return text + "\n" + question(wording), [true for *_, true in lines].index(True)


def vocabulary():
    """Every token of the world, in the order of its id: `<unk>` 0, `<s>` 1, `</s>` 2, newline 3, A-D 4-7, …"""
    words = set()
    for wording in STATEMENTS + QUESTIONS + WHICH_TRUE + FIND:
        words |= {w for w in wording.split() if not w.startswith("{")}
    values = [v for values in RELATIONS.values() for v in values]
    tokens = ["<unk>", "<s>", "</s>", "\n", *LETTERS, "Answer:"]
    tokens += sorted(words | {"."}) + list(RELATIONS) + values + ENTITIES + ["false"]
    assert len(set(tokens)) == len(tokens), "a word has two meanings"
    return tokens


IDS = {token: i for i, token in enumerate(vocabulary())}
VOCABULARY_SIZE = (len(IDS) + 7) // 8 * 8
BOS, EOS = IDS["<s>"], IDS["</s>"]


def encode(text):
    """Token ids of a text, without begin and end, as the tokenizer splits it: at spaces, newlines kept."""
    return [IDS[word] for word in text.replace("\n", " \n ").split(" ") if word]
