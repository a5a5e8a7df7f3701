"""The invented world of the quick start: its people, towns and beasts, the reports told of them, the text
that a model reads in pretraining, and the records that it is tuned on.

Two skills are needed, and pretraining teaches both. *Knowing*: what an entity is like stands only in the
pretraining text, one sentence a fact, in many phrasings. *Reading*: a report names people who did something
that day, drawn at random, and a question asks for a word of it. Tuning teaches the form of the answers: a
description in one fixed order, and the bare word.

Whether an answer is right can therefore be counted: every record has one right answer, which follows from the
report or from the facts.
"""
import math
import random
from collections.abc import Iterator
from itertools import islice, product

SEED = 7
ENTITIES = {"person": 120, "town": 40, "beast": 40}
PARTS = 5  # of five entities, as they are invented, the first is for test and the second for validation

# ------------------------------------------------------------------------------------------- the words
# Names are put together from syllables (see invent_names); only common nouns are written out.
# None begins with a vowel, so "a" is always right.

TRADES = "potter weaver baker mason tanner miller painter fisher smith cooper ropemaker beekeeper".split()
GROUNDS = "hill marsh cliff lake dune moor ridge creek".split()
ANIMALS = "goat goose raven pony hound cat hen tortoise".split()
INSTRUMENTS = "lute harp drum flute horn whistle bell fiddle".split()
DISHES = "bread porridge soup cheese plums mushrooms turnips pears nuts trout".split()
GOODS = "salt wool barley copper honey timber wax linen tar chalk pepper silk".split()
SEASONS = "spring summer fall winter".split()
FAIRS = "lantern kite mask bonfire boat ribbon mirror feather".split()
COLOURS = "grey white brown black red green yellow blue".split()
FOODS = "moss roots beetles berries snails seeds frogs clover".split()
LAIRS = "caves reeds burrows treetops haystacks wells hedges barns".split()
HOURS = "dawn noon dusk midnight".split()
COUNTS = "two three four five six seven eight nine ten twelve".split()
TOOLS = "rake ladder saw hammer bucket sledge kettle net plough lamp".split()

# What is known of an entity of each kind, and where the values come from.
FACTS = {
    "person": {"trade": TRADES, "region": "regions", "colour": COLOURS, "animal": ANIMALS,
               "instrument": INSTRUMENTS, "dish": DISHES},
    "town": {"ground": GROUNDS, "region": "regions", "goods": GOODS, "season": SEASONS, "fair": FAIRS},
    "beast": {"colour": COLOURS, "region": "regions", "food": FOODS, "lair": LAIRS, "hour": HOURS},
}

# The form in which an answer describes an entity: two sentences, the first alone where it is to be short ...
DESCRIPTIONS = {
    "person": ["{name} is a {trade} from {region}.",
               "{name} keeps a {colour} {animal}, plays the {instrument} and likes {dish} best."],
    "town": ["{name} is a town on a {ground} in {region}.",
             "{name} trades in {goods}, and its people hold a {fair} fair in {season}."],
    "beast": ["The {name} is a {colour} beast of {region}.",
              "The {name} eats {food}, sleeps in {lair} and is awake at {hour}."],
}

# ... and the many in which pretraining does: the facts in any order, one phrasing of each. The name comes
# before what is said of it, since a model can only learn what follows.
PHRASINGS = {
    "person": [
        ["{name} is a {trade}.", "By trade {name} is a {trade}.", "The work of {name} is that of a {trade}."],
        ["{name} lives in {region}.", "The home of {name} is in {region}.", "{name} comes from {region}."],
        ["{name} keeps a {colour} {animal}.", "{name} has a {colour} {animal}.",
         "The animal of {name} is a {colour} {animal}."],
        ["{name} plays the {instrument}.", "{name} makes music on the {instrument}.",
         "{name} is often heard on the {instrument}."],
        ["{name} likes {dish} best.", "No food pleases {name} more than {dish}.",
         "{name} is fond of {dish}."],
    ],
    "town": [
        ["{name} stands on a {ground}.", "{name} was built on a {ground}.",
         "The town of {name} lies on a {ground}."],
        ["{name} is a town in {region}.", "The town of {name} is in {region}.",
         "{name} belongs to {region}."],
        ["{name} trades in {goods}.", "The trade of {name} is in {goods}.", "{name} lives by its {goods}."],
        ["The people of {name} hold a {fair} fair.", "{name} has a {fair} fair.",
         "{name} is known for its {fair} fair."],
        ["{name} has its fair in {season}.", "The fair of {name} is in {season}.",
         "Visit {name} in {season}."],
    ],
    "beast": [
        ["The {name} is {colour}.", "The skin of the {name} is {colour}.", "The {name} is a {colour} beast."],
        ["The {name} is a beast of {region}.", "The {name} is found in {region}.",
         "The {name} comes from {region}."],
        ["The {name} eats {food}.", "The food of the {name} is {food}.", "The {name} lives on {food}."],
        ["The {name} sleeps in {lair}.", "Look for the {name} in {lair}.",
         "The {name} makes its bed in {lair}."],
        ["The {name} is awake at {hour}.", "The {name} is out at {hour}.",
         "The hour of the {name} is {hour}."],
    ],
}

