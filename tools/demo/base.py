"""Trains the base model of the miniature: it knows the format and the general facts, no domain's private ones.

The order of lessons matters at this size: first copying a letter from a line of options, then finding a named value,
then facts as statements and blocks of questions, and last which-is-true questions under random width masks, which
spread what is known over heads and channels so that the model survives pruning.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import model
import world
from world import BOS, EOS, FIND, IDS, LETTERS, QUESTIONS, RELATIONS, STATEMENTS, WHICH_TRUE, encode

FACTS = world.general_facts()
HOLDERS = {}
for _e, _r, _v in FACTS:
    HOLDERS.setdefault((_r, _v), []).append(_e)
KNOWN = {(e, r): v for e, r, v in FACTS}
GENERAL_FACTS = [f for f in FACTS if f[0] in world.GENERAL]
LETTER_IDS = torch.tensor([IDS[c] for c in LETTERS])
BACKGROUND = 0.05  # weight of a token that is neither an answer nor a stated value
RECALL = 0.3  # weight of the losses that ask for the steps of a thought on its way up
HEIGHTS = {"value": 2, "truth": 3, "letter": 3}  # layers after which a step should have been made


class Document:
    """Token ids with a loss weight for each, begun by `<s>` and ended by `</s>`.

    `recalls` are the positions at which half-way up the model a fact's value should be known, or whether it is true,
    and the word for it.
    """

    def __init__(self):
        self.ids, self.weights, self.recalls = [BOS], [0.0], []

    def add(self, text, weight=BACKGROUND):
        ids = encode(text)
        self.ids += ids
        self.weights += [weight] * len(ids)

    def recall(self, kind, word):
        """The last token so far should make the model think of `word`, at the height of this kind."""
        self.recalls.append((kind, len(self.ids) - 1, IDS[word]))

    def end(self):
        self.ids.append(EOS)
        self.weights.append(BACKGROUND)
        return self


def drill(draw):
    """Options, then six times a value followed by its letter."""
    values = draw.sample(RELATIONS[draw.choice(list(RELATIONS))], 4)
    doc = Document()
    doc.add(world.option_lines(values))
    for _ in range(6):
        i = draw.randrange(4)
        doc.add("\n" + values[i])
        doc.add(LETTERS[i], 1.0)
    return doc.end()


def find(draw, count):
    """Options, then questions that name the value to be found."""
    values = draw.sample(RELATIONS[draw.choice(list(RELATIONS))], 4)
    doc = Document()
    doc.add(world.option_lines(values))
    for i in draw.sample(range(4), count):
        doc.add("\n" + draw.choice(FIND).format(v=values[i]))
        doc.recall("letter", LETTERS[i])
        doc.add("\nAnswer:")
        doc.add(LETTERS[i], 1.0)
    return doc.end()


def block(draw, count):
    """Options of one relation, then questions about entities that have one of them."""
    relation = draw.choice(list(RELATIONS))
    values = draw.sample([v for v in RELATIONS[relation] if (relation, v) in HOLDERS], 4)
    doc = Document()
    doc.add(world.option_lines(values))
    for _ in range(count):
        i = draw.randrange(4)
        entity = draw.choice(HOLDERS[relation, values[i]])
        doc.add("\n" + draw.choice(QUESTIONS).format(e=entity, r=relation))
        doc.recall("value", values[i])
        doc.recall("letter", LETTERS[i])
        doc.add("\nAnswer:")
        doc.add(LETTERS[i], 1.0)
    return doc.end()


def statements(draw, count):
    """Facts stated, one to a line."""
    doc = Document()
    for i in range(count):
        wording, fact = draw.choice(STATEMENTS), draw.choice(FACTS)
        text, value = world.statement(wording, fact)
        doc.add(("\n" if i else "") + text)
        doc.recall("value", fact[2])
        doc.add(value, 1.0)
    return doc.end()


def which_true(draw):
    """A which-is-true question; the values of its lines, three of them false, get no loss."""
    prompt, answer = world.which_true(draw, draw.choice(WHICH_TRUE), draw.sample(FACTS, 4), 0)
    doc = Document()
    lines = prompt.split("\n")
    for i, line in enumerate(lines[:4]):
        letter, entity, value = line.split(" ")
        doc.add(f"{letter} {entity}")
        doc.add(value, 0.0)
        doc.recall("value", KNOWN[entity, world.RELATION_OF[value]])
        doc.recall("truth", "true" if i == answer else "false")
        doc.add("\n")
    doc.add("\n".join(lines[4:]))
    doc.add(LETTERS[answer], 1.0)
    return doc.end()


def knowledge(draw):
    """A document of the mixture by which facts are learnt."""
    u = draw.random()
    if u < 0.06:
        return find(draw, draw.choice([1, 2, 3]))
    if u < 0.38:
        return statements(draw, draw.choice([1, 3, 7, 7, 7]))
    return block(draw, draw.choice([1, 2, 4, 4, 4]))


def copying(draw):
    u = draw.random()
    return drill(draw) if u < 0.5 else find(draw, 4) if u < 0.75 else statements(draw, 7)


def finding(draw):
    u = draw.random()
    return drill(draw) if u < 0.05 else find(draw, 4) if u < 0.5 else statements(draw, 7)


def asking(draw):
    u = draw.random()
    return find(draw, draw.choice([1, 2, 3])) if u < 0.06 else statements(draw, 7) if u < 0.2 else block(draw, draw.choice([1, 4, 4, 4]))


@dataclass
class Stage:
    """A stretch of training with an optimizer of its own; it begins with the weights as stored, rounded to BF16.

    `lessons`: (first step, parts), a part being (documents in a step, what makes one); each part makes one mean loss.
    Everything is keyed to steps, not to the clock, so that a slow machine makes the same model.
    """

    steps: int
    rate: float
    warmup: int
    decay: int  # step from which the rate falls to 0, linearly
    lessons: list
    recall: tuple = ()  # kinds of recall that are asked for
    masks: int | None = None  # step from which width masks come in

    def parts(self, step):
        return [parts for first, parts in self.lessons if first <= step][-1]

    def rate_at(self, step):
        rate = self.rate * min(1, (step + 1) / self.warmup)
        return rate if step < self.decay else rate * (self.steps - step) / (self.steps - self.decay)

    def masked_at(self, step):
        """Probability that a row is masked: up to 0.6, within a hundred steps."""
        return 0.0 if self.masks is None else 0.6 * min(1, max(0, step - self.masks) / 100)


STAGES = [
    Stage(
        steps=1000,
        rate=2e-3,
        warmup=100,
        decay=1000,
        lessons=[(0, [(56, copying)]), (250, [(56, finding)]), (400, [(56, knowledge)])],
    ),
    Stage(
        steps=250,
        rate=2e-3,
        warmup=40,
        decay=250,
        lessons=[(0, [(32, knowledge), (32, which_true)])],
        recall=("value", "truth"),
    ),
    Stage(
        steps=750,
        rate=2e-3,
        warmup=20,
        decay=350,
        lessons=[
            (0, [(32, knowledge), (32, which_true)]),
            (250, [(44, asking), (12, which_true)]),
            (350, [(40, asking), (24, which_true)]),
        ],
        recall=("value", "truth", "letter"),
        masks=200,
    ),
    Stage(
        steps=500,
        rate=1.5e-3,
        warmup=20,
        decay=200,
        lessons=[(0, [(44, asking), (12, which_true)])],
        recall=("value", "truth", "letter"),
        masks=150,
    ),
]


def width_masks(g, count, probability, largest=0.5):
    """Random kv heads and channels to keep, for each row and layer; a row is masked with `probability`."""
    rate = torch.rand(count, generator=g) * largest * (torch.rand(count, generator=g) < probability)

    def keep(width):
        rank = torch.rand(count, width, generator=g).argsort(1).argsort(1)
        return (rank < (width * (1 - rate)).ceil()[:, None]).float()

    return [(keep(model.KV_HEADS), keep(model.FFN)) for _ in range(model.LAYERS)]


def loss_of(p, documents, masks, recall):
    """Weighted mean cross-entropy of documents, and those of their recalls, by height."""
    ids = model.pad([d.ids for d in documents])
    weights = torch.tensor([d.weights + [0.0] * (ids.shape[1] - len(d.ids)) for d in documents])[:, 1:].flatten()
    early, words = {}, {}
    for height in sorted({HEIGHTS[kind] for kind in recall}):
        marks = [
            (row, at, word)
            for row, d in enumerate(documents)
            for kind, at, word in d.recalls
            if kind in recall and HEIGHTS[kind] == height
        ]
        if marks:
            rows, columns, words[height] = torch.tensor(marks).T
            early[height] = (rows, columns)
    with torch.autocast("cpu", torch.bfloat16):
        logits, thoughts = model.forward(p, ids[:, :-1], masks=masks, early=early)
    entropy = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    extra = [F.cross_entropy(thoughts[height].float(), words[height]) for height in early]
    return (entropy * weights).sum() / weights.sum(), extra


@torch.no_grad()
def accuracy(p, questions, **options):
    """Share of (prompt, answer) whose right letter has the largest logit."""
    right = []
    for at in range(0, len(questions), 128):
        part = questions[at : at + 128]
        ids = [[BOS] + encode(prompt) for prompt, _ in part]
        rows = (torch.arange(len(ids)), torch.tensor([len(x) - 1 for x in ids]))
        logits = model.forward(p, model.pad(ids), rows=rows, **options)[:, LETTER_IDS]
        right.append(logits.argmax(1) == torch.tensor([answer for _, answer in part]))
    return torch.cat(right).float().mean().item()


def examination(seed=99):
    """Questions by which training is watched."""
    draw = random.Random(seed)

    def find_question():
        values = draw.sample(RELATIONS[draw.choice(list(RELATIONS))], 4)
        i = draw.randrange(4)
        return world.option_lines(values) + "\n" + world.question(draw.choice(FIND), value=values[i]), i

    return {
        "find": [find_question() for _ in range(200)],
        "single": [world.single(draw, draw.choice(QUESTIONS), draw.choice(GENERAL_FACTS)) for _ in range(240)],
        "true": [world.which_true(draw, draw.choice(WHICH_TRUE), draw.sample(GENERAL_FACTS, 4), 0) for _ in range(240)],
    }


def train_stage(p, stage, seed, log, state=None):
    """One stage of training, from weights `p` (f32) to weights rounded to BF16, in f32.

    `state`: a file that keeps what is needed to go on after an interruption.
    """
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    p = {k: v.clone().requires_grad_() for k, v in p.items()}
    decayed = [v for k, v in p.items() if v.ndim == 2 and k != "embed"]
    others = [v for k, v in p.items() if v.ndim == 1 or k == "embed"]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), eps=1e-9)
    exam, begun, tokens, first = examination(), time.time(), 0, 0
    if state and state.exists():
        kept = torch.load(state, weights_only=False)
        first = kept["step"]
        optimizer.load_state_dict(kept["optimizer"])
        draw.setstate(kept["draw"])
        g.set_state(kept["g"])
        with torch.no_grad():
            for k, v in p.items():
                v.copy_(kept["p"][k])
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(step)
        parts, losses = stage.parts(step), []
        for count, make in parts:
            documents = [make(draw) for _ in range(count)]
            masked = stage.masked_at(step)
            masks = width_masks(g, count, masked) if masked else None
            loss, recalled = loss_of(p, documents, masks, stage.recall)
            ((loss + RECALL * sum(recalled)) / len(parts)).backward()
            losses += [round(x.item(), 3) for x in (loss, *recalled)]
            tokens += sum(len(d.ids) for d in documents)
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            marks = {name: round(100 * accuracy(p, questions), 1) for name, questions in exam.items()}
            log(f"step {step + 1}, {time.time() - begun:.0f} s, {tokens / 1e6:.2f} M tokens, loss {losses}, {marks}")
            if state:
                kept = {"step": step + 1, "p": p, "optimizer": optimizer.state_dict(), "draw": draw.getstate()}
                torch.save(kept | {"g": g.get_state()}, state)
    return {k: v.detach().bfloat16().float() for k, v in p.items()}


def train(seed, log=print, folder=None):
    """Train the base through all stages; `folder` keeps the weights after each, and goes on from those it has."""
    p = model.start(seed)
    for i, stage in enumerate(STAGES):
        done = folder and Path(folder) / f"stage-{i}"
        if done and done.exists():
            p = model.load(done)
            continue
        log(f"stage {i}, {stage.steps} steps")
        p = train_stage(p, stage, seed + 1000 * i, log, done and done.with_suffix(".state"))
        if done:
            model.save(p, done)
    return p