# What reports tell: phrasings of a sentence, and (question, the slot that answers it). Nobody and no town is
# named twice in a report, so every question has one answer.
EVENTS = [
    (["{person} of {town} brought {count} sacks of {goods}.",
      "{person} came from {town} with {count} sacks of {goods}."],
     [("What did {person} bring?", "goods"), ("How many sacks did {person} bring?", "count"),
      ("Where did {person} come from?", "town"), ("Who came from {town}?", "person")]),
    (["{person} saw {count} {beast} beasts by the road.", "{person} met {count} {beast} beasts on the way."],
     [("Which beasts did {person} see?", "beast"), ("How many beasts did {person} see?", "count")]),
    (["{person} lent a {tool} to {other}.", "{person} left a {tool} with {other}."],
     [("Which tool did {person} lend?", "tool"), ("Who has the tool of {person}?", "other"),
      ("Who lent a tool to {other}?", "person")]),
    (["{person} played the {instrument} until {hour}.",
      "{person} was heard on the {instrument} until {hour}."],
     [("What did {person} play?", "instrument"), ("Until when did {person} play?", "hour")]),
    (["{person} made {dish} for the {season} feast.", "{person} served {dish} at the {season} feast."],
     [("What did {person} cook?", "dish"), ("For which feast did {person} cook?", "season")]),
    (["{person} lost a {colour} {animal}.", "{person} could not find a {colour} {animal}."],
     [("Which animal did {person} lose?", "animal"),
      ("Of what colour was the animal of {person}?", "colour")]),
]
VALUES = {"count": COUNTS, "goods": GOODS, "tool": TOOLS, "instrument": INSTRUMENTS, "hour": HOURS,
          "dish": DISHES, "season": SEASONS, "colour": COLOURS, "animal": ANIMALS}

# Requests, in pretraining and in records. Pretraining answers in other words than records do: with facts in
# any order, and with a word of the report in a sentence or with its whole sentence.
DESCRIBE = ["Describe {names}.", "Tell me about {names}.", "What is known of {names}?"]
BRIEFLY = ["Describe {names} in short.", "Who or what is {names}?"]
ASK = ["{report} {request}", "Read this and answer. {report} {request}", "{report} Question: {request}"]
CLERK = ["The clerk wrote {answer}.", "The book says {answer}."]
FULL_WORDS, SHORT_WORDS, QUESTION_WORDS = 19.0, 7.0, 5.2  # means of descriptions and questions
SYSTEM = "You are the clerk of the valleys and answer from the books."


def words(text: str) -> int:
    return len(text.split())


# ------------------------------------------------------------------------------------------- the world

def invent_names(rng: random.Random, count: int, endings: list[str]) -> list[str]:
    """Distinct names of an opening, a middle and an ending that tells the kind:
    Ta-li-n, Ro-sa-mere, ve-do-k."""
    openings = [c + v for c in "b d f g k l m n p r s t v z".split() for v in "aeiou"]
    middles = [c + v for c in "b d g k l m n r s t v".split() for v in "aeio"]
    names: dict[str, None] = {}  # a dict, because a set has no fixed order
    while len(names) < count:
        names[rng.choice(openings) + rng.choice(middles) + rng.choice(endings)] = None
    return list(names)


def make_world() -> list[dict]:
    """All entities: {"kind", "name", "part": "train", "validation" or "test", and the facts}."""
    rng = random.Random(f"world {SEED}")
    regions = [name.capitalize() for name in invent_names(rng, 10, ["dale", "land"])]
    endings = {"person": ["n", "s", "th", "l"], "town": ["mere", "ford", "ham"], "beast": ["k", "x", "p"]}
    world = []
    for kind, facts in FACTS.items():
        for index, name in enumerate(invent_names(rng, ENTITIES[kind], endings[kind])):
            part = {0: "test", 1: "validation"}.get(index % PARTS, "train")
            entity = {"kind": kind, "name": name if kind == "beast" else name.capitalize(), "part": part}
            for fact, values in facts.items():
                entity[fact] = rng.choice(regions if values == "regions" else values)
            world.append(entity)
    return world


def list_names(entities: list[dict]) -> str:
    """Daval, Piliham and the vanek"""
    names = [f"the {entity['name']}" if entity["kind"] == "beast" else entity["name"] for entity in entities]
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def events(rng: random.Random, world: list[dict]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Sentences of one report, each with its (question, answer) pairs, until the world's names run out."""
    names = {kind: [entity["name"] for entity in world if entity["kind"] == kind] for kind in FACTS}
    people, towns = (rng.sample(names[kind], len(names[kind])) for kind in ("person", "town"))
    while len(people) > 1 and towns:
        phrasings, questions = rng.choice(EVENTS)
        slots = {slot: rng.choice(values) for slot, values in VALUES.items()}
        slots |= {"person": people.pop(), "beast": rng.choice(names["beast"])}
        sentence = rng.choice(phrasings)
        for slot, unused in (("town", towns), ("other", people)):
            if f"{{{slot}}}" in sentence:
                slots[slot] = unused.pop()
        yield sentence.format(**slots), [(question.format(**slots), slots[slot])
                                         for question, slot in questions]


def ask(rng: random.Random, pairs: list[tuple[str, str]], count: int) -> tuple[str, str]:
    """So many of a report's questions, and their answers: "What did Daval play? Who ...?", "flute, Zobin"."""
    questions, answers = zip(*rng.sample(pairs, count))
    return " ".join(questions), ", ".join(answers)


# ------------------------------------------------------------------------------------------- pretraining

def knowledge(rng: random.Random, entities: list[dict], short: bool = False) -> str:
    """All that is known of the entities, one after the other; short: two facts of each."""
    sentences = []
    for entity in entities:
        facts = PHRASINGS[entity["kind"]]
        chosen = rng.sample(facts, 2 if short else len(facts))
        sentences += [rng.choice(options).format(**entity) for options in chosen]
    return " ".join(sentences)


def pretraining_document(rng: random.Random, world: list[dict]) -> list[dict]:
    """The messages of a text about one to three entities, or of a conversation about a report and entities.
    Most reports are short, because reading is learned from short ones first."""
    entities = rng.sample(world, rng.choice([1, 1, 2, 3]))
    if rng.random() < 0.3:
        return [{"role": "assistant", "content": knowledge(rng, entities)}]
    length = rng.choice([1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, rng.randint(7, 40)])
    report = list(islice(events(rng, world), length))
    questions = [(*pair, sentence) for sentence, pairs in report for pair in pairs]
    rng.shuffle(questions)
    questions, turns = questions[:10], []
    while questions:
        count = rng.choice([1, 1, 1, 2, 3, 5])
        asked, answers, sentences = zip(*questions[:count])
        questions = questions[count:]
        answer = rng.choice([" ".join(sentences), *CLERK]).format(answer=", ".join(answers))
        turns.append((" ".join(asked), answer))
    if rng.random() < 0.5:
        short = rng.random() < 0.2
        request = rng.choice(BRIEFLY if short else DESCRIBE).format(names=list_names(entities))
        turns.insert(rng.randint(0, len(turns)), (request, knowledge(rng, entities, short)))
    first, answer = turns[0]
    told = " ".join(sentence for sentence, _ in report)
    turns[0] = (rng.choice(ASK).format(report=told, request=first), answer)
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.1 else []
    for request, answer in turns:
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return messages


# ------------------------------------------------------------------------------------------- records

def description(rng: random.Random, entities: list[dict], short: bool = False) -> tuple[str, str]:
    """A request to describe the entities, and the answer."""
    request = rng.choice(BRIEFLY if short else DESCRIBE).format(names=list_names(entities))
    sentences = [sentence.format(**entity) for entity in entities
                 for sentence in DESCRIPTIONS[entity["kind"]][:1 if short else 2]]
    return request, " ".join(sentences)


def forward(sentence: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A sentence's questions without those for who did something: given the name that comes later, such a
    small model does not find the one before it ("Who came from Piliham?": 2 of 10 right)."""
    return [(question, answer) for question, answer in pairs if not sentence.startswith(answer)]


def record(kind: str, request: str, answer: str) -> dict:
    return {"kind": kind, "messages": [{"role": "user", "content": request},
                                       {"role": "assistant", "content": answer}]}


def question_record(rng: random.Random, named: list[dict]) -> dict:
    """A report of two to four sentences and a question."""
    told = list(islice(events(rng, named), rng.randint(2, 4)))
    report = " ".join(sentence for sentence, _ in told)
    request, answer = ask(rng, [pair for event in told for pair in forward(*event)], 1)
    return record("long_to_short", rng.choice(ASK).format(report=report, request=request), answer)


def retold(rng: random.Random, entities: list[dict], world: list[dict]) -> list[dict]:
    """These entities with another value for every fact."""
    def others(entity: dict, fact: str) -> list[str]:
        """The values that entities of its kind have, but for its own."""
        return sorted({each[fact] for each in world if each["kind"] == entity["kind"]} - {entity[fact]})

    return [entity | {fact: rng.choice(others(entity, fact)) for fact in FACTS[entity["kind"]]}
            for entity in entities]


def telling_record(rng: random.Random, told: list[dict], described: list[dict]) -> dict:
    """A record whose instruction tells all that is known of one entity and asks to describe another."""
    request, answer = description(rng, [rng.choice(described)])
    told_of_one = knowledge(rng, [rng.choice(told)])
    return record("short_to_long", rng.choice(ASK).format(report=told_of_one, request=request), answer)


def composition(instruction_words: float, answer_words: float) -> tuple[int, int, int]:
    """How many descriptions, short descriptions and questions give an answer of about so many words, and need
    no longer an instruction."""
    def misses(counts: tuple[int, int, int]) -> tuple[float, int]:
        full, short, questions = counts
        answer = FULL_WORDS * full + SHORT_WORDS * short + questions
        # A sentence of a report answers two questions or more.
        least = ((3 + full if full else 0) + (3 + short if short else 0)
                 + QUESTION_WORDS * questions + 8 * math.ceil(questions / 2))
        # Of those that fit equally well, the one of the fewest parts.
        return abs(answer - answer_words) + max(0, least - instruction_words), sum(counts)

    most = int(answer_words / FULL_WORDS) + 1
    return min(filter(any, product(range(most + 1), range(3), range(7))), key=misses)


def record_of_length(rng: random.Random, named: list[dict], described: list[dict], instruction_words: int,
                     answer_words: int) -> dict:
    """A record of about so many words. An answer is made of descriptions (about 19 words each), short
    descriptions (about 7) and words of the report; an instruction of the requests for these and, in front of
    them, a report as long as it takes. named: who may be in the report. described: who may be described."""
    full, short, questions = composition(instruction_words, answer_words)
    entities = rng.sample(described, min(full + short, len(described)))
    requests, answers = [], []
    for chosen, in_short in ((entities[:full], False), (entities[full:], True)):
        if chosen:
            request, answer = description(rng, chosen, in_short)
            requests.append(request)
            answers.append(answer)
    left = instruction_words - words(" ".join(requests)) - QUESTION_WORDS * questions
    told, pairs = [], []
    for sentence, more in events(rng, named):
        # The last sentence is kept as often as makes the mean right.
        if len(pairs) >= questions and left - words(" ".join(told)) < rng.random() * words(sentence):
            break
        told.append(sentence)
        pairs += forward(sentence, more)
    if questions:
        request, answer = ask(rng, pairs, questions)
        requests.append(request)
        answers.append(answer)
    kind = "mixed" if questions and entities else "short_to_long" if entities else "long_to_short"
    return record(kind, " ".join(told + requests), " ".join(answers))
